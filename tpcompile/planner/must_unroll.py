"""Whether repeated layers are wished for, and placed, as the captured one that stands for those left out."""

from __future__ import annotations

from collections.abc import Mapping

from tpcompile.capture.export.captured import Captured
from tpcompile.capture.held_caches import Held
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.strategies.read_rules import Wish


def uneven_layers(
    captured: Captured,
    wishes: Mapping[str, tuple[Wish, ...]],
    layout: WeightLayout | None,
    caches: Mapping[str, Held],
) -> str | None:
    """Why a program must be planned with all of its layers, or None.

    Args:
        captured: a program in which layers may be left out.
        wishes: what a plan's rules ask of each parameter; one may be about a single layer.
        layout: where the weights already are, as an earlier program decided.
        caches: how tensors are placed that earlier programs handed out.
    """
    blocks = captured.blocks
    if blocks is None:
        return None
    weights = [spec.name for spec in captured.inputs if spec.kind in ("param", "buffer")]
    for kept, name in (*blocks.before(weights), *blocks.left_out(weights)):
        if _asked(wishes, kept) != _asked(wishes, name):
            return f"the plan's rules ask for other things of {name} than of {kept}"
        if layout is not None:
            one, two = layout.params[kept], layout.params[name]
            if (one.segments, one.packed_dim) != (two.segments, two.packed_dim):
                return f"{name} is placed otherwise than {kept}"
    carried = [(twin, leaf) for (twin, _), leaf in blocks.leaves.items()]
    pairs = zip(blocks.results, blocks.outputs, strict=True)
    carried += [(captured.outputs[d.output].name, spec.name) for d, spec in pairs if d.copies]
    for kept, name in carried:
        if caches.get(kept) != caches.get(name):
            return f"{name} is placed otherwise than {kept}"
    return None


def _asked(wishes: Mapping[str, tuple[Wish, ...]], name: str) -> list[tuple[object, str]]:
    return [(wish.want, wish.asked) for wish in wishes.get(name, ())]
