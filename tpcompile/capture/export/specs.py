"""The inputs and outputs of a captured graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

InputKind = Literal["param", "buffer", "constant", "attribute", "user"]
OutputKind = Literal["user", "state", "attribute", "check", "buffer_mutation"]
Extent = int | str
"""The size of one dimension: a number, or an expression over the program's symbols such as ``s3 + 1``."""


@dataclass(frozen=True)
class InputSpec:
    """One placeholder of the graph.

    Attributes:
        kind: where its value comes from.
        name: original fully qualified name (param, buffer, a tensor that is a plain attribute of a module
            and is fetched anew for every call), a made-up name (constant), or the
            pytree key path of the argument, such as ``input_ids`` or ``inputs[0]`` (user).
        value: the python value that was baked into the graph, for a user input that is not a tensor.
        extents: the sizes that a user tensor must have; None if the input is not a tensor.
        saved: whether a state dict has it (buffers that are not persistent are left out).
    """

    kind: InputKind
    name: str
    value: Any = None
    extents: tuple[Extent, ...] | None = None
    saved: bool = True


@dataclass(frozen=True)
class OutputSpec:
    """One element of the graph's flat output tuple.

    Attributes:
        kind: a result for the user, the state that the call leaves in a cache that it was given, what it
            leaves in an attribute, what must be true of values, or the new value of a mutated buffer.
        name: the mutated buffer's fully qualified name, or the pytree key path of the result, or of the
            cache's tensor in the arguments, or where the model checks.
        value: the python value, for a result that is not a tensor (its graph output is that constant), or a
            ``GivenCache`` where a cache of the caller's is returned (its graph output is None); what a
            check says.
        divided: the result belongs to a cache, which stays divided: it is handed back as it is.
        in_place: the model has written this state into the tensor that it was given.
        carried: without a compiler, the buffer would keep this value's gradient for the next call.
    """

    kind: OutputKind
    name: str
    value: Any = None
    divided: bool = False
    in_place: bool = False
    carried: bool = False
