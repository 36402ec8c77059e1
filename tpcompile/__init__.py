"""A compiler that makes PyTorch models tensor-parallel."""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_HERE = Path(__file__).parent
# In a checkout passes/ and lowering/ are beside this folder, where an install has them inside.
if not (_HERE / "passes").is_dir() and (_HERE.parent / "passes").is_dir():
    __path__.append(str(_HERE.parent))

from .ir.uncollected import uncollected

with uncollected():  # half of the modules, and all that they take from torch
    from .api import parallelize, plan

from .errors import TpCompileError
from .from_pretrained import from_pretrained
from .ir.placements import Partial, Replicate, Shard
from .lint_plan import PlanReport, lint_plan
from .planner.dry_run.estimate import Estimate
from .planner.dry_run.fitted import Fit
from .planner.global_program import GlobalProgram, Pass
from .planner.plan import Plan
from .planner.search.calibrate import calibrate
from .planner.search.cost import CostModel
from .planner.to_hf_plan import to_hf_plan
from .rules.table import register_rule
from .runtime.artifacts.load_program import load_program
from .runtime.artifacts.loaded_program import LoadedProgram
from .runtime.dry_run.fit import fit
from .runtime.verify.check_rule import RuleReport, check_rule
from .runtime.verify.one_process import verify
from .runtime.verify.report import Report
from .strategies.custom.tensor_parallel_layer import TensorParallelLayer, get_packed_weights, get_tensor_shard
from .strategies.hf_plan import hf_plan
from .strategies.parallel_interface import ParallelInterface
from .strategies.strategy import Strategy
from .weights import dcp as checkpoint

__all__ = [
    "CostModel",
    "Estimate",
    "Fit",
    "GlobalProgram",
    "LoadedProgram",
    "ParallelInterface",
    "Partial",
    "Pass",
    "Plan",
    "PlanReport",
    "Replicate",
    "Report",
    "RuleReport",
    "Shard",
    "Strategy",
    "TensorParallelLayer",
    "TpCompileError",
    "calibrate",
    "check_rule",
    "checkpoint",
    "fit",
    "from_pretrained",
    "get_packed_weights",
    "get_tensor_shard",
    "hf_plan",
    "lint_plan",
    "load_program",
    "parallelize",
    "plan",
    "register_rule",
    "to_hf_plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    """The counterparts of transformers' auto classes, made when they are asked for."""
    if not name.startswith("AutoModel"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .auto_classes import auto_class

    return auto_class(name)


def __dir__() -> list[str]:
    return sorted(__all__)
