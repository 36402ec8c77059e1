"""What is taken from dynamo and from torch.export although it is not public.

Loading them takes longer than all of the package: whoever needs a name of these imports it in a function.
"""

from __future__ import annotations

from torch._dynamo import config as dynamo_config
from torch._dynamo import mark_static_address
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.source import ConstantSource
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.export import _trace as export_trace
from torch.fx import proxy as fx_proxy
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer as ModuleStackTracer
from torch.fx.experimental.symbolic_shapes import uninteresting_files

PRIVATE_ATTRIBUTES = {
    "torch._dynamo.decorators": ("_dynamo_marked_constant",),
    "torch._dynamo.eval_frame:OptimizedModule": ("_orig_mod",),
    "torch.export._trace": ("_compiling_state_context",),
}
"""See ``torch_internals``."""
