"""Conversations as the model is fed them, and the rows at which it answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bundle.errors import UsageError
from bundle.tokenizer import open_tokenizer
from distill.batches.encoding import IGNORED, encode_row
from distill.data.rows import read_rows
from distill.models.checkpoint import load_vlm
from distill.models.processing import read_processing
from export.model.streamed import open_streamed
from export.quantize.calibration import Calibration, CalibrationData, read_calibration
from export.quantize.passes import answer_logits, decoder_inputs, through_layer
from tests.export.conftest import STUDENT
from tests.export.quantize.calibration_set import write_set


def read(wanted: CalibrationData, context_length: int = 512) -> Calibration:
    return read_calibration(wanted, read_processing(STUDENT), load_vlm(STUDENT).config, context_length)


def test_rows_are_taken_evenly(tmp_path: Path) -> None:
    path = write_set(tmp_path, rows=9)
    assert len(read(CalibrationData(path, rows=64)).conversations) == 9
    three = read(CalibrationData(path, rows=3))
    assert [one.pixels is None for one in three.conversations] == [False, False, True]  # rows 0, 4 and 8
    assert three.sha256 == read(CalibrationData(path)).sha256


@torch.no_grad()
def test_logits_are_those_of_the_training_forward_pass(tmp_path: Path) -> None:
    path = write_set(tmp_path, rows=3)
    data, model, vlm = read(CalibrationData(path)), open_streamed(STUDENT), load_vlm(STUDENT)
    states = decoder_inputs(model, data.conversations)
    for number in range(len(vlm.language_model.layers)):
        states = through_layer(model, number, states)
    found = answer_logits(model, states, data.conversations)
    wanted, processing = [], read_processing(STUDENT)
    tokenizer = open_tokenizer(processing.tokenizer, STUDENT)
    for row, one in zip(read_rows(path), data.conversations, strict=True):
        ids, labels = encode_row(row, processing, tokenizer)
        seen = None if one.pixels is None else vlm.encode_images(one.pixels)
        expanded = vlm.expand(torch.tensor([ids]), visual_tokens=seen, labels=torch.tensor([labels]))
        states = vlm.language_model(inputs_embeds=expanded.inputs_embeds, use_cache=False).last_hidden_state
        assert expanded.labels is not None
        predicting = expanded.labels[0, 1:] != IGNORED
        wanted.append(vlm.lm_head(states[0, :-1][predicting]))
    assert torch.allclose(found, torch.cat(wanted), atol=2e-4)


def test_nothing_to_calibrate_on(tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    path.write_text("[]")
    with pytest.raises(UsageError, match="holds no row"):
        read(CalibrationData(path))
    with pytest.raises(UsageError, match="--calibration-rows 0 leaves nothing"):
        read(CalibrationData(write_set(tmp_path), rows=0))
    with pytest.raises(UsageError, match="holds no conversation with an answer"):
        read(CalibrationData(write_set(tmp_path)), context_length=20)  # cut before any answer
    path.write_text(json.dumps([{"image": "gone.png", "conversations": []}]))
    with pytest.raises(UsageError, match="row 0"):
        read(CalibrationData(path))
