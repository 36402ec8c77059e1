"""Does something with a module of a library when it is imported: most processes never import it."""

from __future__ import annotations

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
    """Stays until the module is there: it may be looked for before, or its import may fail."""

    def __init__(self, name: str, do: Callable[[ModuleType], None]) -> None:
        self.name, self.do = name, do

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own, whose loader does it afterwards."""
        if fullname != self.name or self not in sys.meta_path:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (other.find_spec(fullname, path, target) for other in others if hasattr(other, "find_spec"))
        spec = next((each for each in found if each is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.do(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
