"""Lends a model fake weights on the target device while it is captured, and puts everything back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tpcompile.ir.module_tensors import replace_tensors, whole_tensors
from tpcompile.ir.torch_internals import FakeTensorMode

from .python_state import PythonState


def capture_device(model: nn.Module, leaves: list[Any]) -> torch.device:
    """Return the device that the graph is captured for: the parameters', or the inputs', or the CPU."""
    tensors = [*model.parameters(), *(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))]
    return next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))


def fake_input(mode: FakeTensorMode, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a valueless contiguous tensor, otherwise like ``like``, on ``device``."""
    with mode, torch.no_grad():
        fake = torch.empty(like.shape, dtype=like.dtype, device=device)
    return fake.requires_grad_(like.requires_grad)


def fake_weight(
    mode: FakeTensorMode, like: torch.Tensor, device: torch.device, requires_grad: bool
) -> torch.Tensor:
    """Return a valueless parameter or buffer, otherwise like ``like``, on ``device``."""
    with mode, torch.no_grad():
        fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    if isinstance(like, nn.Parameter):
        return nn.Parameter(fake, requires_grad)
    return fake.requires_grad_(requires_grad)


@contextmanager
def lend_fake_weights(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Replace every parameter and buffer that is not on ``device`` by a fake one that is.

    Exporting a meta model as it is would write ``device='meta'`` into the graph; fake tensors cost no
    memory and know their device. Tied tensors stay tied.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    real = [tensor for tensor in whole_tensors(model).values() if tensor.device != device]
    with restore_after(model):
        replace_tensors(model, {id(x): fake_weight(mode, x, device, x.requires_grad) for x in real})
        yield


@contextmanager
def no_fused_encoder() -> Iterator[None]:
    """Keep nn.TransformerEncoder and nn.MultiheadAttention from calling one opaque inference kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def restore_after(model: nn.Module) -> Iterator[None]:
    """Put the model's python state back after the block, however it ends.

    Tracing runs the model's python code, which may store traced (fake) tensors or symbolic sizes in
    attributes, lists or dicts; a model left like that is broken.
    """
    state = PythonState(model)
    try:
        yield
    finally:
        state.restore()
