"""A sharded model as text: its modules, with where their weights are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from torch import nn

from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.planner.print_plan import placement_text


def model_text(model: nn.Module, layout: WeightLayout | None, rank: int) -> str:
    """As torch prints modules, with a line for every weight; layers that look the same are one.

    Args:
        model: the model.
        layout: where its weights are, None before that is decided.
        rank: whose local shapes are shown.
    """
    return _text(model, "", layout, rank)


def _text(module: nn.Module, path: str, layout: WeightLayout | None, rank: int) -> str:
    inside = [*_weights(module, path, layout, rank), *_modules(module, path, layout, rank)]
    name, extra = type(module).__name__, module.extra_repr()
    if not inside:
        return f"{name}({extra})"
    lines = [line for each in ([extra] if extra else []) + inside for line in each.splitlines()]
    return f"{name}(" + "".join(f"\n  {line}" for line in lines) + "\n)"


def _weights(module: nn.Module, path: str, layout: WeightLayout | None, rank: int) -> Iterator[str]:
    for own in (*module._parameters, *module._buffers):
        name = path + own
        if layout is not None and name in layout.params:
            param = layout.params[name]
            held, whole = list(layout.local_shape(name, rank)), list(param.shape)
            of = "" if held == whole else f" of {whole}"
            yield f"{own}: {placement_text(param)} {held}{of}"


def _modules(module: nn.Module, path: str, layout: WeightLayout | None, rank: int) -> Iterator[str]:
    texts = [(name, _text(m, f"{path}{name}.", layout, rank)) for name, m in module.named_children()]
    for text, group in groupby(texts, key=lambda each: (each[1], each[0].isdecimal())):
        names = [name for name, _ in group]
        if len(names) > 1 and text[1]:
            yield f"({names[0]}-{names[-1]}): {len(names)} x {text[0]}"
        else:
            yield from (f"({name}): {text[0]}" for name in names)
