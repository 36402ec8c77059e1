"""From a model and an example call to one functional graph at global shapes."""

from tpcompile.capture.bind_call import (
    CallSignature,
    bind_call,
    call_key,
    call_model,
    flatten_call,
    leaf_names,
    signature_of,
)
from tpcompile.capture.capture_model import capture
from tpcompile.capture.program import Captured, InputSpec, OutputSpec
from tpcompile.capture.register_caches import register_cache_support
from tpcompile.capture.switch_experts import choose_experts_implementation

__all__ = [
    "CallSignature",
    "Captured",
    "InputSpec",
    "OutputSpec",
    "bind_call",
    "call_key",
    "call_model",
    "capture",
    "choose_experts_implementation",
    "flatten_call",
    "leaf_names",
    "register_cache_support",
    "signature_of",
]
