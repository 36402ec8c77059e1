"""Turns a failed export into an error that says where in the model, and what to do."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tpcompile.errors import CannotCapture, OnlyInParts

_OUTSIDE = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))
_DATA_DEPENDENT = (
    "GuardOnDataDependentSymNode",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
)
_LONGEST = 600

_ADVICE = (
    (
        ("data-dependent", "DataDependent", "unbacked", ".item()", "nonzero"),
        "make the branch or size not depend on tensor values (torch.where, torch.cond, a fixed size), or "
        "pass the value as a python argument",
    ),
    (
        ("Unsupported input type", "pytree"),
        "pass tensors and python values, or register the type as pytree",
    ),
    (("specializ", "Constraint"), "capture with dynamic=False, or leave fewer dimensions open"),
    (
        ("Unable to cast NotImplemented to Tensor", "attempting to run unimplemented operator"),
        "the class of a quantised weight has no such operation (experts in one tensor, as a rule): quantise "
        "linear layers only",
    ),
    (("Boolean value of Tensor", "non-Fake"), "keep tensors of the model in parameters or buffers"),
)


def is_data_dependent(error: BaseException) -> bool:
    """Tell whether the model's control flow needs tensor values: no choice of open dimensions helps then."""
    return any(type(e).__name__ in _DATA_DEPENDENT for e in _chain(error))


def explain_failure(
    error: BaseException, model: nn.Module, names: Sequence[str], tried: Sequence[str]
) -> CannotCapture:
    """Return an error that names the innermost module and source line of the user's code."""
    text = _first_lines(str(error))
    for index, name in enumerate(names):
        text = text.replace(f"leaves[{index}]", name).replace(f"leaves_{index}.", f"{name}.")
    said = " ".join(f"{type(e).__name__} {e}" for e in _chain(error))
    advice = next((todo for words, todo in _ADVICE if any(w in said for w in words)), "")
    what = f"the model's forward cannot be captured: {type(error).__name__}: {text}"
    if len(tried) > 1:
        what += f" (tried with {', then '.join(tried)})"
    advice = advice or "try model.eval() or other example arguments"
    kind = OnlyInParts if is_data_dependent(error) else CannotCapture
    return kind(what, where=_place(error, model), todo=f"{advice}; or parallelize(compose=True)")


def here() -> str:
    """``file:line in function: source`` of the model's code that runs now."""
    for frame, line in traceback.walk_stack(None):
        file = frame.f_code.co_filename
        if not file.startswith((*_OUTSIDE, "<")):
            return f"{file}:{line} in {frame.f_code.co_name}: {linecache.getline(file, line).strip()}"
    return "forward"


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _first_lines(text: str) -> str:
    for noise in ("Caused by:", "For more information, run with", "  (Size-like"):
        text = text.split(noise)[0]
    kept = " ".join(line.strip() for line in text.strip().splitlines()[:6] if line.strip())
    return kept if len(kept) <= _LONGEST else kept[:_LONGEST] + " ..."


def _place(error: BaseException, model: nn.Module) -> str:
    """Return ``module.path (Class), file:line in function: source`` for the innermost user frame.

    Without the line, if there is nothing but modules of torch.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    best = innermost = ""
    for link in reversed(_chain(error)):
        owner = ""
        for frame, line in traceback.walk_tb(link.__traceback__):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in paths:
                innermost = f"{paths[id(module)] or 'the model'} ({type(module).__name__})"
                owner = f"{innermost}, "
            file = frame.f_code.co_filename
            if owner and not file.startswith(_OUTSIDE) and not file.startswith("<"):
                source = linecache.getline(file, line).strip()
                best = f"{owner}{file}:{line} in {frame.f_code.co_name}: {source}"
    return best or innermost or type(model).__name__
