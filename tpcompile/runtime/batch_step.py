"""A step of continuous batching, as transformers runs it and as programs take it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from tpcompile.capture.caches.paged import PagedCache, PagedLayer
from tpcompile.ir.calls import flatten_call
from tpcompile.ranks.turns import own_turn

from .add_program import add_program
from .runtime import Runtime

_FEWEST = 2
"""So many rows of logits are computed at least: sizes of 0 and 1 would be programs of their own."""
_NOT_READ = ("max_length_q", "logits_processor_args", "logits_indices")
"""What torch's attention, and so the model, has no use for."""


class BatchStep:
    """A sharded model, as transformers calls it for a step."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._seen: set[tuple[bool, ...]] = set()

    def _supports_logits_to_keep(self) -> bool:
        supports: bool = self._model._supports_logits_to_keep()
        return supports

    def __call__(self, **batch: Any) -> Any:
        call = _call_of(batch)
        kept = batch.get("logits_to_keep")
        with _stepping(self._model._tp):
            self._see(call)
            result = self._model(**call)
        if kept is not None:
            result.logits = result.logits[:, : len(kept)]
        return result

    def _see(self, call: dict[str, Any]) -> None:
        """Captures the first call of its kind with sizes that have nothing to do with each other.

        As many tokens as requests, say, would be a program for that alone.
        """
        kind = (call["input_ids"].shape[1] > 1, *(len(rows) > 0 for rows in call["read_index"]))
        if kind in self._seen:
            return
        runtime: Runtime = self._model._tp
        bound = runtime.bind((), call)
        leaves, spec = flatten_call(bound)
        if runtime.find(tuple(bound), leaves, spec, self._model.training) is None:
            add_program(runtime, self._model, runtime.bind((), _typical(call)))
        self._seen.add(kind)


@contextmanager
def _stepping(runtime: Runtime) -> Iterator[None]:
    """For a step: programs run as they are, since compilers take tensors to lie apart."""
    before = runtime.compile_options, runtime.generating
    runtime.compile_options, runtime.generating = None, True
    try:
        with own_turn(runtime.group_name):
            yield
    finally:
        runtime.compile_options, runtime.generating = before


def _call_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a step: without what is not read, and with the cache in a form that programs know.

    Numbers that are not read would be programs of their own.
    """
    call = {name: value for name, value in batch.items() if name not in _NOT_READ}
    call["cache"] = PagedCache.of(batch["cache"])
    call["max_length_k"] = dict.fromkeys(batch["max_length_k"])
    if (kept := batch.get("logits_to_keep")) is not None:
        call["logits_to_keep"] = pad(kept, (0, max(_FEWEST - len(kept), 0)))
    return call


def _typical(call: Mapping[str, Any]) -> dict[str, Any]:
    """A step like another one, without values, with sizes that differ from each other; 0 and 1 stay."""
    layers = call["cache"].layers
    tokens = 7 if call["input_ids"].shape[1] > 1 else 1
    reads = [11 + 2 * i if len(rows) else 0 for i, rows in enumerate(call["read_index"])]
    attended = {layer.kind: reads[layer.index] or tokens for layer in layers}
    masks = call["attention_mask"]
    like: dict[str, Any] = {
        "cache": PagedCache([_rows_like(layer, 100 + 2 * place) for place, layer in enumerate(layers)]),
        "read_index": [one.new_zeros(size) for one, size in zip(call["read_index"], reads, strict=True)],
        "write_index": [one.new_zeros(tokens) for one in call["write_index"]],
        "cu_seq_lens_k": {kind: one.new_zeros(4) for kind, one in call["cu_seq_lens_k"].items()},
        "cu_seq_lens_q": call["cu_seq_lens_q"].new_zeros(4),
    }
    like |= {name: call[name].new_zeros(1, tokens) for name in ("input_ids", "position_ids")}
    if isinstance(masks, Tensor):  # all layers attend alike
        like["attention_mask"] = masks.new_zeros(1, 1, tokens, *attended.values())
    elif masks is not None:
        like["attention_mask"] = {k: m.new_zeros(1, 1, tokens, attended[k]) for k, m in masks.items()}
    if "logits_to_keep" in call:
        like["logits_to_keep"] = call["logits_to_keep"].new_zeros(5)
    return {**call, **like}


def _rows_like(layer: PagedLayer, count: int) -> PagedLayer:
    made = PagedLayer(*layer.facts)
    made.keys = layer.keys.new_empty((count, *layer.keys.shape[1:]), device="meta")
    made.values = layer.values.new_empty((count + 1, *layer.values.shape[1:]), device="meta")
    return made
