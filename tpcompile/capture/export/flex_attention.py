"""Keeps torch's ``flex_attention`` whole: its call is one operator in the graph, and so is making its mask.

The python that says what scores become, and which of them count, is traced into graphs of single elements;
what it reads besides (slopes, padding, numbers of documents) becomes operands. Where a rank has some of the
heads, that python is told the head's number in the whole model, so that these operands stay whole.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.attention import flex_attention as _flex

from tpcompile.errors import CannotCapture
from tpcompile.ir.torch_internals import FakeTensor, FakeTensorMode
from tpcompile.rules.kernels import BLOCK_MASK, FLEX_ATTENTION, HEADS

from .explain_failure import here
from .kept_calls import FUNCTION, KeptCall, Note, only_shapes
from .lift_function import Lifted, alone, lift

flex: Any = _flex
# Torch's own, also while something else stands in for them.
_ATTEND, _scores = flex.flex_attention_hop, flex.create_mask
_blocks, _ordered = flex._convert_mask_to_block_mask, flex._create_sparse_block_from_block_mask
_SPARSE = slice(2, 10)
"""Where the tensors of a mask's blocks stand in torch's tuple of a mask."""
_FIXED = HEADS + 3
"""How many numbers stand before those that functions read."""


@dataclass(eq=False)
class AttentionCall(KeptCall):
    """A call of flex attention.

    Its numbers are: which heads a rank has, how many tensors are about the mask's blocks, the lengths of
    queries and keys, and what both functions read. Head ``h`` is ``h // held * of + h % held + first`` in
    the whole model, with the first three of them: where repeats of shared keys are divided, a rank has some
    of each group's heads.

    Attributes:
        score, mask: what becomes of a score, and whether it counts.
        present: which of the tensors about blocks there are, in torch's tuple of a mask.
        block: the sizes of a block.
        scale: of the scores.
        options: the kernel's.
    """

    score: Lifted
    mask: Lifted
    present: tuple[bool, ...]
    block: tuple[int, int]
    scale: float
    options: dict[str, Any]

    def run(self, inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Attends: the result, the logarithms of sums, and the largest scores, the last two by base 2."""
        if only_shapes(inputs):
            query, rows = inputs[0], inputs[0].shape[:-1]
            beside = [query.new_empty(rows, dtype=torch.float32) for _ in range(2)]
            return [query.new_empty((*rows, inputs[2].shape[-1])), *beside]
        if _has_kernel(inputs[0]):
            # Torch 2.13's dynamo loses the gradients of views that functions read.
            inputs = [x.clone() if x.requires_grad else x for x in inputs]
            return list(_compiled()(self, inputs, sizes, True))
        return list(self.attend(inputs, sizes, False))

    def attend(self, inputs: list[Tensor], sizes: list[int], bound: bool) -> tuple[Tensor, ...]:
        """See ``run``.

        Args:
            inputs, sizes: the same.
            bound: whether functions have what they read, which dynamo finds and takes no other way.
        """
        (first, held, of), (count, *lengths) = sizes[:HEADS], sizes[HEADS:_FIXED]
        tensors, numbers = iter(inputs[3 + count :]), iter(sizes[_FIXED:])
        blocks = iter(inputs[3 : 3 + count])
        sparse = [next(blocks) if there else None for there in self.present]
        # Torch differentiates scores by themselves: a checkpoint would compute all again for that.
        real = not (bound or isinstance(inputs[0], FakeTensor))
        apart = saved_tensors_hooks(lambda x: x, lambda x: x) if real else nullcontext()
        slopes, shown = (function.take(tensors, numbers) for function in (self.score, self.mask))

        def everywhere(h: Tensor) -> Tensor:
            return h + first if held == of else h // held * of + h % held + first

        def score(value: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *others: Any) -> Any:
            with apart:
                return self.score.graph(value, b, everywhere(h), q, k, *(slopes if bound else others))

        def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *others: Any) -> Any:
            return self.mask.graph(b, everywhere(h), q, k, *(shown if bound else others))

        whole = (*lengths, *sparse, *self.block, mask)
        given = (*inputs[:3], score, whole, self.scale, self.options)
        made: tuple[Tensor, ...] = _ATTEND(*given) if bound else _ATTEND(*given, slopes, shown)
        return made


