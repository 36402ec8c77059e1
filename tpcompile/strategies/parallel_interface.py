"""The mapping from the names in a plan to strategies, as transformers' ``ParallelInterface`` is one."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Annotated, Any, ClassVar

from tpcompile.errors import TpCompileError
from tpcompile.ir.check import Must, checked, short

from .custom.tensor_parallel_layer import METHODS
from .strategy import Strategy

Name = Annotated[str, Must("a name", bool)]


class ParallelInterface(MutableMapping[str, Any]):
    """Strategies by name.

    A value is a ``Strategy`` of ours, or a custom one: a class, or an instance, that knows how to
    partition a parameter and to prepare inputs and outputs. Names registered on the class are known
    everywhere; what is set on an instance is known to that instance only, and comes first.
    """

    _global_mapping: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        self._local_mapping: dict[str, Any] = {}

    @classmethod
    @checked
    def register(cls, name: Name, strategy: Any) -> None:
        """Makes a strategy known under a name, in every plan from now on.

        Raises:
            TpCompileError: it is neither a ``Strategy`` nor a custom one, or the name is none.
        """
        cls._global_mapping[name] = _checked(name, strategy)

    @classmethod
    @checked
    def register_strategy(cls, name: Name, strategy: Any) -> None:
        """``register``, under the name that transformers' document uses."""
        cls.register(name, strategy)

    def __getitem__(self, name: str) -> Any:
        return self._local_mapping[name] if name in self._local_mapping else self._global_mapping[name]

    @checked
    def __setitem__(self, name: Name, strategy: Any) -> None:
        self._local_mapping[name] = _checked(name, strategy)

    def __delitem__(self, name: str) -> None:
        del self._local_mapping[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._global_mapping, **self._local_mapping})

    def __len__(self) -> int:
        return len({**self._global_mapping, **self._local_mapping})


def _checked(name: str, strategy: Any) -> Any:
    if not isinstance(strategy, Strategy) and not any(hasattr(strategy, method) for method in METHODS):
        raise TpCompileError(
            f"{short(strategy)} is not a strategy",
            where=f"strategy {name!r}",
            todo="give a tpcompile.Strategy, or a class that inherits from tpcompile.TensorParallelLayer",
        )
    return strategy


_OURS = {
    **dict.fromkeys(("colwise", "local_colwise", "packed_colwise", "local_packed_colwise"), Strategy("out")),
    **dict.fromkeys(("colwise_gather_output", "colwise_rep"), Strategy("out", whole_result=True)),
    **dict.fromkeys(("rowwise", "local_rowwise"), Strategy("in", whole_result=True)),
    **dict.fromkeys(
        ("rowwise_split_input", "rowwise_rep"), Strategy("in", whole_input=True, whole_result=True)
    ),
    **dict.fromkeys(("packed_rowwise", "local_packed_rowwise"), Strategy("in")),
    "embedding_rowwise": Strategy("rows", whole_result=True),
    "embedding_colwise": Strategy("columns", whole_result=True),
    # Gradients of whole parameters are right anyway: how they are reduced follows from the graph.
    **dict.fromkeys(("replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj"), Strategy("whole")),
    "sequence_parallel": Strategy("whole", sequence=True),
    **dict.fromkeys(("ep", "local", "grouped_gemm", "ep_dispatch_experts"), Strategy("experts")),
    # How activations travel follows from the placements of weights.
    **dict.fromkeys(("gather", "all_reduce", "moe_tp_experts", "moe_identity_expert"), Strategy("any")),
    **dict.fromkeys(("ep_router", "local_params", "megamoe_router", "megamoe_experts"), Strategy("any")),
}
for _name, _strategy in _OURS.items():
    ParallelInterface.register(_name, _strategy)

STRATEGIES = ParallelInterface()
"""What plans are read with."""
