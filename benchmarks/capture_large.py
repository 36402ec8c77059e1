"""Times the truncated capture of large Llamas: ``python -m benchmarks.capture_large``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.plan_large import llama
from tpcompile.capture.repeats import capture_repeated as repeated_layers
from tpcompile.ir.calls import bind_call


def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which now prints its wall and CPU seconds."""

    def call(*args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*args, **kwargs)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"  {what:40} {wall:6.2f} s, {cpu:6.2f} s of CPU")
        return result

    return call


def main() -> None:
    """Prints a line per step."""
    for name in ("find_repeats", "capture", "compare_layers"):
        setattr(repeated_layers, name, timed(name, getattr(repeated_layers, name)))
    for name in ("70b", "405b"):
        model = llama(name).eval()
        print(f"Llama {name}, {model.config.num_hidden_layers} layers")
        bound = bind_call(model, (), {"input_ids": torch.zeros(2, 7, dtype=torch.long), "use_cache": False})
        captured = timed("capture_repeated", repeated_layers.capture_repeated)(model, bound)
        assert captured.blocks is not None, captured.notes
        timed("unroll_captured", repeated_layers.unroll_captured)(captured)


if __name__ == "__main__":
    main()
