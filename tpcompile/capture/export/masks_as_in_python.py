"""Masks that transformers leaves out where nothing is traced are left out in programs, too.

Its python leaves a mask out if it hides nothing that attention does not hide by itself, which it finds by
looking at the mask's values; attention then is causal or not, as its module says. Where the mask says the
same, nothing is lost by making it, as transformers does while it is traced. Where it does not (a mask for
what is behind a position, attention that is not causal), the values of the mask decide what is computed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tpcompile.errors import OnlyInParts
from tpcompile.ir.torch_internals import tree_leaves

from .explain_failure import here

_KEEP_VALUES = {
    *("__getitem__", "slice", "select", "index", "expand", "unsqueeze", "squeeze"),
    *("view", "reshape", "to", "contiguous", "clone"),
}
"""Calls that give a part of a mask, by name: a trace says ``slice.Tensor`` for ``__getitem__``."""
_ASKS = ("is_tracing", "is_torchdynamo_exporting")
_FUNCTIONS = ("or_mask_function", "and_mask_function")


class _Mask(NamedTuple):
    """A mask that python may leave out.

    Attributes:
        tensor: what a traced model is given instead, or a part of it.
        causal: it is one for causal attention.
        is_left_out: whether python leaves it out.
    """

    tensor: Tensor
    causal: bool
    is_left_out: Callable[[], bool | Tensor]


class _Packed(NamedTuple):
    """Sequences that may be packed in one row.

    Attributes:
        maker: what makes a mask.
        sequences: for each position its sequence, by number.
        allows: python may leave the mask out if nothing is packed.
    """

    maker: FrameType
    sequences: Tensor
    allows: bool

    def is_none(self) -> Tensor:
        """Whether every row is one sequence."""
        return (self.sequences[:, -1] == 0).all()


class _Masks(TorchFunctionMode):
    """Follows the masks of a traced model to the attention that they are given to.

    Args:
        errors: is given what is refused, as the model's python may catch it.
    """

    def __init__(self, errors: list[Exception]) -> None:
        super().__init__()
        self._errors = errors
        self._masks: dict[int, _Mask] = {}
        self._packed: _Packed | None = None
        self._attending = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._masks and not self._attending:
            given = [self._masks[id(x)] for x in tree_leaves((args, kwargs)) if id(x) in self._masks]
            made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            if given and made:
                self._follow(func, given[0], made)
        return result

    def _follow(self, func: Any, mask: _Mask, made: list[Tensor]) -> None:
        if getattr(func, "__name__", "").partition(".")[0] in _KEEP_VALUES:
            self._note(*(mask._replace(tensor=x) for x in made))
        elif mask.causal:  # where all is shown, no mask and a mask are the same
            self._refuse_left_out(mask, "computes with a mask")

    def _refuse_left_out(self, mask: _Mask, what: str) -> None:
        if mask.is_left_out() is not False:
            error = OnlyInParts(
                f"the model's forward {what} that transformers makes while it is traced, and elsewhere only "
                "where it hides more than causal attention does",
                where=here(),
                todo="attend with transformers' sdpa attention and without is_causal=False, or make the mask "
                "with allow_is_causal_skip=False; or parallelize(compose=True)",
            )
            self._errors.append(error)
            raise error

    def _note(self, *masks: _Mask) -> None:
        self._masks.update((id(mask.tensor), mask) for mask in masks)

    def _packed_in(self, maker: FrameType) -> _Packed | None:
        return self._packed if self._packed is not None and self._packed.maker is maker else None

    def make(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Transformers' function that makes a mask."""
        signature = inspect.signature(original)

        def make(*args: Any, **kwargs: Any) -> Any:
            packed = self._packed_in(sys._getframe(1))
            result = original(*args, **kwargs)
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            options = call.arguments | call.arguments.get("kwargs", {})
            options.pop("kwargs", None)
            options["allow_is_causal_skip"] |= packed is not None and packed.allows
            causal = bool(options["allow_is_causal_skip"])

            def is_left_out() -> bool | Tensor:
                found = _decided(lambda: original(**options) is None)
                return found if packed is None or found is False else found & packed.is_none()

            if isinstance(result, Tensor) and (causal or options.get("allow_is_bidirectional_skip")):
                self._note(_Mask(result, causal, is_left_out))
            return result

        return make

    def find_packed(self, original: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        """Transformers' function that looks at positions for sequences that are packed in one row."""

        def find(position_ids: Tensor) -> Tensor | None:
            found = original(position_ids)
            maker = sys._getframe(2)
            wanted, more = maker.f_locals, (*_FUNCTIONS, "block_sequence_ids")
            plain = all(wanted.get(name) is None for name in more)
            allows = plain and wanted.get("allow_is_causal_skip", True)
            self._packed = _Packed(maker, found, allows) if found is not None else None
            return found

        return find

    def remap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Transformers' function by which masks go by positions instead of places, if rows are packed.

        What is behind a place, and how far, is the same by both. Chunks, and what the model's functions say,
        are not where positions begin elsewhere.
        """

        def remap(mask_function: Callable[..., Any], position_ids: Tensor) -> Any:
            maker = sys._getframe(1)
            packed = self._packed_in(maker)
            by_place = (maker.f_locals.get(name) is not None for name in ("chunk_size", *_FUNCTIONS))
            if packed is not None and any(by_place):
                places = torch.arange(position_ids.shape[-1], device=position_ids.device)
                position_ids = torch.where(packed.is_none(), places, position_ids)
            return original(mask_function, position_ids)

        return remap

    def attend(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Transformers' attention."""
        signature = inspect.signature(original)

        def attend(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            given = call.arguments
            mask = self._masks.get(id(given.get("attention_mask")))
            self._attending, before = True, self._attending
            try:
                if mask is not None and given["query"].shape[2] != 1:  # one position attends to all anyway
                    self._decide(mask, given)
                return original(*call.args, **call.kwargs)
            finally:
                self._attending = before

        return attend

    def _decide(self, mask: _Mask, given: dict[str, Any]) -> None:
        """Gives attention the mask, or none: as where nothing is traced."""
        own, asked = getattr(given["module"], "is_causal", None), given.get("is_causal")
        if asked is None or asked:
            causal = bool(getattr(given["module"], "is_causal", True)) if asked is None else True
            given["attention_mask"] = _as_in_python(mask, causal, given["query"], given["key"])
        elif mask.causal and not own:  # else it may be told so because there is a mask
            self._refuse_left_out(mask, "asks for attention that is not causal, with a mask")


def _as_in_python(mask: _Mask, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask, or none: what attention would be given where nothing is traced."""
    if causal == mask.causal:
        return mask.tensor
    left_out = mask.is_left_out()
    if not isinstance(left_out, Tensor):
        return None if left_out else mask.tensor
    if not causal:
        return mask.tensor | left_out
    rows, columns = (torch.arange(x.shape[2], device=x.device) for x in (query, key))
    return torch.where(left_out, rows[:, None] >= columns, mask.tensor)


class _Answers(TorchFunctionMode):
    """Answers what python asks of truth values: as it is told, then always yes."""

    def __init__(self, answers: list[bool]) -> None:
        super().__init__()
        self.answers, self.asked = [*answers], list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__bool__:
            return func(*args, **(kwargs or {}))
        self.asked.append(args[0])
        self.answers += [True] * (len(self.asked) - len(self.answers))
        return self.answers[len(self.asked) - 1]


def _decided(ask: Callable[[], bool]) -> bool | Tensor:
    """What python decides where nothing is traced, as a tensor if it looks at values: it goes all ways."""
    masking, found, ways = sys.modules["transformers.masking_utils"], False, [list[bool]()]
    answers: dict[str, Any] = {name: lambda *_: False for name in _ASKS if hasattr(masking, name)}
    with patch.multiple(masking, **answers):
        while ways:
            way = ways.pop()
            with _Answers(way) as given:
                answer: Any = ask()
            ways += [[*given.answers[:i], False] for i in range(len(way), len(given.asked))]
            if answer:
                for value, yes in zip(given.asked, given.answers, strict=True):
                    answer = answer & (value.bool() if yes else ~value.bool())
                found = found | answer
    return found


@contextmanager
def masks_as_in_python(errors: list[Exception]) -> Iterator[None]:
    """Has transformers' attention do in a traced model what it does where nothing is traced.

    Args:
        errors: is given what is refused.

    Raises:
        OnlyInParts: a mask that python may leave out is used otherwise than by that attention.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    if masking is None or modeling is None:
        yield
        return
    from tpcompile.ir.hf_internals import remap_positions_for_packed_sequence as remap

    masks = _Masks(errors)
    made = (masking.AttentionMaskInterface._global_mapping, masking.sdpa_mask, masks.make)
    attended = (modeling.AttentionInterface._global_mapping, modeling.sdpa_attention_forward, masks.attend)
    find = masking.find_packed_sequence_indices
    with ExitStack() as stack:
        for table, original, changed in (made, attended):
            names = [name for name, function in table.items() if function is original]
            stack.callback(table.update, dict.fromkeys(names, original))
            table.update(dict.fromkeys(names, changed(original)))
        stack.enter_context(patch.object(masking, find.__name__, masks.find_packed(find)))
        if remap is not None:
            stack.enter_context(patch.object(masking, remap.__name__, masks.remap(remap)))
        stack.enter_context(masks)
        yield
