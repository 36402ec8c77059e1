"""All that tpcompile takes from torch although it is not public: another version may do without.

``tests/ir/test_internals.py`` looks every name up, says which modules need one that is gone, and holds that
private names of torch come from here alone.
"""

from __future__ import annotations

from torch import _TorchCompileInductorWrapper as InductorBackend
from torch import _TorchCompileWrapper as OtherBackend
from torch._C import DisableTorchFunction, DisableTorchFunctionSubclass, DispatchKey
from torch._C import _current_autograd_node as current_autograd_node
from torch._C import _disabled_torch_function_impl as disabled_torch_function_impl
from torch._C import _dispatch_has_kernel as dispatch_has_kernel
from torch._C import _dispatch_has_kernel_for_dispatch_key as dispatch_has_kernel_for_dispatch_key
from torch._C import _dispatch_tls_is_dispatch_key_excluded as dispatch_key_is_excluded
from torch._C import _get_tracing_state as get_tracing_state
from torch._C import _is_alias_of as is_alias_of  # type: ignore[attr-defined]
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled
from torch._C import _len_torch_dispatch_stack as len_torch_dispatch_stack
from torch._C._autograd import _get_sequence_nr as get_sequence_nr
from torch._C._distributed_c10d import BroadcastOptions, GatherOptions
from torch._C._distributed_c10d import _register_process_group as register_process_group
from torch._C._distributed_c10d import _resolve_process_group as resolve_process_group
from torch._C._distributed_c10d import _unregister_process_group as unregister_process_group
from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards, dict_version
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor, peek_interpreter_stack
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._higher_order_ops import invoke_subgraph
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._logging._internal import trace_structured
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import _profiler_enabled as profiler_enabled  # type: ignore[attr-defined]
from torch.distributed import _state_dict_utils as state_dict_utils
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._storage_utils import _storage_setup as storage_setup
from torch.distributed.fsdp._fully_shard import _fully_shard as fully_shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils import _foreach_utils as foreach_utils
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._pytree import (
    SequenceKey,
    TreeSpec,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)
from torch.utils._sympy.functions import CeilDiv, FloorDiv, Max, Min, Mod
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis

PRIVATE_ATTRIBUTES = {
    "random": ("_urandom",),
    "torch.Tensor": (
        "_backward_hooks",
        "_base",
        "_dtensor__new__",
        "_make_wrapper_subclass",
        "_post_accumulate_grad_hooks",
        "_typed_storage",
        "_use_count",
    ),
    "torch.UntypedStorage": ("_cdata",),
    "torch": ("_inductor",),
    "torch._ops:OpOverload": ("_opname", "_overloadname", "_schema"),
    "torch._functorch._aot_autograd.frontend_utils": (
        "_dynamo_source",
        "_dynamo_static_input_type",
        "_param_name_to_source",
    ),
    "torch.autograd": ("_engine_run_backward",),
    "torch.autograd.graph": ("_get_grad_fn_or_grad_acc",),
    "torch.autograd.graph:Node": ("_sequence_nr",),
    "torch.autograd.forward_ad": ("_current_level",),
    "torch.compiler": ("_is_compiling_flag", "_is_exporting_flag"),
    "torch.distributed.DeviceMesh": (
        "_flatten",
        "_flatten_mapping",
        "_get_root_mesh",
        "_pg_registry",
        "_root_mesh",
    ),
    "torch._C._distributed_c10d:Backend.Options": ("_timeout",),
    "torch.distributed.ProcessGroup": ("_device_types", "_get_backend"),
    "torch.distributed._state_dict_utils": ("_distribute_tensors",),
    "torch.distributed.checkpoint.state_dict": ("_distribute_state_dict",),
    "torch.distributed.distributed_c10d": ("_get_default_store", "_new_process_group_helper", "_world"),
    "torch.distributed.fsdp._fully_shard._fully_shard": ("_get_modules_and_states",),
    "torch.distributed.tensor:DTensor": ("_local_tensor",),
    "torch.fx.Graph": ("_graph_namespace",),
    "torch.fx.graph:_Namespace": ("_used_names",),
    "torch.fx.experimental.symbolic_shapes:ShapeEnv": ("_maybe_evaluate_static",),
    "torch.nn.Module": (
        "_backward_hooks",
        "_backward_pre_hooks",
        "_buffers",
        "_compiled_call_impl",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_is_full_backward_hook",
        "_modules",
        "_non_persistent_buffers_set",
        "_parameters",
    ),
    "torch.nn.attention.flex_attention": (
        "_LARGE_SPARSE_BLOCK_SIZE",
        "_convert_mask_to_block_mask",
        "_create_empty_block_mask",
        "_create_sparse_block_from_block_mask",
        "_validate_device",
    ),
    "torch.nn.utils.stateless": ("_functional_call",),
    "torch.nn.utils.clip_grad": ("_clip_grads_with_norm_", "_get_total_norm"),
    "torch.nn.modules.module": (
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
    ),
    "torch.optim.optimizer": ("_foreach_supported_types",),
    "torch.utils._foreach_utils": ("_foreach_supported_types",),
    "torch.utils.checkpoint": ("_checkpoint_without_reentrant_generator",),
    "torch.utils._pytree": ("_deregister_pytree_node",),
}
"""Attributes that are read from torch's modules and objects, by their owner: a module, or a class of one."""
