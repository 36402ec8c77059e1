"""Takes the paged cache of continuous batching apart: per layer its keys and values, as rows of a pool.

The tensors of all layers are views of one pool and lie over each other; each layer writes and reads rows of
its own, which transformers sees to. So such a tensor may only be written in place: a copy that was put back
later would undo what other layers have written meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tpcompile.errors import TpCompileError

from .form import LayerFacts, LayerForm, Parts

_ROWS = "_in_pool"
KEYS, VALUES = f"keys{_ROWS}", f"values{_ROWS}"


class PagedLayer:
    """The rows of one layer.

    Attributes:
        kind: the type of its attention, which transformers has an allocator of rows for.
        index: which of the lists of rows to write and to read is its.
        sentinel: the row that stands for a token of the call itself in such a list.
        keys: of shape [rows, key heads, features].
        values: likewise.
    """

    def __init__(self, kind: str, index: int, sentinel: int) -> None:
        self.kind, self.index, self.sentinel = kind, index, sentinel
        self.keys: Any = None
        self.values: Any = None

    @property
    def facts(self) -> tuple[str, int, int]:
        """All but the tensors."""
        return self.kind, self.index, self.sentinel

    def allocator(self, number: int) -> Any:
        """What transformers writes and reads the rows with.

        Args:
            number: the layer's in the model.
        """
        from tpcompile.ir.hf_internals import ATTN_TYPE_TO_ALLOCATOR

        kind = ATTN_TYPE_TO_ALLOCATOR[self.kind]
        made = kind.__new__(kind)
        made.index, made.sentinel_index = self.index, self.sentinel
        made._kv_token_views = {number: (self.keys, self.values)}
        return made


class PagedCache:
    """The layers of transformers' paged cache, in the form in which other caches have theirs.

    Args:
        layers: of the model, all of them in their order.
    """

    def __init__(self, layers: Sequence[PagedLayer]) -> None:
        self.layers = list(layers)

    @classmethod
    def of(cls, cache: Any) -> PagedCache:
        """Those of transformers' own cache, whose tensors these are."""
        layers = []
        for number, allocator in sorted(cache.layer_to_allocator.items()):
            layer = PagedLayer(allocator.layer_type, allocator.index, allocator.sentinel_index)
            layer.keys, layer.values = allocator._kv_token_views[number]
            layers.append(layer)
        return cls(layers)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        """Writes the keys and values of tokens, and gives all that these attend to: transformers' own method.

        Args:
            keys: of shape [1, key heads, tokens, features].
            values: likewise.
            layer_idx: the layer.
            kwargs: with the rows to write and to read; those for other layers are taken out.
        """
        from tpcompile.ir.hf_internals import PagedAttentionCache

        cache = PagedAttentionCache.__new__(PagedAttentionCache)
        cache.layer_to_allocator = {layer_idx: self.layers[layer_idx].allocator(layer_idx)}
        return cache.update(keys, values, layer_idx, kwargs)


def is_pooled(name: str) -> bool:
    """Whether a leaf of this name is a layer's rows of a pool."""
    return _ROWS in name


def _put(layer: PagedLayer, parts: Parts, _: LayerFacts) -> None:
    if layer.keys is not None and (layer.keys is not parts[KEYS] or layer.values is not parts[VALUES]):
        raise TpCompileError(
            "the rows of a paged cache cannot be exchanged for others",
            where="cache",
            todo="use generate_batch, which gives each rank its own",
        )
    layer.keys, layer.values = parts[KEYS], parts[VALUES]


PAGED_FORM = LayerForm(
    take=lambda layer: ({KEYS: layer.keys, VALUES: layer.values}, layer.facts),
    make=lambda facts, parts: PagedLayer(*facts),  # type: ignore[arg-type]  # as ``facts`` gave them
    put=_put,
)
