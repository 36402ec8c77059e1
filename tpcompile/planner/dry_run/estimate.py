"""What one step of a model takes on a rank, as plain data: memory, time, what is sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tpcompile.ir.units import size_text, time_text

Mode = Literal["train", "prefill", "decode"]


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds most, at the moment of a step when most is alive. They add up to ``peak``.

    Attributes:
        weights: parameters and buffers.
        gradients: gradients that are there at that moment (as many bytes as the trained weights at the end
            of backward).
        optimizer: its states.
        cache: K/V cache and recurrent states, behind the step.
        activations: everything else that the program has made: what backward needs, results, and what is
            computed at that moment.
        logits: bytes of the step's largest result, which is part of the activations where it is alive.
        cache_per_token: what a token of one text adds to the cache; None where no token was added (training,
            prefill), so that nobody has seen it.
    """

    weights: float
    gradients: float
    optimizer: float
    cache: float
    activations: float
    logits: float
    cache_per_token: float | None = None

    @property
    def peak(self) -> float:
        """Bytes of all together."""
        return self.weights + self.gradients + self.optimizer + self.cache + self.activations


@dataclass(frozen=True)
class Time:
    """Seconds of a step on one rank, by what each operator waits for. They add up to ``seconds``.

    Attributes:
        compute: in operators that arithmetic bounds.
        memory: in those that reading and writing memory bounds,
        launch: in those that take no longer than a call takes at least.
        communication: in collectives.
        could_overlap: how much of the step could go, if every collective ran as soon as what it sends is
            there, and every operator as soon as the device is free and its operands are there.
        elementwise: how much of ``memory`` and ``launch`` is in operators that a compiler would fuse.
    """

    compute: float
    memory: float
    launch: float
    communication: float
    could_overlap: float
    elementwise: float

    @property
    def seconds(self) -> float:
        """One thing after the other."""
        return self.compute + self.memory + self.launch + self.communication


@dataclass(frozen=True)
class Sends:
    """Collectives of one kind and size in a step.

    Attributes:
        kind: ``all_reduce``, ``all_gather``, ``reduce_scatter`` or ``all_to_all``.
        count: how many.
        bytes: of the whole value, each.
        ranks: how many take part.
    """

    kind: str
    count: int
    bytes: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in all of them, in a ring."""
        passes = {"all_reduce": 2.0, "all_to_all": 1 / self.ranks}.get(self.kind, 1.0)
        return self.count * passes * (self.ranks - 1) / self.ranks * self.bytes


@dataclass(frozen=True)
class Estimate:
    """What one step takes on each of some ranks.

    Attributes:
        mode: a step of training, a prompt, or one more token.
        ranks: how many share the model.
        batch: texts in the step, and
        seq: tokens of each (``decode``: tokens in the cache before it); None for a model that is not given
            tokens.
        device: the name of the device.
        memory: bytes of a rank.
        time: seconds of the step.
        collectives: what the step sends, backward included.
        operations: arithmetic of one rank in the step.
        capacity: bytes that the device has; None where that is not known.
        rests_on: what the numbers rest on, a sentence each.
    """

    mode: Mode
    ranks: int
    batch: int | None
    seq: int | None
    device: str
    memory: Memory
    time: Time
    collectives: tuple[Sends, ...]
    operations: float
    capacity: float | None
    rests_on: tuple[str, ...]

    @property
    def tokens(self) -> int | None:
        """Tokens that go through the model in the step."""
        if self.batch is None or self.seq is None:
            return None
        return self.batch if self.mode == "decode" else self.batch * self.seq

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of all ranks together, nothing overlapping; None if a step takes no time."""
        return self.tokens / self.time.seconds if self.tokens and self.time.seconds else None

    @property
    def device_seconds_per_token(self) -> float | None:
        """Ranks times seconds for a token: what it costs, in time of one device."""
        return None if self.tokens is None else self.ranks * self.time.seconds / self.tokens

    def to_json(self) -> dict[str, Any]:
        """Plain data, with what follows from it."""
        data = asdict(self)
        data["memory"]["peak"] = self.memory.peak
        data["time"]["seconds"] = self.time.seconds
        names = ("tokens", "tokens_per_second", "device_seconds_per_token")
        return data | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        size = "" if self.batch is None else f", {self.batch} x {self.seq} tokens"
        where = " in the cache" if self.mode == "decode" and size else ""
        yield f"{self.mode} on {self.ranks} ranks ({self.device}){size}{where}"
        yield ""
        yield "memory of a rank, when most is in use"
        memory = asdict(self.memory)
        for name in ("weights", "gradients", "optimizer", "cache", "activations"):
            if memory[name]:
                yield f"  {name:<14} {size_text(memory[name]):>12}"
        of = "" if self.capacity is None else f" of {size_text(self.capacity)}"
        yield f"  {'together':<14} {size_text(self.memory.peak):>12}{of}"
        yield f"  largest result {size_text(self.memory.logits):>12}, among the activations while it lives"
        if self.memory.cache_per_token is not None:
            yield f"  cache grows by {size_text(self.memory.cache_per_token):>12} per token of a text"
        yield ""
        yield f"time of a step: {time_text(self.time.seconds)}, {self.operations:.3g} operations on a rank"
        for name in ("compute", "memory", "launch", "communication"):
            yield f"  {name:<14} {time_text(getattr(self.time, name)):>12}"
        yield f"  could overlap  {time_text(self.time.could_overlap):>12}"
        yield f"  elementwise    {time_text(self.time.elementwise):>12}, which a compiler would fuse"
        if self.tokens_per_second is not None:
            yield f"  {self.tokens_per_second:,.1f} tokens per second"
        yield ""
        yield from (
            f"{s.count} x {s.kind} of {size_text(s.bytes)} over {s.ranks} ranks" for s in self.collectives
        )
        yield from (f"rests on: {line}" for line in self.rests_on)
