"""Conversions that were recorded: box by box what they give when they are run, and no more is made for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import tpcompile
from tpcompile.weights.loading import fill_tensor
from tpcompile.weights.loading.expressions import Leaf
from tpcompile.weights.loading.fill_tensor import Filler
from tpcompile.weights.loading.lazy_tensor import LazyTensor, Recording
from tpcompile.weights.loading.map_slice import map_slice
from tpcompile.weights.loading.read_headers import read_header

Convert = Callable[[list[Tensor]], Tensor]
CONVERSIONS: dict[str, Convert] = {
    "experts": lambda t: torch.cat([torch.stack(t[:2]), torch.stack(t[2:])], dim=1),
    "experts, transposed": lambda t: torch.stack(t, dim=0).transpose(1, 2).contiguous(),
    "chunk": lambda t: torch.cat(t, dim=-1).chunk(3, dim=1)[1].contiguous(),
    "split": lambda t: torch.cat(t).split([5, 1, 10])[2].T,
    "unbind": lambda t: torch.unbind(torch.stack(t, dim=1), dim=1)[3][1:, :-2],
    "squeeze": lambda t: torch.stack(t, dim=2).chunk(4, dim=2)[1].squeeze(2),
    "select": lambda t: torch.stack(t)[2, :, 1:4].unsqueeze(-2).to(torch.float64),
    "reshape": lambda t: torch.cat(t).reshape(4, 2, 2, 6).transpose(1, 2).reshape(16, 6),
    "step": lambda t: torch.cat(t, dim=1)[:, ::3],
    "arithmetic": lambda t: torch.stack([t[0] * 2, t[1] + t[2]])[:, 1:],
    "blocks": lambda t: (
        torch.cat(t).reshape(-1, 4, 4, 3, 2) * t[0][:, :3].unsqueeze(-1).unsqueeze(1)
    ).reshape(16, 6),
    "a scale per row": lambda t: torch.stack(t) * t[1][:, 5:] + torch.tensor(3.0),
    "repeated": lambda t: (
        torch.cat(t).repeat_interleave(3, dim=1) - t[1].expand(4, 4, 6).reshape(16, 6).repeat_interleave(3, 1)
    ),
    "filled up": lambda t: torch.nn.functional.pad(torch.cat(t), (1, 2, 0, 4)).view(4, 5, 9)[1:, 2:],
    "a table": lambda t: torch.arange(9.0).square()[(torch.cat(t).abs() * 3).clamp(max=8).long()],
    "written": lambda t: _interleaved(t).reshape(2, 8, 3, 4).flatten(2),
    "bytes": lambda t: torch.cat(t).long().view(torch.int16)[:, :7],
    "a number": lambda t: torch.cat(t) * t[0][:1, :1].reshape(()),
    "a sum": lambda t: torch.cat(t).cumsum(0)[:, 1:],
}


def _interleaved(t: list[Tensor]) -> Tensor:
    """Memory that is written into in parts of parts, and read between."""
    found = torch.empty(16, 12)
    for i, one in enumerate(t):
        rows = found[4 * i : 4 * i + 4]
        rows[:, 0::2] = one
        rows[:, 1::2] = one + 1
        torch.mul(rows, 2, out=rows)
    found[3].fill_(7)
    return found


@pytest.mark.parametrize("name", CONVERSIONS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_boxes_of_conversions(name: str, data: st.DataObject) -> None:
    """A conversion that was recorded gives, box by box, what it gives when it is run."""
    tensors = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    leaves = [Leaf((4, 6), torch.float32, str(i)) for i in range(4)]
    expected = CONVERSIONS[name](tensors)
    with Recording():
        lazy = CONVERSIONS[name]([LazyTensor(leaf) for leaf in leaves])
    assert isinstance(lazy, LazyTensor) and lazy.shape == expected.shape and lazy.dtype == expected.dtype
    offsets = [data.draw(st.integers(0, size - 1)) for size in expected.shape]
    sizes = [data.draw(st.integers(0, s - o)) for s, o in zip(expected.shape, offsets, strict=True)]
    target = torch.full(sizes, 77, dtype=expected.dtype)
    filler = Filler(lambda leaf: tensors[int(leaf.name)])
    filler.fill(target, lazy.expression, offsets)
    box = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
    assert torch.equal(target, expected[box])
    assert name == "a sum" or not filler._whole, "a copy was made on the way"
    assert torch.equal(filler.whole(lazy.expression), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_lies_in_one_piece_is_mapped(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A mapped box is the box; just the contiguous ones are mapped, and the file stays as it is."""
    file = tmp_path_factory.getbasetemp() / "mapped.safetensors"
    tensors = {"a": torch.arange(60.0).view(3, 4, 5), "b": torch.arange(60.0, 120.0).view(3, 4, 5)}
    save_file(tensors, file)
    stored = read_header(str(file))
    joined = torch.cat([LazyTensor(stored["a"]), LazyTensor(stored["b"])])[1:]  # type: ignore[list-item]
    whole = torch.cat([tensors["a"], tensors["b"]])[1:]
    offsets = [data.draw(st.integers(0, size - 1)) for size in whole.shape]
    sizes = [data.draw(st.integers(1, s - o)) for s, o in zip(whole.shape, offsets, strict=True)]
    box = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
    mapped = map_slice(joined.expression, offsets, sizes, torch.float32)
    one_file = offsets[0] + sizes[0] <= 2 or offsets[0] >= 2
    assert (mapped is not None) == (one_file and box.is_contiguous())
    assert map_slice(joined.expression, offsets, sizes, torch.float64) is None
    if mapped is not None:
        assert torch.equal(mapped, box) and mapped.untyped_storage().nbytes() == box.numel() * 4
        mapped.zero_()
        assert torch.equal(load_file(file)["a"], tensors["a"]) and torch.equal(
            load_file(file)["b"], tensors["b"]
        )


