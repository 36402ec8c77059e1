"""What a program depends on beyond its call: attributes of modules, configurations, the types of weights.

All of it is baked into a captured graph. When it changes, the program no longer is what the model's python
code says, and another one is captured; when it changes back, the first one serves again.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tpcompile.capture.export.configurations import configurations

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_NO_SETTINGS = frozenset({"forward", "generate", "generation_config"})
_MISSING = object()


class Settings:
    """The present state of a model's settings, as one number; equal states have equal numbers.

    Args:
        model: the model. Its configurations are looked at; changes of attributes are to be reported.
        state: the number to begin with.
    """

    def __init__(self, model: nn.Module, state: int = 0) -> None:
        self.state = state
        self._objects: list[Any] = []  # kept alive, so that no other object gets its id
        self._configs = [(config, _plain_values(config)) for config in configurations(model)]

    def report(self, path: str, name: str, old: Any, new: Any) -> None:
        """Notes that an attribute of the module at ``path`` has changed.

        The number is a sum (exclusive or) of what all attributes contribute, so that it costs the same for
        any number of them.
        """
        if old is not new:
            self.state ^= hash((path, name, self._token(old))) ^ hash((path, name, self._token(new)))

    def number(self) -> int:
        """The number of the present state."""
        if not torch.compiler.is_dynamo_compiling():  # whatever is read there is guarded: hundreds of values
            self._look_at_configs()
        return self.state

    def _look_at_configs(self) -> None:
        """Notes changes of configurations, which nobody reports."""
        for at, (config, seen) in enumerate(self._configs):
            values = vars(config)
            if any(values.get(k, _MISSING) is not v and values.get(k) != v for k, v in seen.items()):
                now = _plain_values(config)
                for key in sorted(seen.keys() | now.keys()):
                    old, new = (repr(each.get(key, _MISSING)) for each in (seen, now))
                    self.report(f"config {at}", key, old, new if new != old else old)
                self._configs[at] = (config, now)

    def _token(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return type(value).__name__, value  # the type because 1 == 1.0 == True
        if isinstance(value, tuple | list):
            return type(value).__name__, *map(self._token, value)
        self._objects.append(value)
        return id(value)


def is_setting(name: str, old: Any, new: Any) -> bool:
    """Whether code may have been captured under an attribute's old value."""
    if name.startswith("_") or name in _NO_SETTINGS:
        return False
    return not isinstance(old, torch.Tensor | nn.Module) and not isinstance(new, torch.Tensor | nn.Module)


def _plain_values(config: Any) -> dict[str, Any]:
    """A configuration's values that can be compared, containers copied."""
    return {
        key: copy.deepcopy(value) if isinstance(value, dict | list) else value
        for key, value in vars(config).items()
        if isinstance(value, (*_PLAIN, dict, list, tuple))
    }
