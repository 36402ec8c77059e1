"""Collectives as native code calls them: operators of our own, which send and wait, one after the other.

Inductor's C++ has no form for torch's own ones, which take process groups of any kind; these take names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .split_matmuls import LAST_PASS, SplitMatmuls, last_pass

_LIBRARY = torch.library.Library("tpcompile", "FRAGMENT")
_C10D = torch.ops._c10d_functional
_WAIT = _C10D.wait_tensor.default


def _awaited(collective: Any) -> Any:
    """An operator that does what one of torch's functional collectives does, and waits for it in python.

    Saved native code runs with python's lock held. Waiting there, it may wait for a thread of gloo's that
    needs the lock to let go of what python has sent before; an operator that python calls waits without it.

    The operator does not read its last argument, ``after``: what has to be sent before this.
    """
    schema = collective._schema
    name = f"awaited_{schema.name.partition('::')[2]}"
    count = len(schema.arguments)

    def awaited(*args: Any) -> Tensor:
        finished: Tensor = _WAIT(collective(*args[:count]))
        return finished

    arguments = str(schema).partition(schema.name)[2].partition(")")[0].replace("Any ", "str ")
    _LIBRARY.define(f"{name}{arguments}, Tensor? after) -> Tensor")
    _LIBRARY.impl(name, awaited, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tpcompile::{name}", lambda *args: collective(*args[:count]), lib=_LIBRARY)
    return getattr(torch.ops.tpcompile, name).default


_AWAITED = {
    collective: _awaited(collective)
    for collective in (
        _C10D.all_reduce.default,
        _C10D.all_gather_into_tensor.default,
        _C10D.reduce_scatter_tensor.default,
        _C10D.all_to_all_single.default,
    )
}


def await_collectives(graph: Graph) -> None:
    """Replaces collectives, and what waits for them, with operators that do both.

    Each depends on the one before it. Inductor orders torch's collectives as the graph has them, but others'
    operators so that memory is spared, which may be another order on a rank with other sizes.
    """
    last: Node | None = None
    for node in list(graph.nodes):
        own = _AWAITED.get(node.target)
        if own is None:
            continue
        node.target, node.args, last = own, (*node.args, last), node
        node.meta.pop("eager_input_vals", None)  # of the operator that it was
        for wait in [user for user in node.users if user.target is _WAIT]:
            if any(user.op == "output" for user in wait.users):
                continue  # results of exported programs keep their names
            wait.replace_all_uses_with(node)
            graph.erase_node(wait)


@dataclass(frozen=True)
class AwaitCollectives:
    """``await_collectives`` as a pass of Inductor's, which keeps on disk what was compiled with it.

    Attributes:
        before: another one of ours, which comes first: torch 2.11 takes a single last pass.
    """

    before: SplitMatmuls | None = None

    def __call__(self, graph: Graph) -> None:
        if self.before is not None:
            self.before(graph)
        await_collectives(graph)

    def uuid(self) -> str:
        """Tells this pass from others; to be changed with what it does."""
        return f"tpcompile await_collectives 1, {'' if self.before is None else self.before.uuid()}"


def awaiting(options: Mapping[str, Any]) -> dict[str, Any]:
    """Torch.compile's options, with this pass after all others of Inductor's."""
    from tpcompile.ir.dynamo_internals import CustomGraphPass

    CustomGraphPass.register(AwaitCollectives)
    own = options["options"]
    asked = own.get(LAST_PASS, last_pass())
    last: Any = AwaitCollectives(asked) if isinstance(asked, SplitMatmuls) else AwaitCollectives()
    if asked and last.before is None:  # the user's
        last = [*(asked if isinstance(asked, list | tuple) else (asked,)), last]
    return {**options, "options": {**own, LAST_PASS: last}}
