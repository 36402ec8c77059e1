"""Values for what no checkpoint holds: non-persistent buffers, and parameters that may be left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.errors import TpCompileError
from tpcompile.ir.module_tensors import of_the_kind, replace_tensors, tensors_by_name
from tpcompile.ir.unwrap import APART

_FLAG = "_is_hf_initialized"  # transformers' mark of tensors and modules that its initialisation leaves alone


def initialise_rest(model: Any, loaded: Iterable[str], device: torch.device) -> None:
    """Lets the model's own initialisation give every tensor a value that will not be loaded.

    It is run twice over different contents: what differs afterwards was not given a value. Random numbers
    are those of a fixed seed, so that all ranks have the same; the caller's generators stay as they are.

    Args:
        model: a model on ``meta``.
        loaded: the names (of ``tensors_by_name``) that will be loaded; they stay on ``meta``.
        device: where the values go.

    Raises:
        TpCompileError: the initialisation leaves one without a value.
    """
    skip = set(loaded)
    rest = {name: place for name, place in tensors_by_name(model).items() if name not in skip}
    for tensor in [*model.parameters(), *model.buffers()]:
        setattr(tensor, _FLAG, True)
    first, second = _initialised(model, rest, 0), _initialised(model, rest, 1)
    for name in rest:
        if not torch.equal(_bits(first[name]), _bits(second[name])):
            raise TpCompileError(
                "the checkpoint has no value for this tensor, and the model's initialisation gives it none",
                where=f"{type(model).__name__}: {name}",
                todo="set it in the model's _init_weights, make it persistent, or load the model yourself "
                "and call tpcompile.parallelize",
            )
    for module in model.modules():
        module.__dict__.pop(_FLAG, None)
    old = [getattr(*place) for place in rest.values()]
    replace_tensors(model, {id(x): of_the_kind(x, x.detach().to(device)) for x in old})


def _initialised(model: Any, rest: Mapping[str, tuple[nn.Module, str]], content: int) -> dict[str, Tensor]:
    """The values after the model's initialisation, which found this content."""
    new: dict[int, Tensor] = {}
    for module, attribute in rest.values():
        old = getattr(module, attribute)
        value: Tensor = torch.full(old.shape, content, dtype=old.dtype, device="cpu")
        new[id(old)] = of_the_kind(old, value)
    replace_tensors(model, new)
    for module in model.modules():
        module.__dict__.pop(_FLAG, None)
        if APART in module.__dict__:  # nothing draws numbers for a quantised weight
            module.__dict__[_FLAG] = True
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.initialize_weights()
    return {name: getattr(module, attribute).detach().clone() for name, (module, attribute) in rest.items()}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)