@dataclass(eq=False)
class MaskCall(KeptCall):
    """A mask made for flex attention: the tensors about its blocks.

    Its numbers are those of batch, heads, queries and keys, and what its function reads.

    Attributes:
        mask: whether a score counts.
        block: the sizes of a block.
        device: where it is made.
        separate: whether blocks in which all scores count are said apart.
    """

    mask: Lifted
    block: tuple[int, int]
    device: torch.device | str
    separate: bool

    def run(self, inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Makes the mask; returns the tensors about its blocks that there are."""
        if only_shapes(inputs):
            queries, keys = (-(-size // block) for size, block in zip(sizes[2:4], self.block, strict=True))
            pairs = [(queries,), (queries, keys)], [(keys,), (keys, queries)]
            each = (shape for pair in pairs for shape in pair * (1 + self.separate))
            return [inputs[-1].new_empty((*sizes[:2], *shape), dtype=torch.int32) for shape in each]
        others = self.mask.take(iter(inputs), iter(sizes[4:]))

        def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Any:
            return self.mask.graph(b, h, q, k, *others)

        scores = _scores(mask, *sizes[:4], self.device)
        blocks = _blocks(scores, *self.block, separate_full_blocks=self.separate)
        made = _ordered(blocks, mask, (sizes[2], sizes[3]), *self.block)
        return [x for x in made.as_tuple()[_SPARSE] if x is not None]


_BACKEND = "inductor"


@functools.cache
def _compiled() -> Callable[..., Any]:
    """With torch's kernel: as it is called, the operator computes all scores."""
    return torch.compile(AttentionCall.attend, backend=_BACKEND)


def _has_kernel(query: Tensor) -> bool:
    """Whether a call is compiled by itself: where torch has a kernel that trains, and nobody is tracing."""
    traced = isinstance(query, FakeTensor) or get_proxy_mode() is not None or torch.compiler.is_compiling()
    return query.device.type != "cpu" and not traced


@dataclass(frozen=True)
class _Wanted:
    """What a mask is made for, in place of all its scores.

    Attributes:
        sizes: batch, heads, queries, keys.
        device: where.
        separate: see ``MaskCall``.
    """

    sizes: tuple[Any, ...]
    device: Any
    separate: bool = False


class _Kept:
    """What stands in for parts of torch's flex attention while a model is traced.

    Args:
        found: is given the calls, by key.
        note: see ``kept_functions``.
    """

    def __init__(self, found: dict[str, KeptCall], note: Note | None) -> None:
        self._found, self._note = found, note

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Callable[..., Any],
        block_mask: tuple[Any, ...],
        scale: float,
        options: dict[str, Any],
    ) -> list[Tensor]:
        """Torch's operator, given the functions as they are.

        Raises:
            CannotCapture: it is given what says in which order gradients are written.
        """
        if any(x is not None for x in block_mask[_SPARSE.stop : -3]):
            raise CannotCapture(
                "flex_attention is given an order in which blocks of its mask are written",
                where=here(),
                todo="make the mask without compute_dq_write_order",
            )
        query, key, value = map(_as_autocast, (query, key, value))
        mode, index = _mode_of(query), [torch.int] * 4
        score, *read = lift(score_mod, [query.dtype, *index], mode, query.device)
        mask, *more = lift(block_mask[-1], index, mode, query.device)
        present = tuple(x is not None for x in block_mask[_SPARSE.start : -3])
        blocks = [x for x in block_mask[_SPARSE] if x is not None]
        constants = (score.text, mask.text, present, block_mask[-3:-1], scale, sorted(options.items()))
        call = self._find(
            FLEX_ATTENTION,
            constants,
            lambda key: AttentionCall(key, score, mask, present, block_mask[-3:-1], scale, dict(options)),
        )
        sizes = [0, 1, 1, len(blocks), *block_mask[:2], *read[1], *more[1]]
        return self._call(call, [query, key, value, *blocks, *read[0], *more[0]], sizes, query)

    def make(self, wanted: _Wanted, mask_mod: Callable[..., Any], lengths: Any, *block: int) -> Any:
        """Torch's mask, of blocks that an operator makes."""
        anchor = torch.empty((), dtype=torch.int32, device=wanted.device)
        mask, *read = lift(mask_mod, [torch.int] * 4, _mode_of(anchor), wanted.device)
        constants = (mask.text, block, torch.device(wanted.device).type, wanted.separate)
        call = self._find(
            BLOCK_MASK,
            constants,
            lambda key: MaskCall(key, mask, (block[0], block[1]), wanted.device, wanted.separate),
        )
        # An operator has some tensor, and the function may read none.
        made = self._call(call, [*read[0], anchor], [*wanted.sizes, *read[1]], anchor)
        whole = made if wanted.separate else [*made[:2], None, None, *made[2:], None, None]
        return flex.BlockMask(lengths, *whole, BLOCK_SIZE=block, mask_mod=mask_mod)

    def _find(self, name: str, constants: object, make: Callable[[str], KeptCall]) -> KeptCall:
        key = f"{name}({hashlib.sha256(repr(constants).encode()).hexdigest()[:16]})"
        if key not in self._found:
            self._found[key] = make(key)
        return self._found[key]

    def _call(self, call: KeptCall, tensors: list[Tensor], sizes: list[Any], like: Tensor) -> list[Tensor]:
        if self._note is None:
            made: list[Tensor] = FUNCTION(tensors, sizes, call.key, False)
            return made
        self._note(call.key, [*tensors, *sizes])
        with alone(_mode_of(like)):
            made = call.run(tensors, sizes)
        return [like.new_empty(x.shape, dtype=x.dtype) for x in made]


