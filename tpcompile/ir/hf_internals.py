"""All that tpcompile takes from transformers although it is not documented; see ``torch_internals``.

To import this imports transformers, which takes seconds: do so where a model of transformers is at hand.
"""

from __future__ import annotations

from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.modeling_utils import LoadStateDictConfig, get_model_conversion_mapping
from transformers.utils.output_capturing import maybe_install_capturing_hooks

try:
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
except ImportError:  # 5.17
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

try:
    from transformers.masking_utils import remap_positions_for_packed_sequence
except ImportError:  # 5.17, whose masks go by places where rows are packed, too: nothing is remapped
    remap_positions_for_packed_sequence = None

try:
    from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR
except ImportError:  # 5.17, whose paged cache is built otherwise
    ATTN_TYPE_TO_ALLOCATOR = None

PRIVATE_ATTRIBUTES = {
    "peft.utils.save_and_load": ("_reshard_dtensor_values_for_load",),
    "accelerate.state:PartialState": ("_shared_state",),
    "transformers:GenerationMixin": ("_sample",),
    "transformers:PreTrainedConfig": ("_attn_implementation", "_experts_implementation_internal"),
    "transformers:PreTrainedModel": (
        "_adjust_missing_and_unexpected_keys",
        "_from_config",
        "_get_dtype_plan",
        "_keys_to_ignore_on_save",
        "_tp_plan",
    ),
    "transformers:Trainer": (
        "_load_optimizer_and_scheduler",
        "_prepare_for_training",
        "_save",
        "_save_optimizer_and_scheduler",
        "_save_rng_state",
    ),
    "transformers.core_model_loading": ("_weight_conversions",),
    "transformers.core_model_loading:WeightTransform": (
        "_original_source_patterns",
        "_original_target_patterns",
    ),
    "transformers.generation:PrefixConstrainedLogitsProcessor": ("_prefix_allowed_tokens_fn",),
    "transformers.generation.continuous_batching:ContinuousBatchingManager": (
        "_create_batch_processor",
        "_generation_step",
        "_handle_critical_error",
        "_run_generation_loop",
        "_supports_logits_to_keep",
    ),
    "transformers.generation.continuous_batching.cache_allocators:FullAttentionCacheAllocator": (
        "_kv_token_views",
    ),
    "transformers.initialization": ("_is_hf_initialized",),
    "transformers.masking_utils:AttentionMaskInterface": ("_global_mapping",),
    "transformers.modeling_flash_attention_utils": ("_is_packed_sequence",),
    "transformers.modeling_utils:AttentionInterface": ("_global_mapping",),
    "transformers.integrations.peft": ("_hf_peft_config_loaded",),
    "transformers.models.auto.auto_factory:_BaseAutoModelClass": ("_model_mapping",),
    "transformers.utils.output_capturing": ("_output_capturing_hooks_installed",),
}
"""Attributes that are read from transformers' objects, by their owner: a module, or a class of one."""
