"""The lines of python that made a node of a trace, found quickly.

For every node torch looks up the source of each frame of the stack, a hundred and more of them, and then
drops all but those below ``forward`` that are not its own: a seventh of a capture's time.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import FrameSummary, StackSummary
from types import FrameType
from unittest import mock


@contextmanager
def quick_stack_lines() -> Iterator[None]:
    """Has tracers of fx look up the source of those frames only that they keep."""
    from tpcompile.ir.dynamo_internals import fx_proxy, uninteresting_files

    dull = uninteresting_files()

    @functools.cache
    def summary_of(file: str, line: int, name: str) -> FrameSummary:
        return FrameSummary(file, line, name, lookup_line=False)

    class Stack:
        """Stands in for ``CapturedTraceback``, of which fx asks for the summary of the present stack."""

        @staticmethod
        def extract() -> Stack:
            return Stack()

        def summary(self) -> StackSummary:
            frames, below = [], 0
            frame: FrameType | None = sys._getframe(1)
            while frame is not None:
                code = frame.f_code
                if code.co_filename not in dull:
                    frames.append((code.co_filename, frame.f_lineno, code.co_name))
                if code.co_name == "forward":
                    below = len(frames)
                frame = frame.f_back
            return StackSummary.from_list(summary_of(*at) for at in reversed(frames[:below]))

    with mock.patch.object(fx_proxy, "CapturedTraceback", Stack):
        yield
