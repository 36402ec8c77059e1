"""What transformers' quantizer says of quantised weights in the headers of a checkpoint's files."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.unwrap import taken_apart, wholes
from tpcompile.weights.loading.keep_blocks import kept_by
from tpcompile.weights.shard import unsharded

_TODO = "save_program(folder), or torch.distributed.checkpoint with sharded_state_dict()"


def quantised_metadata(model: Any, original: type) -> dict[str, str]:
    """How weights are put together of the tensors that the files hold; empty for a model without such.

    Args:
        model: a sharded model of transformers.
        original: its class before it was sharded.

    Raises:
        TpCompileError: transformers did not quantise the model, or stores such weights in other tensors.
    """
    apart = taken_apart(model)
    if not apart:
        return {}
    quantizer, where = getattr(model, "hf_quantizer", None), next(iter(apart))
    if quantizer is None:
        raise TpCompileError(
            "transformers did not quantise this weight, and has no form for it in a checkpoint",
            where=where,
            todo=f"quantise it by from_pretrained(..., quantization_config=...); or {_TODO}",
        )
    if (kept := kept_by(quantizer)) is not None:
        if kept.left_out:
            raise TpCompileError(
                "the scales of activations that the checkpoint has beside this weight were not kept",
                where=min(kept.left_out),
                todo=_TODO,
            )
        return {}
    parts = {part for parts in apart.values() for part in parts}
    with unsharded(model, original), refusing("this weight cannot be stored", where=where, todo=_TODO):
        plain = {name: tensor for name, tensor in model.state_dict().items() if name not in parts}
        whole = plain | wholes(model)
        stored, metadata = quantizer.get_state_dict_and_metadata(SimpleNamespace(state_dict=lambda: whole))
    if not parts <= (stored or {}).keys():
        raise TpCompileError(
            f"transformers stores this weight in other tensors than {', '.join(apart[where])}",
            where=where,
            todo=_TODO,
        )
    return {str(key): str(value) for key, value in metadata.items()}
