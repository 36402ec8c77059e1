"""Whether something is traced is answered for a model's python as where it runs as python.

What it does otherwise while it is traced would be what programs compute, and nobody could tell. Libraries are
answered truly: torch has to know, and transformers goes other ways to the same numbers, but for masks. Its
models are not where they ask whether they are exported: what they do instead is for targets that have few
operators, such as a loop over 64 rows for one triangular solve, which took most of a minute to capture.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch

from .kernel_masks import kernel_masks
from .look_inside import is_librarys, module_of
from .masks_as_in_python import masks_as_in_python

_HAND_ON = {
    *("torch._utils", "torch._dynamo.external_utils", "typing_extensions"),
    "transformers.utils.import_utils",
}
_MODELS, _ASKS_EXPORT = "transformers.models.", "is_torchdynamo_exporting"
_QUESTIONS: tuple[tuple[Any, str], ...] = (
    (torch.compiler.is_compiling, "_is_compiling_flag"),
    (torch.compiler.is_exporting, "_is_exporting_flag"),
)


@contextmanager
def as_untraced(errors: list[Exception]) -> Iterator[None]:
    """Has a model that is traced inside of the block go the ways that it goes where nothing is.

    Args:
        errors: is given what is refused.

    Raises:
        CannotCapture: which way that is, is not known.
    """
    with unseen_tracing(), masks_as_in_python(errors), kernel_masks():
        yield


@contextmanager
def unseen_tracing() -> Iterator[None]:
    """Lets the model's own python find inside of the block that nothing is traced.

    The functions are changed themselves: a model may have imported them by name.
    """
    with ExitStack() as stack:
        for question, flag in _QUESTIONS:
            stack.callback(setattr, question, "__code__", question.__code__)
            stack.callback(setattr, question, "__kwdefaults__", question.__kwdefaults__)
            question.__kwdefaults__ = {"_answer": _answering(flag)}
            question.__code__ = _ask.__code__
        utils: Any = sys.modules.get("transformers.utils.import_utils")
        if utils is not None:
            stack.enter_context(patch.object(utils, "is_fake_tensor", _asking(utils.is_fake_tensor)))
        yield


@contextmanager
def plain_modules() -> Iterator[None]:
    """Has python find, in the block, the very modules that the model has.

    Where one module has several names, torch.export lends the model a stand-in for each: of a class of its
    own, so that ``type(layer) is nn.Linear`` was answered with no, and another object than under the other
    name. Without them what runs in a shared module is named after its first name.
    """
    from tpcompile.ir.dynamo_internals import ModuleStackTracer

    never = property(lambda tracer: False, lambda tracer, value: None)
    with patch.object(ModuleStackTracer, "enable_attr_proxy", never, create=True):
        yield


def _ask(*, _answer: Callable[[], bool]) -> bool:
    return _answer()


def _answering(flag: str) -> Callable[[], bool]:
    return lambda: getattr(torch.compiler, flag) and not _asks_itself(sys._getframe(2))


def _asking(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: original(value) and not _asks_itself(sys._getframe(1))


def _asks_itself(frame: FrameType | None) -> bool:
    """Whether it is a model that asks, and not a library."""
    while frame is not None and module_of(frame) in _HAND_ON:
        frame = frame.f_back
    if frame is None:
        return False
    if module_of(frame).startswith(_MODELS):
        return _ASKS_EXPORT in frame.f_code.co_names  # maybe both questions in one condition
    return not is_librarys(module_of(frame), "transformers", "tpcompile")