def test_conversions_that_cannot_be_recorded() -> None:
    lazy = LazyTensor(Leaf((4, 6), torch.float32, "w"))
    with pytest.raises(tpcompile.TpCompileError, match="in place"):
        lazy.mul_(2)
    with pytest.raises(tpcompile.TpCompileError, match="looks at values"):
        lazy.sum().item()
    with Recording():
        memory = torch.zeros(4, 6)
        seen = memory.t()  # may be seen in this way after it has changed
        with pytest.raises(tpcompile.TpCompileError, match="in place"):
            memory.copy_(lazy)
        with pytest.raises(tpcompile.TpCompileError, match="in place"):
            seen.copy_(lazy.t())
        with pytest.raises(tpcompile.TpCompileError, match="in place"):
            torch.zeros(4, 5)[:, ::2].copy_(lazy[:, :3])


def test_what_torch_refuses_is_refused() -> None:
    """Shapes that do not fit are no reason to take what would."""
    lazy: Any = LazyTensor(Leaf((4, 6), torch.float32, "w"))
    table = torch.arange(4.0)
    with Recording():
        for attempt in (
            lambda: lazy.split([2, 3], dim=1),
            lambda: lazy.expand(4, 12),
            lambda: torch.zeros(4, 3).copy_(lazy),
            lambda: lazy[4],
            lambda: lazy.view(5, 5),
            lambda: lazy * torch.ones(5),
            lambda: torch.cat([lazy, lazy.t()]),
            lambda: torch.stack([lazy, lazy[1:]]),
            lambda: torch.nn.functional.pad(lazy, (0, -1)),
            lambda: table[lazy[0, :4] > 0],
        ):
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                attempt()


def test_constants_are_those_of_their_time() -> None:
    tensor, number = torch.randn(4, 6), torch.tensor([2.0])
    found = LazyTensor(Leaf((4, 6), torch.float32, "w")) * number
    number.add_(1)
    assert torch.equal(Filler(lambda leaf: tensor).whole(found.expression), tensor * 2)  # type: ignore[attr-defined]


def test_parts_of_memory_as_a_list() -> None:
    """They may be seen after it has changed."""
    for apart in (torch.unbind, lambda memory: torch.split(memory, 2)):
        with Recording():
            memory = torch.zeros(4, 6)
            apart(memory)
            with pytest.raises(tpcompile.TpCompileError, match="in place"):
                memory.fill_(2)


def test_what_is_copied_from_memory_stays() -> None:
    tensor = torch.randn(4, 6)
    with Recording():
        memory = torch.zeros(4, 12)
        memory[:, ::2] = LazyTensor(Leaf((4, 6), torch.float32, "w"))
        part, twice = memory[:, ::2].contiguous(), memory * 2
        memory[:, ::2] = 5
    filler = Filler(lambda leaf: tensor)
    assert torch.equal(filler.whole(part.expression), tensor)  # type: ignore[attr-defined]
    assert torch.equal(filler.whole(twice.expression)[:, ::2], tensor * 2)  # type: ignore[attr-defined]
    assert (filler.whole(memory.expression)[:, ::2] == 5).all()  # type: ignore[attr-defined]


def test_large_boxes_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no more than so many elements, which begin at multiples of blocks."""
    tensor, most = torch.randn(96, 40), 256
    monkeypatch.setattr(fill_tensor, "_MOST", most)
    lazy: Any = LazyTensor(Leaf((96, 40), torch.float32, "w"))
    halves = (lazy.view(24, 4, 40) * lazy[::4, None, :1]).view(96, 40).half()
    target, filler = torch.empty(90, 39, dtype=torch.float16), Filler(lambda leaf: tensor)
    sizes: list[int] = []
    compute = filler._compute
    monkeypatch.setattr(filler, "_compute", lambda t, *args: (sizes.append(t.numel()), compute(t, *args)))
    filler.fill(target, halves.expression, [3, 1])
    expected = (tensor.view(24, 4, 40) * tensor[::4, None, :1]).view(96, 40).half()
    assert torch.equal(target, expected[3:93, 1:]) and max(sizes) <= most and len(sizes) < 90 * 39 // most * 3
