"""Does something with a module of a library when it is imported: most processes never import it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, do: Callable[[ModuleType], None]) -> None:
    """Does it now if the module is there already, else as soon as it is imported; once."""
    if name in sys.modules:
        do(sys.modules[name])
    else:
        sys.meta_path.insert(0, _WhenImported(name, do))


class _WhenImported(MetaPathFinder):
    def __init__(self, name: str, do: Callable[[ModuleType], None]) -> None:
        self.name, self.do = name, do

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own, whose loader does it afterwards."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.do(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
