"""alignkd-export through its own door: a whole int4 export, and each kind of bad input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from bundle.manifest import check_files, read_manifest
from bundle.session import open_bundle
from bundle.verify import verify_bundle
from distill.models import load_vlm
from distill.models.create import create_vlm
from distill.models.processing import read_processing
from distill.models.save import save_checkpoint
from export import targets
from export.contract import ExportedGraphs, ExportRequest
from export.onnx import activation as onnx_activation
from export.onnx.to_onnx import export_onnx
from tests.export.conftest import CONTEXT, REFERENCE, STUDENT, Command


def test_int4_end_to_end(run_export: Command, tmp_path: Path) -> None:
    bundle = tmp_path / "deep" / "bundle"
    ran = run_export(STUDENT, "--target", "onnx", "--int4", "--output", bundle, "--json", "--context-length", CONTEXT)
    assert ran.code == 0, ran.stderr
    row = json.loads(ran.stdout.splitlines()[-1])
    assert row["bundle"] == str(bundle) and (row["target"], row["precision"]) == ("onnx", "int4")
    assert row["size_bytes"] == sum(
        path.stat().st_size for path in bundle.rglob("*") if path.name != "manifest.json" and path.is_file()
    )
    assert 0 < row["quantization_error"]["visual_tokens"] < 2e-2
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    assert manifest.name == "student-onnx-int4" and manifest.model.context_length == CONTEXT
    assert manifest.source.architecture == "MobileLlamaForCausalLM"
    assert {"torch", "onnxruntime", "python"} <= set(manifest.environment)
    assert manifest.quantization["text_decoder"].group_size == 32
    assert [verdict.first_bad for verdict in verify_bundle(bundle)] == [None]
    vlm = open_bundle(bundle, threads=1)
    assert vlm.generate(bundle / "golden" / "wide.png", "What is this?", max_new_tokens=4).times.prompt_tokens > 144
    vlm.close()


def test_without_a_flag_it_is_int4_and_the_last_line_is_the_path(run_export: Command, tmp_path: Path) -> None:
    ran = run_export(STUDENT, "--target", "onnx", "--output", tmp_path / "b", "--name", "mine")
    assert ran.code == 0 and ran.stdout.splitlines()[-1] == str(tmp_path / "b")
    assert "decoder" in ran.stderr
    manifest = read_manifest(tmp_path / "b")
    assert (manifest.precision, manifest.name, manifest.model.context_length) == ("int4", "mine", 1024)


def refused(run_export: Command, output: Path, *arguments: str | Path, code: int = 2) -> str:
    """Run, expect ``code``, one line and nothing written -> the line."""
    before = sorted(output.parent.rglob("*")) if output.parent.exists() else []
    ran = run_export(*arguments, "--output", output)
    assert ran.code == code, ran.stderr
    assert not ran.stdout
    assert (sorted(output.parent.rglob("*")) if output.parent.exists() else []) == before
    return ran.error


def test_unknown_target(run_export: Command, tmp_path: Path) -> None:
    line = refused(run_export, tmp_path / "out", STUDENT, "--target", "tflite")
    assert "'tflite'" in line and "allowed: executorch, coreml, onnx" in line


def test_two_precisions(run_export: Command, tmp_path: Path) -> None:
    line = refused(run_export, tmp_path / "out", STUDENT, "--target", "onnx", "--int4", "--fp16")
    assert "--int4, --fp16" in line and "allowed: --int4, --int8, --fp16, --fp32" in line


def test_output_exists(run_export: Command, tmp_path: Path) -> None:
    kept = tmp_path / "out"
    kept.mkdir()
    (kept / "mine.txt").write_text("keep me")
    assert "exists already" in refused(run_export, kept, STUDENT, "--target", "onnx")
    assert (kept / "mine.txt").read_text() == "keep me"


def test_missing_checkpoint(run_export: Command, tmp_path: Path) -> None:
    line = refused(run_export, tmp_path / "out", tmp_path / "nowhere", "--target", "onnx")
    assert "nowhere" in line and "config.json" in line


def copied_student(tmp_path: Path) -> Path:
    """The reference student, its tower beside it, free to be spoilt."""
    shutil.copytree(REFERENCE / "clip-tiny", tmp_path / "checkpoints" / "clip-tiny")
    return Path(shutil.copytree(STUDENT, tmp_path / "checkpoints" / "student"))


def test_checkpoint_without_its_tower(run_export: Command, tmp_path: Path) -> None:
    checkpoint = copied_student(tmp_path)
    shutil.rmtree(checkpoint.parent / "clip-tiny")
    assert "clip-tiny" in refused(run_export, tmp_path / "out", checkpoint, "--target", "onnx")


def test_vocabularies_that_differ(run_export: Command, tmp_path: Path) -> None:
    checkpoint = copied_student(tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    line = refused(run_export, tmp_path / "out", checkpoint, "--target", "onnx")
    assert "512" in line and "400" in line and "tokenizer.model" in line


@pytest.mark.parametrize("length", [100, 4096])
def test_context_length_that_cannot_be(run_export: Command, tmp_path: Path, length: int) -> None:
    line = refused(run_export, tmp_path / "out", STUDENT, "--target", "onnx", "--context-length", str(length))
    assert f"--context-length {length}" in line and "2048" in line


def test_image_size_that_the_tower_does_not_take(run_export: Command, tmp_path: Path) -> None:
    checkpoint = copied_student(tmp_path)
    file = checkpoint.parent / "clip-tiny" / "preprocessor_config.json"
    processor = json.loads(file.read_text())
    file.write_text(json.dumps(processor | {"crop_size": {"height": 224, "width": 224}}))
    line = refused(run_export, tmp_path / "out", checkpoint, "--target", "onnx")
    assert "224" in line and "336" in line


def test_projector_without_an_exporter(run_export: Command, tmp_path: Path) -> None:
    student = load_vlm(STUDENT)
    student.config.projector_type = "ldpnet"
    made = create_vlm(student.config.text_config, student.vision_tower, student.config)
    save_checkpoint(made, tmp_path / "ldp", read_processing(STUDENT))
    line = refused(run_export, tmp_path / "out", tmp_path / "ldp", "--target", "onnx")
    assert "projector 'ldpnet'" in line and "exported are ldpnetv2, linear, mlp2x_gelu" in line


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "torch"])
def test_missing_extra(run_export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("export.frame", "export.golden.recording"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    line = refused(run_export, tmp_path / "out", STUDENT, "--target", "onnx", code=2)
    assert f"'{package}'" in line and "pip install 'alignkd[onnx]'" in line


def test_a_wrong_graph_fails_the_export_and_names_the_stage(
    run_export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(onnx_activation.OPERATORS, "quick_gelu", ("QuickGelu", "com.microsoft", {"alpha": 1.0}))
    line = refused(run_export, tmp_path / "out", STUDENT, "--target", "onnx", "--int4", code=3)
    assert "stage 'visual_tokens', kind graph: " in line and "times the tolerance" in line
    assert "look at the tower's activation" in line and "was not written" in line


def test_wrongly_packed_weights_fail_the_export_and_are_named(
    run_export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "language_model.layers.1.mlp.up_proj.weight"

    def faulty(request: ExportRequest) -> ExportedGraphs:
        written = export_onnx(request)
        weights: dict[str, torch.Tensor] = dict(written.dequantized)
        weights[name] = weights[name].flip(0)
        return ExportedGraphs(written.graphs, written.quantization, weights)

    monkeypatch.setitem(targets.TARGETS, "onnx", lambda: faulty)
    line = refused(run_export, tmp_path / "out", STUDENT, "--target", "onnx", "--int4", code=3)
    assert name in line and "do not hold the checkpoint's weights" in line


def test_a_crash_in_the_exporter_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.frame import ExportJob, export_bundle

    def crashing(request: ExportRequest) -> ExportedGraphs:
        (request.output / "half.onnx").write_bytes(b"half")
        raise RuntimeError("disk on fire")

    monkeypatch.setitem(targets.TARGETS, "onnx", lambda: crashing)
    with pytest.raises(RuntimeError, match="disk on fire"):
        export_bundle(ExportJob(STUDENT, "onnx", "int4", tmp_path / "out"), progress=lambda line: None)
    assert list(tmp_path.iterdir()) == []
