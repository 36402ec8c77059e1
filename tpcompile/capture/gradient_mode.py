"""The grad mode that a call is captured in: one program serves both, unless python asks which one it is."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .export.captured import Captured


def in_gradient_mode(capture: Callable[[], Captured]) -> Captured:
    """Captures a call such that gradients come out: the program also serves calls without them.

    But if python has asked for the mode, a call without gradients is captured as it is.

    Args:
        capture: captures the call.
    """
    on = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        found = capture()
    if found.asks_gradients and not on:
        with torch.inference_mode(False), torch.no_grad():
            found = capture()
    return found
