"""Which parameters of a model a rule of a plan names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Any

from torch import nn

from tpcompile.ir.module_tensors import first_names
from tpcompile.ir.names import starred
from tpcompile.ir.unwrap import taken_apart


@dataclass(frozen=True)
class Target:
    """A parameter that a rule names.

    Attributes:
        param: the name by which it was matched (a tied parameter has several).
        direct: the rule names the parameter itself, not its module.
        rank: how closely the rule fits; of several rules the closest counts, on a tie the last.
    """

    param: str
    direct: bool
    rank: tuple[bool, bool, bool]


@dataclass(frozen=True)
class Names:
    """What a plan's rules may name.

    Attributes:
        params: every name of every parameter -> the first one of the same parameter; of a quantised one
            that of its largest part, and none of the others.
        modules: the module names.
        prefix: where the base model is (``model`` in ``model.layers``), or ``""``.
    """

    params: Mapping[str, str]
    modules: Mapping[str, nn.Module] = field(repr=False)
    prefix: str = ""

    def targets(self, glob: str) -> list[Target]:
        """The parameters that a rule names, directly or by their module.

        A ``*`` stands for one component of a name (a layer's number), as in transformers, and for any
        text where that names nothing. A name may be relative to the base model.
        """
        for key in self._keys(glob):
            for close in (True, False):
                if found := list(self._matches(key, close)):
                    return found
        return []

    def modules_of(self, glob: str) -> list[str]:
        """The modules that a rule names, whether or not they have parameters."""
        for key in self._keys(glob):
            for close in (True, False):
                pattern = _pattern(key, close)
                if found := [n for n in self.modules if pattern.fullmatch(n)]:
                    return found
        return []

    def nearest(self, glob: str) -> list[str]:
        """Names that look like one that names nothing, numbers as ``*``."""
        owners = {n.rpartition(".")[0] for n in self.params}
        known = sorted({starred(n) for n in {*self.params, *owners}})
        return difflib.get_close_matches(glob, known, n=3, cutoff=0.3)

    def _keys(self, glob: str) -> Iterable[str]:
        return (glob, f"{self.prefix}.{glob}") if self.prefix else (glob,)

    def _matches(self, key: str, close: bool) -> Iterable[Target]:
        pattern, plain = _pattern(key, close), "*" not in key
        for name in self.params:
            if pattern.fullmatch(name):
                yield Target(name, True, (close, plain, True))
            elif pattern.fullmatch(name.rpartition(".")[0]):
                yield Target(name, False, (close, plain, False))


def names_of(model: nn.Module) -> Names:
    """What rules about a model may name."""
    first = first_names(model)
    params = {name: first[name] for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, (main, *others) in taken_apart(model).items():
        # A rule for a quantised weight is about its numbers: scales follow these.
        params |= {name: first[main]} if main in params else {}
        for other in others:
            params.pop(other, None)
    prefix: Any = getattr(model, "base_model_prefix", "")
    has_base = bool(prefix) and isinstance(getattr(model, prefix, None), nn.Module)
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    return Names(params, modules, str(prefix) if has_base else "")


def _pattern(key: str, close: bool) -> re.Pattern[str]:
    """A glob as a regular expression; in a close match a ``*`` stays within one component."""
    return re.compile(r"[^.]+".join(map(re.escape, key.split("*"))) if close else translate(key))
