"""Ranks that are given, or make, something else than the others are told before they compute with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import families
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import differ
from tpcompile.ranks.compare_sent import Sent
from tpcompile.ranks.describe import describe_code, describe_value
from tpcompile.ranks.digest import digest


def test_ranks_that_are_given_other_things() -> None:
    expected = {
        "options_of_a_pass": "Nothing(option=0)",
        "versions_of_a_pass": "different requests",
        "rules": "rank 1 has \"rows: ['aten.relu: ... a -> ... a; whole a']\"",
        "one_element": "rank 0 has 'up.weight: ",
        "an_element_of_a_buffer": "rank 0 has 'offset: ",
        "what_is_trained": "torch.float32 [20, 12] with gradient",
        "a_type_of_weights": "rank 1 has 'offset: torch.float64",
        "a_mode_of_a_part": "different captured graphs",
        "time_limits": "'timeout: 601.0'",
        "modes": "rank 0 has 'Scaled in train mode",
        "sizes_of_a_later_call": "rank 0 has 'x: torch.float32 [4, 12]'",
        "modes_of_a_later_call": "rank 0 has 'Scaled in train mode",
        "numbers": "rank 0 has 'scale: 2', rank 1 has 'scale: 3'",
        "batches": "rank 0 has 'x: -1, ",
        "lines_of_a_batch": "give all ranks that share the model the same batch",
        "rounding": "accepted",
        "complex_numbers": "rank 1 has 'x: 1, 1, 1, ...'",
        "a_large_tensor": "accepted",
        "a_sparse_tensor": "accepted",
        "half_precision_by_default": "accepted",
        "gradients": "rank 0 has 'x: torch.float32 [2, 12] with gradient', rank 1 has",
        "weights_that_are_gathered": "gather up.weight (torch.float32), rank 1 is to gather down.weight",
        "rows_of_weights": "gather up.weight (torch.float32), rank 1 is to gather down.weight",
        "weights_that_are_compared": "compare different weights: up.weight, down.weight",
        "what_is_asked_of_weights": "is to compare weights, rank 1 is to add up",
        "learning_rates": "rank 0 has 'lr: 0.1', rank 1 has 'lr: 1.1'",
        "optimizers": "rank 0 has 'step 1 of SGD', rank 1 has 'step 1 of Adam'",
        "sizes_after_many": "different sizes of a call: rank 0 has 'x: [40, 12]', rank 1 has 'x: [42, 12]'",
        "numbers_after_many": "rank 0 has 'scale: 20', rank 1 has 'scale: 21'",
        "batches_after_many": "rank 0 has 'x: -1, ",
        "numbers_that_were_seen": "different orders of calls",
        "orders_of_models": "different orders of calls",
        "orders_of_copies": "different orders of calls",
        "orders_of_parameters": "different steps of an optimizer",
        "later_steps": "rank 0 has 'lr: 0.1', rank 1 has 'lr: 1.1'",
        "autocast": "rank 1 has 'Scaled in eval mode, gradients True, autocast torch.bfloat16'",
    }
    for found in run_spmd(differ.given_other_things, 2):
        assert found.keys() == expected.keys()
        for name, part in expected.items():
            assert part in found[name], (name, found[name])


def test_ranks_that_make_other_things() -> None:
    for rules, lowering in run_spmd(differ.makes_other_things, 2):
        assert "the plan is about another graph" in rules
        assert "the ranks' programs send different things: rank 0 " in lowering


def test_collectives_that_differ() -> None:
    """Ranks that are in no collective together may have other sizes; all others must not."""
    rows = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
    columns = {0: (0, 2), 1: (1, 3), 2: (0, 2), 3: (1, 3)}

    def program(rank: int, sizes: tuple[str, str], kinds: tuple[str, str] = ("a", "a")) -> list[Sent]:
        return [Sent(kinds[0], rows[rank], sizes[rank // 2]), Sent(kinds[1], columns[rank], sizes[rank % 2])]

    fine = [program(rank, ("4", "3")) for rank in range(4)]
    longer = [*fine[:3], [*fine[3], Sent("b", rows[3], "1")]]
    other_size = [*fine[:3], program(3, ("4", "5"))]
    other_kind = [*fine[:2], *(program(rank, ("4", "3"), ("b", "a")) for rank in (2, 3))]
    assert set(run_spmd(differ.sends, 4, fine)) == {"accepted"}
    for wrong, what in (
        (longer, "rank 0 nothing more, rank 3 b 1"),
        (other_size, "rank 2 a 3, rank 3 a 5"),
        (other_kind, "rank 0 a 4, rank 2 b 3"),
    ):
        for message in run_spmd(differ.sends, 4, wrong):
            assert what in message


def test_calls_of_several_threads() -> None:
    """Refused while another is in one; a thread may call again in its own call, and others after it."""
    for told, fine in run_spmd(differ.threads, 2):
        assert "another thread is in a call" in told and fine


def test_ranks_that_read_or_write_other_files(tmp_path: Path) -> None:
    """One element of a stale copy is enough."""
    model = families.build("llama", num_hidden_layers=1)
    model.save_pretrained(tmp_path / "0")  # type: ignore[operator]
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1  # type: ignore[union-attr, index, operator]
    model.save_pretrained(tmp_path / "1")  # type: ignore[operator]
    expected = [
        "rank 0 and rank 1 have other values in lm_head.weight",
        "rank 0 has 'configuration, rms_norm_eps: 1e-06'",
        "rank 0 has \"max_shard_size: '1GB'\"",
        "rank 1 has \"variant: 'b'\"",
        "rank 0 has 'lm_head.weight: ",
        "rank 0 has 'strict: False",
    ]
    for messages in run_spmd(differ.reads_other_files, 2, str(tmp_path)):
        for message, part in zip(messages, expected, strict=True):
            assert part in message


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.bool, torch.complex64, torch.int64]
)
def test_fingerprints_of_small_tensors(dtype: torch.dtype) -> None:
    """Equal tensors have equal ones, however they lie in memory; others have others."""
    values = torch.arange(1, 7).remainder(3).to(dtype).reshape(2, 3)
    turned = values.view(values.dtype).t().contiguous().t()
    assert digest(values) == digest(turned) != digest(values[:1])
    assert digest(torch.empty(0, dtype=dtype)) == digest(values.to("meta")) == ""
    assert digest(torch.zeros((), dtype=dtype)) != ""


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.quantize_per_tensor(x, 0.5, 0, torch.qint8),
        lambda x: torch.quantize_per_channel(x, torch.ones(4), torch.zeros(4), 0, torch.qint8),
        lambda x: torch.nested.nested_tensor([x, x[:2]]),
        lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
    ],
)
def test_arguments_that_are_to_be_refused_are_compared_first(make: Any) -> None:
    values = torch.arange(12.0).view(4, 3)
    assert (
        describe_value(make(values))
        == describe_value(make(values.clone()))
        != describe_value(make(values + 1))
    )


def test_fingerprints_of_large_tensors() -> None:
    """Every element counts, its sign and its place as well."""
    values = torch.randn(3 * 4096 + 5, dtype=torch.float64)
    plain, found = digest(values), set()
    for at in (0, 4095, 4096, len(values) - 1):
        changed = values.clone()
        changed[at] += 1e-12
        found.add(digest(changed))
    signs, swapped = values.clone(), values.clone()
    signs[[5, 70]] *= -1
    swapped[[5, 70]] = swapped[[70, 5]]
    found |= {digest(signs), digest(swapped), digest(-values), digest(values.flip(0))}
    assert plain not in found and len(found) == 8
    assert digest(values.clone()) == digest(torch.stack([values, values], 1)[:, 1]) == plain
    raw = torch.frombuffer(bytearray(values.numpy().tobytes()) + b"1", dtype=torch.uint8)
    shifted = torch.cat([raw[-1:], raw])[1:]  # not aligned to words
    assert digest(shifted[:-1]) == plain


def test_values_and_code_as_text() -> None:
    """By contents, not by where they stand or in which order a set has them."""

    def first(x: int) -> set[int]:
        return {y for y in ("a", "b", x)}  # type: ignore[misc]

    def second(x: int) -> set[int]:
        return {y for y in ("a", "b", x)}  # type: ignore[misc]

    def third(x: int) -> set[int]:
        return {y for y in ("a", "c", x)}  # type: ignore[misc]

    codes = [describe_code(f).rpartition(" ")[2] for f in (first, second, third)]
    assert codes[0] == codes[1] != codes[2]
    assert describe_value({"a": [1, (2.5, None)], "b": {3, 4}}) == describe_value(
        {"a": [1, (2.5, None)], "b": {4, 3}}
    )
    assert describe_value(first).endswith("first")
    assert describe_value(torch.ones(2), floats=False) == "torch.float32 [2]"
    assert describe_value([1]) != describe_value((1,)) != describe_value((True,))
