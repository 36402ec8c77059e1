"""Random numbers that operators of the user's draw for themselves, without torch's tag for that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import OpOverload
from tpcompile.lowering.lower_randomness import SEED, UNIFORM

_KNOWN = ("aten", "prims", "_c10d_functional", "tpcompile")


class Draws:
    """What may draw in a program.

    Args:
        graph: the program.

    Attributes:
        operator: the first operator of which nobody knows what it does inside; ``""``: there is none.
    """

    def __init__(self, graph: Graph) -> None:
        named = (node.target for node in graph.nodes if isinstance(node.target, OpOverload))
        self.operator = next((str(op) for op in named if op.namespace not in _KNOWN), "")
        self._seeded = bool(graph.find_nodes(op="call_function", target=UNIFORM))

    def begin(self, device: str) -> Generators | None:
        """Torch's generators before the program runs on a device.

        None where nobody can look: under a compiler, and while a CUDA graph is captured, where a generator's
        state is not to be had.
        """
        capturing = device == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing or torch.compiler.is_compiling():
            return None
        return Generators(self.operator, device, self._seeded)


class Generators:
    """torch's generators before a program runs.

    Args:
        operator: what may draw in it.
        device: where it runs.
        seeded: whether the program draws a seed for random numbers of its own.
    """

    def __init__(self, operator: str, device: str, seeded: bool) -> None:
        self._operator, self._seeded = operator, device if seeded else ""
        self._modules: dict[str, Any] = {"cpu": torch}
        if device not in ("cpu", "meta"):
            self._modules[device] = torch.get_device_module(device)
        self._before = {name: module.get_rng_state() for name, module in self._modules.items()}

    def refuse_draws(self) -> None:
        """Refuses a program that has drawn more than a seed; the generators are put back.

        Raises:
            TpCompileError: it has.
        """
        if all(torch.equal(m.get_rng_state(), self._expected(name)) for name, m in self._modules.items()):
            return
        for name, module in self._modules.items():
            module.set_rng_state(self._before[name])
        raise TpCompileError(
            "an operator draws random numbers, of which every rank would have its own",
            where=self._operator,
            todo="draw them with dropout, rand or randn outside of it, and give them to it as a tensor",
        )

    def _expected(self, name: str) -> Tensor:
        if name != self._seeded:
            return self._before[name]
        generator = torch.Generator(name)
        generator.set_state(self._before[name])
        torch.randint(0, SEED, [2], generator=generator, device=name)
        return generator.get_state()
