"""From global shapes to each rank's local program; import it as `tpcompile.lowering`."""

if __name__ != "tpcompile.lowering":
    raise ImportError("this folder is the package tpcompile.lowering: import it by that name")
