"""transformers' continuous batching over a sharded model: requests come and go, a step takes tokens of many.

The scheduler, the pages of the cache and the sampling are transformers' own. They run on every rank, and
follow the first one: they are told that the ranks are one model, of which each has its part of the key heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch.distributed as dist

from tpcompile.capture.caches.paged import PagedCache
from tpcompile.capture.caches.register import register_cache_support
from tpcompile.capture.held_caches import Held
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import flatten_call, leaf_names
from tpcompile.ir.hf_internals import ATTN_TYPE_TO_ALLOCATOR, ContinuousBatchingManager, DistributedHelper
from tpcompile.ranks.agree import alike, compare, together
from tpcompile.ranks.describe import describe_value
from tpcompile.ranks.exchange import exchange
from tpcompile.ranks.own_groups import limit_of, make_group
from tpcompile.ranks.turns import own_turn, turn_lent

from .batch_step import BatchStep
from .generates_alike import EQUAL, arguments, call_lines
from .guards import hooks_below
from .runtime import Runtime


def generate_batch(
    model: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """See ``ShardedGeneration.generate_batch``."""
    _refuse_following(model._tp)
    group = model._tp.group
    call = arguments(original, args, kwargs)

    def serve() -> Any:
        results = original(**call)
        config = call.get("generation_config") or model.generation_config
        if len(results) < len(call["inputs"]) * (config.num_return_sequences or 1):
            what = "not all requests were completed"
            raise TpCompileError(what, where="generate_batch", todo="see what transformers has logged")
        return results

    with alike(group, "generate_batch", call_lines(model, call)):
        _refuse_to_keep(call)
        results = together(group, "generate_batch", serve)
        found = [f"{name}: {describe_value(one.generated_tokens)}" for name, one in results.items()]
        compare(group, "generated tokens", found, EQUAL)
        return results


@contextmanager
def manage(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[BatchingManager]:
    """See ``ShardedGeneration.continuous_batching_context_manager``."""
    _refuse_to_keep(arguments(original, args, kwargs))
    with original(*args, **kwargs) as manager:
        yield manager
    error = manager.background_thread_status.fatal_error
    if error is not None:
        raise error


def make_manager(
    model: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> BatchingManager:
    """See ``ShardedGeneration.init_continuous_batching``."""
    _refuse_following(model._tp)
    call = arguments(original, args, kwargs)
    with alike(model._tp.group, "init_continuous_batching", call_lines(model, call)):
        _refuse(model, model._tp)
        register_cache_support()
        from transformers import ContinuousBatchingConfig

        wishes = call.get("generation_config") or model.generation_config
        if wishes.eos_token_id is None:
            wishes.eos_token_id = -1  # none, for transformers' scheduler
        config = call.get("continuous_batching_config") or ContinuousBatchingConfig()
        return BatchingManager(model, wishes, config, call.get("workload_hints"))


def _refuse_to_keep(call: Mapping[str, Any]) -> None:
    """Refuses a manager that outlives the call.

    Raises:
        TpCompileError: it is asked for.
    """
    if call.get("persistent_manager"):
        _cannot("keep a manager for later calls", "persistent_manager", "use init_continuous_batching")


def _refuse_following(runtime: Runtime) -> None:
    """Refuses calls that the other ranks do not make.

    Raises:
        TpCompileError: they follow this one.
    """
    if runtime.leader is not None or runtime.served:
        _cannot("be told to ranks that follow", "serve_ranks", "call it on all ranks, outside of serve_ranks")


def _cannot(what: str, where: str, todo: str) -> NoReturn:
    raise TpCompileError(f"continuous batching of a sharded model cannot {what}", where=where, todo=todo)


def _refuse(model: Any, runtime: Runtime) -> None:
    """Refuses models that cannot be served.

    Raises:
        TpCompileError: this one cannot.
    """
    import transformers

    instead = "use generate with a batch of prompts"
    if ATTN_TYPE_TO_ALLOCATOR is None:
        _cannot(f"use the paged cache of transformers {transformers.__version__}", "generate_batch", instead)
    attention = model.config.get_text_config()._attn_implementation
    if attention not in ("sdpa", "eager"):
        _cannot(f"use the attention {attention!r}", "attn_implementation", 'load it with "sdpa" or "eager"')
    if runtime.layout is None:
        _cannot("begin with a model of which nothing was captured yet", "programs", "call the model before")
    if runtime.composed or runtime.foreign or hooks_below(model, "", runtime.hooks):
        _cannot("run a model that is not captured as a whole", "hooks or parts that run as python", instead)


class BatchingManager(ContinuousBatchingManager):
    """A manager of requests whose steps are programs.

    Args:
        model: the sharded model.
        generation_config: as transformers' own has it.
        continuous_batching_config: likewise.
        workload_hints: likewise.

    Raises:
        TpCompileError: it is to compile, to record CUDA graphs, or to prepare a step during another.
    """

    def __init__(
        self, model: Any, generation_config: Any, continuous_batching_config: Any, workload_hints: Any
    ) -> None:
        super().__init__(model, generation_config, continuous_batching_config, workload_hints)
        made = self.continuous_batching_config
        compiled = made.varlen_compile_config is not None or made.decode_compile_config is not None
        if compiled or any(made.cuda_graph_booleans) or made.use_async_batching:
            _cannot(
                "compile its steps, record them as CUDA graphs or prepare them ahead",
                "continuous_batching_config",
                "leave compile configurations, use_cuda_graph and use_async_batching off",
            )
        self._runtime: Runtime = model._tp
        self._step = BatchStep(model)
        self.distributed_helper = _one_model(self._runtime, made.cpu_group_timeout, self._divided())
        self.is_tp_driver = self.distributed_helper.is_tp_driver
        self._let_others_in_pauses()

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """The attention stays as it is, but for the name that transformers has for it over pages."""
        super().switch_to_cb_friendly_attn(model, auto_switch_to_flash=False)

    def _let_others_in_pauses(self) -> None:
        """``pause`` is for threads that use the model: the loop lends them its turn."""
        status = self.background_thread_status
        wait = status.pause_and_wait

        def pause_and_wait() -> None:
            with turn_lent(self._runtime.group_name):
                wait()

        status.pause_and_wait = pause_and_wait

    def start(self) -> None:
        """As transformers' own.

        Raises:
            TpCompileError: another thread is in a call; or ranks follow this one, or it follows.
        """
        _refuse_following(self._runtime)
        with own_turn(self._runtime.group_name):
            pass  # it is free for the thread that is started
        super().start()

    def _run_generation_loop(self, use_inference_mode: bool) -> None:
        """Holds the ranks' turn: a call of the model by another thread is refused meanwhile."""
        try:
            with own_turn(self._runtime.group_name):
                super()._run_generation_loop(use_inference_mode)
        except TpCompileError as error:
            self._handle_critical_error(error, None)
            self.background_thread_status.mark_as_stopped()

    def _create_batch_processor(self) -> Any:
        made = super()._create_batch_processor()
        runtime, view = self._runtime, {"cache": PagedCache.of(made.cache)}
        assert runtime.layout is not None, "a model without a layout is refused"
        place, parts = ((1, 0), self.distributed_helper.tp_size) if self._divided() else (None, 1)
        places = (place,) * len(runtime.layout.axis_sizes)
        for name, rows in zip(leaf_names(view), flatten_call(view)[0], strict=True):
            _, heads, features = rows.shape
            runtime.caches[name] = Held(((), (heads * parts,), (features,)), places)
        return made

    def _divided(self) -> bool:
        """Whether each rank has some of the key heads; otherwise all ranks have all of them."""
        config, group = self.model.config.get_text_config(), self._runtime.group
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return group is not None and group.size() > 1 and heads % group.size() == 0

    def _generation_step(self) -> None:
        self.batch_processor._generation_step(self._step)
        group, step = self._runtime.group, self.batch_processor.inputs_and_outputs
        if group is not None and self.batch_processor.do_sample:
            # other threads of a rank draw from the same generator
            drawn = step.output_ids[:, : step.num_request_in_batch]
            drawn.copy_(drawn.new_tensor(exchange(group, "take the first rank's tokens", drawn.tolist())[0]))


def _one_model(runtime: Runtime, timeout: float | None, divided: bool) -> Any:
    """Has the ranks follow the first one, as those of transformers' own plans do; all of them call this.

    Args:
        runtime: the model's.
        timeout: seconds that they wait for each other between steps.
        divided: whether each has a part of the cache.
    """
    axis = runtime.compiler.axis
    names = ("k_proj", "v_proj") if divided else ()
    made: Any = DistributedHelper(None, timeout, {f"layers.*.self_attn.{name}": "" for name in names})
    if axis is None:
        return made
    group, ranks = axis.group, dist.get_process_group_ranks(axis.group)
    if len(ranks) > 1:
        made.tp_size, made.tp_group = len(ranks), group
        made.tp_local_rank, made.tp_root_global_rank = group.rank(), ranks[0]
        # transformers' own would have the name of one that an earlier batch of some ranks has left behind
        topic = f"{group.group_name}/batches"
        made.cpu_comm_group = make_group(ranks, topic, timeout or limit_of(group))
        made.is_tp_driver = made.infer_if_tp_driver()
    made.dp_rank = axis.replica  # which of several models: it tells their random numbers apart
    return made
