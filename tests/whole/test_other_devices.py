"""Programs for another device than the CPU, as far as they can be looked at without one."""

from __future__ import annotations

import ast
import inspect

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.fx import Graph

import tpcompile
from tests.helpers import families
from tests.helpers.run_ranks import run_alone, run_spmd
from tests.on_ranks.models import CAPTURED
from tests.whole import test_gpu
from tpcompile.capture.repeats.capture_repeated import capture_repeated
from tpcompile.ir.calls import bind_call
from tpcompile.ir.print_graph import graph_text
from tpcompile.lowering.lower_graph import lower_program
from tpcompile.pipeline import canonical, plan_program, rewrite
from tpcompile.planner.search.cost import preset

TIMEOUT = 420


def refusal() -> str:
    """A model on the CPU, a mesh for the card."""
    tp = init_device_mesh("cuda", (dist.get_world_size(),), backend_override={0: "gloo"})
    try:
        tpcompile.parallelize(nn.Linear(4, 4), tp, (torch.zeros(2, 4),))
    except tpcompile.TpCompileError as refused:
        return str(refused)
    return "accepted"


class Alone:
    """Stands in for the process groups of rank 1."""

    def name(self, axes: tuple[int, ...]) -> str:
        return "none"

    def index(self, axes: tuple[int, ...]) -> int:
        return 1


def strays(names: tuple[str, ...]) -> dict[str, list[str]]:
    """What is not on the device, in programs for a device that torch is only told of."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("elsewhere")
    device = torch.device("elsewhere", 0)
    found = {}
    for name in names:
        model = families.build(name).requires_grad_(False)  # this device has no autograd
        call = bind_call(model, (), families.inputs(name, *CAPTURED))
        captured = capture_repeated(model, call, device=device)
        program = plan_program(canonical(captured, 2), preset("cpu"), lambda _work, _axis: {})
        rewrite(program, training=False)
        local = lower_program(program, (1,) * len(program.axis_sizes), Alone()).local
        values = {n.name: n.meta.get("val") for n in (*program.graph.nodes, *local.graph.nodes)}
        wanted = {n.name: n.kwargs.get("device", device) for n in local.graph.nodes}
        found[name] = [k for k, v in values.items() if isinstance(v, Tensor) and v.device != device]
        found[name] += [k for k, d in wanted.items() if d not in (None, device)]
    return found


def test_a_model_on_another_device_than_the_mesh_is_refused() -> None:
    for message in run_spmd(refusal, 2):
        assert "the mesh is for cuda, the model is on cpu" in message
        assert "move the model to cuda" in message


def test_programs_for_another_device_hold_nothing_of_the_cpu() -> None:
    assert run_alone(strays, ("phi3", "mixtral"), timeout=TIMEOUT) == {"phi3": [], "mixtral": []}


def test_ranks_on_different_cards_have_the_same_text() -> None:
    texts = set()
    for card in range(2):
        graph = Graph()
        graph.call_function(torch.ops.aten.arange.default, (4,), {"device": torch.device("cuda", card)})
        graph.output(())
        texts.add(graph_text(graph))
    assert len(texts) == 1


def test_what_runs_on_a_card_is_called_as_it_is_defined() -> None:
    """Where there is no card, nothing else notices that a function of the ranks takes other arguments."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(test_gpu))) if isinstance(node, ast.Call)]
    made = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "on_two_ranks"]
    for call in made:
        function = eval(ast.unparse(call.args[0]), vars(test_gpu))
        inspect.signature(function).bind(*call.args[1:])
    assert len(made) > 8
