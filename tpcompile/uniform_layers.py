"""Whether layers that capture left out are wished for, and lie, as the one that stands for them."""

from __future__ import annotations

from collections.abc import Mapping

from .caches import Held
from .capture.program import Captured
from .capture.repeated_layers import ShortCapture
from .layout import WeightLayout
from .pins import Pin, matching


def uneven_layers(
    captured: Captured,
    pins: Mapping[str, Pin],
    layout: WeightLayout | None,
    caches: Mapping[str, Held],
) -> str | None:
    """Why a program must be captured with all of its layers, or None.

    Args:
        captured: a program in which layers may be left out.
        pins: the user's wishes, of which one may be about a single layer.
        layout: where the weights lie already, as an earlier program decided.
        caches: how tensors lie that earlier programs handed out.
    """
    if not isinstance(captured, ShortCapture) or captured.blocks is None:
        return None
    blocks = captured.blocks
    weights = [spec.name for spec in captured.inputs if spec.kind in ("param", "buffer")]
    for kept, name in blocks.left_out(weights):
        if matching(pins, kept) != matching(pins, name):
            return f"the pins ask for other things of {name} than of {kept}"
        if layout is not None:
            one, two = layout.params[kept], layout.params[name]
            if (one.segments, one.packed_dim) != (two.segments, two.packed_dim):
                return f"{name} lies otherwise than {kept}"
    carried = [(twin, leaf) for (twin, _), leaf in blocks.leaves.items()]
    carried += [(captured.outputs[d.output].name, d.name) for d in blocks.results if d.copies]
    for kept, name in carried:
        if caches.get(kept) != caches.get(name):
            return f"{name} lies otherwise than {kept}"
    return None
