"""Encoder-decoders generate, and a model with pictures runs composed, on two gloo processes."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import families
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import encoder_decoder as spmd_encoder_decoder


def test_encoder_decoder_generates() -> None:
    """The encoder is called alone; prefill, the first step, and the other steps have a program each."""
    for found in run_spmd(spmd_encoder_decoder.tokens, 2, "t5", {"num_layers": 1}, timeout=400):
        assert found["same"]
        entries = [entry for entry, _ in found["programs"]]
        assert entries == ["", "encoder", "", "", ""], found["programs"]
        # Of 8 heads each rank holds 4, in both halves of the cache.
        assert found["shapes"] == [(3, 4, 8, 12)] * 2 + [(3, 4, 9, 12)] * 2


def test_the_first_argument_may_have_another_name() -> None:
    """Whisper's ``generate`` takes ``input_features``."""
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    asked = ("whisper", layers, spmd_encoder_decoder.BRIEF, False)
    for found in run_spmd(spmd_encoder_decoder.tokens, 2, *asked, timeout=400):
        assert found["same"]


def test_pictures_are_composed(tmp_path: Path) -> None:
    """The model is loaded and planned by a call without one; its parts follow at the first picture."""
    text = families.QWEN2_VL["text_config"] | {"num_hidden_layers": 1}
    families.build("qwen2_vl", text_config=text).save_pretrained(tmp_path)  # type: ignore[operator]
    for found in run_spmd(spmd_encoder_decoder.picture, 2, str(tmp_path), timeout=400):
        assert found["error"] <= 1e-6  # rotary tables are computed in float32
        assert found["warnings"] == 5  # the model, its inner model, the tower, its block, its attention
        assert found["entries"][0] == "" and "model.language_model" in found["entries"]
        assert found["tokens"]
        assert found["vision"] == (40, 40)  # of 80 rows
        assert found["state"]
