"""What the ranks do in ``test_compose``."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

import tpcompile
from tests.helpers import families
from tests.helpers.toys import PartlyCapturable, ReadsInHelper
from tests.on_ranks.models import mesh
from tests.on_ranks.module_life import refusal
from tests.on_ranks.training import ToyConfig, ToyForCausalLM


def in_either_order(dense_first: bool) -> dict[str, Any]:
    """Calls that can and that cannot be captured, over the same weights."""
    torch.manual_seed(0)
    model, x = PartlyCapturable().double(), torch.randn(3, 7, 12, dtype=torch.float64)
    whole = copy.deepcopy(model)
    found: dict[str, Any] = {"errors": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = ((x, True), (x,)) if dense_first else ((x,), (x, True))
        sharded = tpcompile.parallelize(model, mesh(), first, compose=True)
        for call in [first, second, (x[:2, :5], *first[1:])]:
            mine, theirs = sharded(*call), whole(*call)
            found["errors"].append(float((mine - theirs).abs().max()))
    (sharded(x) + sharded(x, True)).sum().backward()
    (whole(x) + whole(x, True)).sum().backward()
    gradient = model.experts.weight.grad.full_tensor()
    found["gradients"] = float((gradient - whole.experts.weight.grad).abs().max())
    found["warned"] = [str(w.message).split("(")[0] for w in caught if "runs as python" in str(w.message)]
    found["entries"] = {program.entry for program in sharded.programs}
    weights = (model.experts.weight, model.mlp.up.weight, model.table.rows)
    found["shapes"] = [tuple(p.to_local().shape) for p in weights]
    return found


class LooksAtWords(ToyForCausalLM):
    """A model of transformers whose python depends on the words."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids if input_ids.sum() > 0 else -input_ids, **kwargs)


def not_composed() -> list[str]:
    """What is said where parts are not wanted: usually of modules, if so asked of models of transformers."""
    words, x = torch.ones(2, 5, dtype=torch.int64), torch.randn(3, 7, 12)
    model = LooksAtWords(ToyConfig())
    return [
        refusal(lambda: tpcompile.parallelize(PartlyCapturable(), mesh(), (x,))),
        refusal(lambda: tpcompile.parallelize(model, mesh(), (words,), compose=False)),
    ]


def read_in_helper() -> float:
    """The error of a module that reads its part's weight in a method that forward calls."""
    torch.manual_seed(0)
    model, x = ReadsInHelper(), torch.randn(3, 12)
    whole = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded = tpcompile.parallelize(model, mesh(), (x,), compose=True)
        return float((sharded(x) - whole(x)).abs().max())


def hook_inside() -> float:
    """The error with a hook inside of a layer of torch's own, whose python reads its parts' weights."""
    x = torch.randn(2, 5, 12)
    layer = torch.nn.TransformerEncoderLayer(12, 2, 24, batch_first=True).eval()
    whole = copy.deepcopy(layer)
    sharded = tpcompile.parallelize(layer, mesh(), (x,))
    for each in (sharded, whole):
        each.linear1.register_forward_hook(lambda _, __, y: y * 2)
    return float((sharded(x) - whole(x)).abs().max())


def wrong_calls() -> dict[str, Any]:
    """Calls of a transformers model that are wrong, and then a right one: nothing runs as python."""
    model = families.build("llama", num_hidden_layers=1)
    whole, ids = copy.deepcopy(model), families.token_ids(2, 7)
    told: list[str] = []

    def attempt(call: Any) -> None:
        try:
            call()
        except tpcompile.TpCompileError as refusal:
            told.append(str(refusal))

    attempt(lambda: tpcompile.parallelize(model, mesh(), example_kwargs={"input_ids": ids.double()}))
    sharded = tpcompile.parallelize(model, mesh())
    embedded = whole.get_input_embeddings()(ids).detach()
    for call in ({"inputs_embeds": embedded[..., :3]}, {"input_ids": ids.double()}, {}):
        attempt(lambda call=call: sharded(**call))  # type: ignore[misc]
    with torch.no_grad():
        mine, theirs = (m(inputs_embeds=embedded).logits for m in (sharded, whole))
    return {
        "told": len(told),
        "entries": [program.entry for program in sharded.programs],
        "error": float((mine - theirs).abs().max()),
    }
