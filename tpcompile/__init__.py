"""A compiler that makes PyTorch models tensor-parallel."""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_HERE = Path(__file__).parent
# In a checkout passes/ and lowering/ lie beside this folder, where an install has them inside.
if not (_HERE / "passes").is_dir() and (_HERE.parent / "passes").is_dir():
    __path__.append(str(_HERE.parent))

from .api import parallelize, plan  # noqa: E402
from .errors import TpCompileError  # noqa: E402
from .from_pretrained import from_pretrained  # noqa: E402
from .lint_plan import PlanReport, lint_plan  # noqa: E402
from .placements import Partial, Replicate, Shard  # noqa: E402
from .plan import Plan  # noqa: E402
from .planner.calibrate import calibrate  # noqa: E402
from .planner.cost import CostModel  # noqa: E402
from .rules.table import register_rule  # noqa: E402
from .strategies.hf_plan import hf_plan  # noqa: E402
from .strategies.parallel_interface import ParallelInterface  # noqa: E402
from .strategies.strategy import Strategy  # noqa: E402
from .strategies.tensor_parallel_layer import (  # noqa: E402
    TensorParallelLayer,
    get_packed_weights,
    get_tensor_shard,
)
from .to_hf_plan import to_hf_plan  # noqa: E402

__all__ = [
    "CostModel",
    "ParallelInterface",
    "Partial",
    "Plan",
    "PlanReport",
    "Replicate",
    "Shard",
    "Strategy",
    "TensorParallelLayer",
    "TpCompileError",
    "calibrate",
    "from_pretrained",
    "get_packed_weights",
    "get_tensor_shard",
    "hf_plan",
    "lint_plan",
    "parallelize",
    "plan",
    "register_rule",
    "to_hf_plan",
]


def __getattr__(name: str) -> Any:
    """The counterparts of transformers' auto classes, made when they are asked for."""
    if not name.startswith("AutoModel"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .auto_classes import auto_class

    return auto_class(name)
