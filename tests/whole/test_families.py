"""The test models themselves: they build, run, repeat, and answer with numbers of a sensible size."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from tests.helpers import families
from tests.helpers.families import EDGE_CASES, FAMILIES


def _check_output(output: torch.Tensor) -> None:
    assert torch.isfinite(output).all()
    assert 0.05 <= output.std() <= 50


@pytest.mark.parametrize("name", FAMILIES)
def test_family_runs(name: str) -> None:
    model = families.build(name)
    assert not model.training
    output = families.reference(model, families.inputs(name))[FAMILIES[name].output]
    assert output.shape[0] == families.BATCH
    _check_output(output)


@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_case_runs(name: str) -> None:
    output = families.reference(EDGE_CASES[name](), families.causal_inputs())["logits"]
    assert output.shape == (families.BATCH, families.SEQ, families.VOCAB)
    _check_output(output)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_do_not_depend_on_dtype(name: str) -> None:
    key = FAMILIES[name].output
    single = families.reference(families.build(name), families.inputs(name))[key]
    double = families.reference(
        families.build(name, torch.float64), families.inputs(name, dtype=torch.float64)
    )[key]
    # Some compute norms, rotary tables or logits in float32 whatever the weights are.
    torch.testing.assert_close(single.double(), double.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_weight_is_trivial(name: str) -> None:
    constant = [
        key
        for key, value in families.build(name).named_parameters()
        if value.numel() > 1 and value.std() < 0.01
    ]
    assert not constant


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_reach_the_output(name: str) -> None:
    """A weight that changes nothing would hide every error made with it."""
    model = families.build(name)
    output = families.tensors(model(**families.inputs(name)))
    total = sum(
        (value * torch.linspace(0.5, 1.5, value.shape[-1])).square().sum() for value in output.values()
    )
    cast(torch.Tensor, total).backward()
    unused = [
        key
        for key, value in model.named_parameters()
        # The vision tower has no input here.
        if value.requires_grad and (value.grad is None or not value.grad.any()) and ".visual." not in key
    ]
    assert not unused


def test_same_seed_same_model() -> None:
    first, again, other = families.build("llama"), families.build("llama"), families.build("llama", seed=1)
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.state_dict()["lm_head.weight"], other.state_dict()["lm_head.weight"])


def test_latent_projections_are_small() -> None:
    """Latent attention keeps its down projections whole; that is only right while they are small."""
    attention = families.build("deepseek_v3").get_submodule("model.layers.0.self_attn")
    sizes = {name: value.numel() for name, value in attention.named_parameters()}
    latent = sum(size for name, size in sizes.items() if name.startswith(("q_a_", "kv_a_")))
    assert latent < 0.1 * sum(sizes.values())


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.dense])
def test_experts_are_packed(name: str) -> None:
    model = families.build(name)
    packed = [value for key, value in model.named_parameters() if "experts" in key and value.ndim == 3]
    assert packed
    assert all(value.shape[0] == 6 for value in packed)
