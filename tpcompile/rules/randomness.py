"""Which calls draw random numbers.

Ranks that draw for themselves would disagree about whole values, and ranks that share a generator would
draw the same mask for different parts. So such calls are never divided; the pass ``expand-randomness``
replaces those that it knows, and a program that has others is refused.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.nodes import module_path, option
from tpcompile.ir.torch_internals import OpOverload

# Options that turn an operator's randomness on, each with the value at which it is off.
_SWITCHES = (("train", False), ("training", False), ("p", 0.0), ("dropout_p", 0.0), ("dropout", 0.0))


def random_nodes(graph: Graph) -> list[Node]:
    """The calls of a graph that draw random numbers, in order."""
    return [node for node in graph.nodes if is_random(node)]


def is_random(node: Node) -> bool:
    """Whether a call draws random numbers (a dropout outside of training does not)."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    declared = {argument.name for argument in node.target._schema.arguments}
    if torch.Tag.nondeterministic_seeded not in node.target.tags:  # which kernels of others do not have
        return "dropout_p" in declared and option(node, "dropout_p", 0.0) != 0
    return not any(name in declared and option(node, name) == off for name, off in _SWITCHES)


def refuse_randomness(graph: Graph) -> None:
    """Refuses a program with random numbers that no pass has made functions of their place.

    Raises:
        TpCompileError: it draws some.
    """
    if nodes := random_nodes(graph):
        raise TpCompileError(
            f"the model draws random numbers in a way that is not supported ({nodes[0].target})",
            where=module_path(nodes[0]) or nodes[0].name,
            todo="draw with dropout, bernoulli, rand, randn or rand_like; or call model.eval()",
        )
