"""Each target's files hold exactly the codes and scales that were chosen, and a code that is not there is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bundle.errors import VerificationError
from bundle.manifest import Target
from distill.models.mobilevlm import MobileVlm
from export.contract import ExportedGraphs, ExportRequest
from export.coreml.to_coreml import GraphExporter
from export.coreml.weights import PackageWeights
from export.executorch.lower import load_operators
from export.executorch.quantize import QuantizedAgain, empty_twin, fill
from export.executorch.to_executorch import source_of
from export.onnx.to_onnx import export_onnx
from export.weights.chosen import ChosenWeights
from export.weights.dequantized import RoundedWeights, check_stored
from export.weights.grid import Coded, storable
from export.weights.lazy import Layered
from export.weights.plan import StoragePlan
from export.weights.recipe import RECIPES, storage_of
from tests.export.conftest import STUDENT
from tests.export.models import random_vlm

HEAD4 = RECIPES["int4-head4"]


def chosen_of(vlm: MobileVlm, folder: Path) -> ChosenWeights:
    """Codes that no rounding would choose: random, and seldom as far as the ends of the range."""
    chosen, random = ChosenWeights(folder), torch.Generator().manual_seed(9)
    for name, weight in vlm.state_dict().items():
        if storage_of(name, tuple(weight.shape), HEAD4).bits == 4:
            rows, columns = weight.shape
            codes = torch.randint(-8, 8, (rows, columns), generator=random, dtype=torch.int8)
            codes[: rows // 2] = codes[: rows // 2].clamp(-5, 4)
            chosen.keep(name, Coded(codes, storable(torch.rand(rows, columns // 32, generator=random) * 0.02)))
    return chosen


def exported(target: Target, tmp_path: Path) -> tuple[MobileVlm, ChosenWeights, ExportedGraphs]:
    vlm, folder = random_vlm(), tmp_path / "bundle"
    folder.mkdir()
    chosen = chosen_of(vlm, tmp_path / "codes")
    request = ExportRequest(
        vlm,
        "int4",
        64,
        STUDENT / "tokenizer.model",
        (2,),
        1,
        folder,
        lambda line: None,
        weights=Layered(chosen, vlm.state_dict()),
        own_recipe=HEAD4,
        chosen=chosen,
    )
    if target == "coreml":
        exporter = GraphExporter(request)
        graph, record, held = exporter.export("text_decoder")
        weights = PackageWeights(held, exporter.shapes)
        return vlm, chosen, ExportedGraphs({"text_decoder": graph}, {"text_decoder": record}, weights)
    if target == "onnx":
        return vlm, chosen, export_onnx(request)
    load_operators()
    source = source_of(request, "text_decoder")
    stored = fill(empty_twin(vlm), "text_decoder", source)
    return vlm, chosen, ExportedGraphs({}, {}, QuantizedAgain(source, stored))


@pytest.mark.parametrize("target", ["onnx", "executorch", "coreml"])
def test_the_files_hold_the_codes(target: Target, tmp_path: Path) -> None:
    vlm, chosen, graphs = exported(target, tmp_path)
    assert len(chosen) == 2 * 7 + 1
    for name in chosen:
        assert torch.equal(graphs.dequantized[name], chosen[name]), name
    check_stored(vlm.state_dict(), graphs.dequantized, StoragePlan(target, "int4", recipe=HEAD4, chosen=chosen))


def test_what_quantization_may_move_is_judged_by_the_chosen_codes(tmp_path: Path) -> None:
    vlm = random_vlm()
    chosen = chosen_of(vlm, tmp_path)
    expected = RoundedWeights(vlm.state_dict(), StoragePlan("onnx", "int4", recipe=HEAD4, chosen=chosen))
    out = torch.empty(vlm.lm_head.weight.shape)
    expected.read_into("lm_head.weight", out)
    assert torch.equal(out, chosen["lm_head.weight"]) and torch.equal(expected["lm_head.weight"], out)
    table = "language_model.embed_tokens.weight"
    assert not torch.equal(expected[table], vlm.state_dict()[table]), "has no codes: rounded"


def test_one_wrong_code_is_found(tmp_path: Path) -> None:
    vlm = random_vlm()
    chosen = chosen_of(vlm, tmp_path)
    name = "language_model.layers.1.mlp.up_proj.weight"
    coded = chosen.coded(name)
    codes = coded.codes.clone()
    codes[3, 40] += -1 if codes[3, 40] > 0 else 1
    plan = StoragePlan("onnx", "int4", recipe=HEAD4, chosen=chosen)
    check_stored(vlm.state_dict(), {name: chosen[name]}, plan)
    with pytest.raises(VerificationError, match="up_proj.weight' is off by up to .* in row 3, group 1"):
        check_stored(vlm.state_dict(), {name: Coded(codes, coded.scales).values()}, plan)
