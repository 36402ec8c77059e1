"""HTML and SVG by functions that escape whatever they are given."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

_VOID = frozenset({"meta", "input", "link", "br"})


class Markup(str):
    """Text that is HTML already; any other text is escaped where it is put into an element."""


def tag(name: str, /, *inside: object, **attributes: object) -> Markup:
    """An element.

    Args:
        name: its name.
        inside: what is in it: elements (``Markup``), or text.
        attributes: by name, with ``_`` for ``-`` and one at the end after words of python (``class_``);
            True stands for an attribute without a value, None and False for none.
    """
    parts = [name]
    for key, value in attributes.items():
        label = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(label)
        elif value is not None and value is not False:
            parts.append(f'{label}="{html.escape(_number(value))}"')
    if name in _VOID:
        return Markup(f"<{' '.join(parts)}>")
    return Markup(f"<{' '.join(parts)}>{join(*inside)}</{name}>")


def join(*inside: object) -> Markup:
    """Elements and text, one after the other."""
    return Markup("".join(x if isinstance(x, Markup) else html.escape(str(x)) for x in inside))


def table_head(texts: Iterable[str], numbers: Iterable[str] = ()) -> Markup:
    """The head of a table: columns of text, then of numbers."""
    heads = [tag("th", text, scope="col") for text in texts]
    heads += [tag("th", text, scope="col", class_="number") for text in numbers]
    return tag("thead", tag("tr", *heads))


def data(name: str, value: Any) -> Markup:
    """An element that holds data for scripts, which no text in it can end."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")
    return tag("script", Markup(text), type="application/json", id=name)


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
