"""Graph rewrites over global shapes, one file each; import them as `tpcompile.passes`."""

if __name__ != "tpcompile.passes":
    raise ImportError("this folder is the package tpcompile.passes: import it by that name")
