"""Generating on several ranks at once: they make the same call, draw the same tokens, and stop together.

The loop, the sampling and the cache objects are transformers' own. Every rank runs them on whole logits,
which are bitwise equal on all ranks, so that equal calls choose equal tokens.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpcompile.capture.caches.register import is_cache
from tpcompile.errors import TpCompileError
from tpcompile.ranks.agree import alike, compare, from_first, share_failure
from tpcompile.ranks.describe import describe_value
from tpcompile.ranks.exchange import exchange
from tpcompile.ranks.turns import own_turn

from .steering import Streamer, steer_criteria, steer_processors

EQUAL = "see that the ranks have equal hardware, libraries and settings, or report this"
"""What to do where equal calls have chosen other tokens."""
_REFUSED = ("offloaded", "quantized", "paged")


class _SaysWhatItTakes:
    """A method with the signature of the model's own: transformers looks there for what may be given."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __get__(self, model: Any, kind: Any = None) -> Any:
        if model is None:
            return self.method
        own = getattr(super(self.owner, model), self.name)
        return functools.wraps(own)(functools.partial(self.method, model))


class GeneratesAlike:
    """Mixed into the class of what generates on several ranks, before transformers' own.

    Its ``_tp`` has ``group`` and ``group_name``, the ranks; ``steering``, the streamer and the user's logits
    processors of the generation that runs; and ``generating``, whether one does.
    """

    _tp: Any
    generation_config: Any

    def _where(self) -> torch.device:
        """The device on which tokens are drawn."""
        raise NotImplementedError

    def _generate(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with own_turn(self._tp.group_name):
            return self._generate_in_turn(original, args, kwargs)

    def _generate_in_turn(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        group = self._tp.group
        call = arguments(original, args, kwargs)
        own = call.pop("streamer", None)
        with alike(group, "generate", call_lines(self, call)):
            self._refuse(call)
            streamer = _shared_streamer(group, own)
            if self._may_sample(call):
                share_random_state(group, self._where())
            before = self._tp.steering, self._tp.generating
            self._tp.steering, self._tp.generating = (streamer, call.get("logits_processor") or ()), True
            try:
                result = original(**call, **({} if streamer is None else {"streamer": streamer}))
            finally:
                self._tp.steering, self._tp.generating = before
            if streamer is not None:
                share_failure(group, "stream tokens", streamer.failure)
            tokens = describe_value(getattr(result, "sequences", result), floats=False)
            compare(group, "generated tokens", [tokens], EQUAL)
            return result

    @_SaysWhatItTakes
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, without what ``generate`` passes on although it is not for the model.

        transformers goes through a set to make one mask for each type of layers: ranks would have them in
        different orders.
        """
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        for name in ("tokenizer", "assistant_tokenizer"):
            inputs.pop(name, None)
        for name, value in inputs.items():
            if name.endswith("attention_mask") and isinstance(value, dict):
                inputs[name] = dict(sorted(value.items()))
        return inputs

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(*args, **kwargs)  # type: ignore[misc]
        group, (streamer, _) = self._tp.group, self._tp.steering
        return criteria if group is None else steer_criteria(group, criteria, streamer)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        group, (_, given) = self._tp.group, self._tp.steering
        return processors if group is None else steer_processors(group, processors, given)

    def _get_static_cache_init_shape(self) -> None:
        """A static cache is made by the first program that writes to it: with this rank's heads."""

    def _refuse(self, call: Mapping[str, Any]) -> None:
        configs = (call.get("generation_config"), self.generation_config)
        kinds = [call.get("cache_implementation"), *(_get(c, "cache_implementation") for c in configs)]
        kind = next((k for k in kinds if k is not None), "")
        if any(word in kind for word in _REFUSED):
            raise TpCompileError(
                f"a sharded model cannot use a cache of the kind {kind!r}",
                where="generate(cache_implementation=...)",
                todo='use "dynamic" or "static", or pass use_cache=False',
            )
        cache = call.get("past_key_values")
        if cache is not None and not is_cache(cache):
            raise TpCompileError(
                f"a {type(cache).__name__} cannot be taken apart, and would go stale",
                where="generate(past_key_values=...)",
                todo="give a DynamicCache or a StaticCache, or pass use_cache=False",
            )

    def _may_sample(self, call: Mapping[str, Any]) -> bool:
        configs = (call.get("generation_config"), self.generation_config)
        asked = call.get("do_sample")
        return bool(asked) if asked is not None else any(_get(c, "do_sample") for c in configs)


class WithoutBatching:
    """Mixed into the class of what generates, but not by continuous batching."""

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
            TpCompileError: always.
        """
        raise TpCompileError(
            "continuous batching is for a sharded model as it is: not in a model of PEFT, nor when it was "
            "saved",
            where=f"generate_batch of {type(self).__name__}",
            todo="use generate with a batch of prompts",
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch


def share_random_state(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Gives every rank the first rank's random state, of the CPU and of the device."""
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device.type)

    def state() -> list[Tensor]:
        return [torch.get_rng_state()] + ([] if module is None else [module.get_rng_state(device)])

    states = from_first(group, state, "share its random state")
    torch.set_rng_state(states[0])
    if module is not None:
        module.set_rng_state(states[1], device)


def _shared_streamer(group: dist.ProcessGroup | None, own: Any) -> Streamer | None:
    """A streamer for every rank, if any has one."""
    given = [own is not None] if group is None else exchange(group, "tell of streamers", own is not None)
    return Streamer(own) if any(given) else None


def arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; models call the first ones of ``generate`` as they like."""
    signature = inspect.signature(function)
    found: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        further = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        found |= value if further else {name: value}
    return found


def call_lines(model: Any, call: Mapping[str, Any]) -> list[str]:
    """What steers a generation as text: the arguments of the call, and what stands in for those not given."""
    return [*_describe(call), *_describe({"the model's generation_config": model.generation_config})]


def _describe(call: Mapping[str, Any]) -> list[str]:
    """A call as text: a line per argument, whatever their order, tensors by their contents."""
    return [f"{name}: {describe_value(value)}" for name, value in sorted(call.items())]


def _get(config: Any, name: str) -> Any:
    return getattr(config, name, None)
