"""A compiler that makes PyTorch models tensor-parallel."""

from pathlib import Path

__version__ = "0.1.0"

_HERE = Path(__file__).parent
# In a checkout passes/ and lowering/ lie beside this folder, where an install has them inside.
if not (_HERE / "passes").is_dir() and (_HERE.parent / "passes").is_dir():
    __path__.append(str(_HERE.parent))

from .api import parallelize, plan  # noqa: E402
from .errors import TpCompileError  # noqa: E402
from .from_pretrained import from_pretrained  # noqa: E402
from .placements import Partial, Replicate, Shard  # noqa: E402
from .plan import Plan  # noqa: E402
from .planner.calibrate import calibrate  # noqa: E402
from .planner.cost import CostModel  # noqa: E402
from .rules.table import register_rule  # noqa: E402
from .strategies.parallel_interface import ParallelInterface  # noqa: E402
from .strategies.strategy import Strategy  # noqa: E402
from .strategies.tensor_parallel_layer import (  # noqa: E402
    TensorParallelLayer,
    get_packed_weights,
    get_tensor_shard,
)

__all__ = [
    "CostModel",
    "ParallelInterface",
    "Partial",
    "Plan",
    "Replicate",
    "Shard",
    "Strategy",
    "TensorParallelLayer",
    "TpCompileError",
    "calibrate",
    "from_pretrained",
    "get_packed_weights",
    "get_tensor_shard",
    "parallelize",
    "plan",
    "register_rule",
]
