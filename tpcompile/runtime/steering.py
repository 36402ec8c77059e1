"""What steers a generation, shared by the ranks: when to stop, as the first says, and callbacks' errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpcompile.errors import TpCompileError
from tpcompile.ranks.agree import share_failure
from tpcompile.ranks.describe import describe_value
from tpcompile.ranks.exchange import exchange

_BY_TOKENS = ("MaxLengthCriteria", "EosTokenCriteria")
"""Criteria of transformers that say the same on all ranks, since tokens are the same."""


class Streamer:
    """A rank's streamer. It is given to all ranks, if any has one, so that all take the same path.

    An error of a streamer is kept until the ranks talk: raised at once, it would leave the others waiting.

    Args:
        own: what this rank was given, or None.
    """

    def __init__(self, own: Any) -> None:
        self.own = own
        self.failure: Exception | None = None

    def put(self, value: Tensor) -> None:
        """Passes tokens on."""
        self._pass_on(lambda: self.own.put(value))

    def end(self) -> None:
        """Passes on that there are no more."""
        self._pass_on(lambda: self.own.end())

    def _pass_on(self, act: Callable[[], Any]) -> None:
        if self.own is not None and self.failure is None:
            try:
                act()
            except Exception as error:
                self.failure = error


class StopAsFirst:
    """Criteria of which the first rank's answer counts: its clock, its tokenizer, its functions.

    Args:
        group: the ranks.
        criteria: evaluated on every rank.
        streamer: whose errors are told, or None.
    """

    def __init__(self, group: dist.ProcessGroup, criteria: Sequence[Any], streamer: Streamer | None) -> None:
        self.group, self.criteria, self.streamer = group, criteria, streamer

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows are done."""
        failure: Exception | None = None if self.streamer is None else self.streamer.failure
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        try:
            for each in self.criteria:
                done = done | each(input_ids, scores, **kwargs)
        except Exception as error:
            failure = failure or error
        answers = [False] * len(input_ids) if failure is not None else done.tolist()
        told = None if failure is None else f"{type(failure).__name__}: {failure}"
        everyone = exchange(self.group, "go on generating", (answers, told))
        if any(error is not None for _, error in everyone):
            share_failure(self.group, "go on generating", failure)
        return torch.tensor(everyone[0][0], dtype=torch.bool, device=input_ids.device)


class SameScores:
    """A user's logits processor: it must say the same on all ranks, and its errors are shared.

    Args:
        group: the ranks.
        own: the processor.
    """

    def __init__(self, group: dist.ProcessGroup, own: Any) -> None:
        self.group, self.own = group, own

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The processed scores."""
        failure, result = None, scores
        try:
            result = self.own(input_ids, scores)
        except Exception as error:
            failure = error
        said = "" if failure is not None else f"{describe_value(input_ids)} {describe_value(result)}"
        everyone = exchange(self.group, "process logits", (said, failure is not None))
        if any(failed for _, failed in everyone):
            share_failure(self.group, "process logits", failure)
        if len({text for text, _ in everyone}) > 1:
            raise TpCompileError(
                f"the ranks' logits processors say different things ({describe_value(self.own)})",
                where="generate(logits_processor=..., prefix_allowed_tokens_fn=...)",
                todo="let it depend on tokens and scores only, not on the rank, the time, or random numbers",
            )
        return result


def steer_criteria(group: dist.ProcessGroup, criteria: Any, streamer: Streamer | None) -> Any:
    """Stopping criteria that stop all ranks at the same token.

    Args:
        group: the ranks.
        criteria: transformers' list of them.
        streamer: of this rank, if any rank has one.
    """
    certain = [each for each in criteria if type(each).__name__ in _BY_TOKENS]
    others = [each for each in criteria if type(each).__name__ not in _BY_TOKENS]
    if not others and streamer is None:
        return criteria
    return type(criteria)([*certain, StopAsFirst(group, others, streamer)])


def steer_processors(group: dist.ProcessGroup, processors: Any, given: Sequence[Any]) -> Any:
    """Logits processors of which those of the user's are compared.

    Args:
        group: the ranks.
        processors: transformers' list of them.
        given: the user's; functions that name allowed tokens are the user's too.
    """

    def steered(each: Any) -> Any:
        own = any(each is one for one in given) or hasattr(each, "_prefix_allowed_tokens_fn")
        simple = len(inspect.signature(each.__call__).parameters) == 2
        return SameScores(group, each) if own and simple else each

    return type(processors)(steered(each) for each in processors)