def _as_autocast(x: Tensor) -> Tensor:
    """As torch's operator takes it under autocast."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype is torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _mode_of(tensor: Tensor) -> FakeTensorMode:
    assert isinstance(tensor, FakeTensor)
    return tensor.fake_mode


def _everything(query: Tensor, key: Tensor) -> Any:
    """Torch's mask for none: one block, in which all counts."""
    one = torch.ones([1, 1, 1], dtype=torch.int32, device=query.device)
    first = torch.zeros([1, 1, 1, 1], dtype=torch.int32, device=query.device)
    size = flex._LARGE_SPARSE_BLOCK_SIZE
    return flex.BlockMask((1, 1), one, first, None, None, one, first, None, None, BLOCK_SIZE=(size, size))


@contextmanager
def kept_attention(found: dict[str, KeptCall], note: Note | None) -> Iterator[None]:
    """Lets flex attention appear as one operator in what is traced inside the block.

    Args:
        found: is given the calls, by key.
        note: see ``kept_functions``.
    """
    kept = _Kept(found, note)
    parts: dict[str, Any] = {
        "flex_attention_hop": kept.attend,
        # Torch refuses CPUs where gradients are recorded, as their kernel has none: the operator has.
        "_validate_device": lambda *_: None,
        "_create_empty_block_mask": _everything,
        "create_mask": lambda mod, *sizes: _Wanted(tuple(1 if x is None else x for x in sizes[:4]), sizes[4]),
        "_convert_mask_to_block_mask": lambda wanted, separate_full_blocks, **_: (
            replace(wanted, separate=separate_full_blocks),
            None,
        ),
        "_create_sparse_block_from_block_mask": lambda made, *rest: kept.make(made[0], *rest),
    }
    with patch.multiple(flex, **parts), torch.compiler.set_stance("force_eager"):
        yield
