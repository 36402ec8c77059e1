"""Parameters and buffers of a module by their names, and other tensors in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Place = tuple[nn.Module, str]


def every_name(module: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters, then all buffers; tied ones under each of their names."""
    params = module.named_parameters(remove_duplicate=False)
    return [*params, *module.named_buffers(remove_duplicate=False)]


def persistent_names(module: nn.Module) -> list[str]:
    """The names of the buffers that a state dict has; tied ones under each of their names."""
    parts = module.named_modules(remove_duplicate=False)
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in parts
        for name in part._buffers
        if name not in part._non_persistent_buffers_set
    ]


def first_names(module: nn.Module) -> dict[str, str]:
    """Per name of a parameter or buffer the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in every_name(module)}


def tensors_by_name(model: nn.Module) -> dict[str, Place]:
    """The module and attribute of every parameter and buffer; tied ones under their first name."""
    found: dict[str, Place] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{prefix}.{name}" if prefix else name] = (module, name)
    return found


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a model that is not sharded yet."""
    return {name: getattr(module, attribute) for name, (module, attribute) in tensors_by_name(model).items()}


def of_the_kind(old: Tensor, value: Tensor) -> Tensor:
    """A value in the place of a tensor: a parameter where that is one, with a gradient if that wants one."""
    return nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value


def replace_tensors(model: nn.Module, new: dict[int, Tensor]) -> None:
    """Replaces tensors by others (by identity), tied ones everywhere."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in new:
                    table[name] = new[id(tensor)]  # type: ignore[assignment]


def named_tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    path, _, attribute = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(path), attribute)
    return found


@contextmanager
def lent(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Replaces a module's parameters and buffers by other tensors, as long as the block runs."""
    places = []
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        table: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
        places.append((table, attribute, table[attribute]))
        table[attribute] = tensor
    try:
        yield
    finally:
        for table, attribute, before in places:
            table[attribute] = before
