"""bundle.verify and alignkd-verify on a numpy runtime: the first bad stage, files by name, exit codes, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bundle import constants, image, verify_cli
from bundle.errors import BackendMissingError, UsageError, VerificationError, missing_extra
from bundle.golden import read_golden, write_golden
from bundle.manifest import MANIFEST_FILE, STAGES, read_manifest
from bundle.processor import host_family
from bundle.replay import relative_error
from bundle.runtimes import registry
from bundle.verify import verify_bundle


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """alignkd-verify, in this process -> exit code, stdout, stderr."""
    monkeypatch.setattr("sys.argv", ["alignkd-verify", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        verify_cli.main()
    out, err = capsys.readouterr()
    assert isinstance(leaving.value.code, int)
    return leaving.value.code, out, err


def first_bad(bundle: Path) -> str | None:
    (verdict,) = verify_bundle(bundle)
    return verdict.first_bad.stage if verdict.first_bad else None


def test_a_whole_bundle_passes_every_stage(numpy_bundle: Path, numpy_module: Any) -> None:
    (verdict,) = verify_bundle(numpy_bundle)
    assert [result.stage for result in verdict.stages] == list(STAGES)
    assert verdict.first_bad is None and all(result.error < 1e-6 for result in verdict.stages)
    assert (verdict.runtime, verdict.covers) == ("numpy", "the test's own arithmetic")
    assert numpy_module.runtime.closed


@pytest.mark.parametrize(
    ("graph", "stage"),
    [
        ("encode_image", "visual_tokens"),
        ("embed", "embeddings"),
        ("prefill", "first_logits"),
        ("decode", "greedy_tokens"),
    ],
)
@pytest.mark.parametrize("size", [1e-3, float("nan")])
def test_a_fault_is_named_by_the_stage_it_arises_in(
    numpy_bundle: Path, numpy_module: Any, graph: str, stage: str, size: float
) -> None:
    numpy_module.runtime.faults[graph] = lambda output: output + np.float32(size) * np.roll(output, 1, -1)
    assert first_bad(numpy_bundle) == stage


def test_an_output_of_another_shape_is_out_of_tolerance(numpy_bundle: Path, numpy_module: Any) -> None:
    numpy_module.runtime.faults["encode_image"] = lambda output: output[:, 1:]
    assert first_bad(numpy_bundle) == "visual_tokens"


def test_a_sure_token_that_changes_is_an_error_even_within_the_norm(
    numpy_bundle: Path, numpy_module: Any, rehash: Callable[..., None]
) -> None:
    def swap_the_top_two(logits: np.ndarray) -> np.ndarray:
        second, first = np.argsort(logits)[-2:]
        swapped = logits.copy()
        swapped[[first, second]] = logits[[second, first]]
        return swapped

    numpy_module.runtime.faults["decode"] = swap_the_top_two
    golden = read_manifest(numpy_bundle).golden
    for tolerance, stage in ((0.5, None), (0.04, "greedy_tokens")):  # at 0.5 no token of this model is sure
        rehash(
            numpy_bundle,
            golden=golden.model_copy(
                update={
                    "tolerances": {
                        family: row | {"greedy_tokens": tolerance} for family, row in golden.tolerances.items()
                    }
                }
            ),
        )
        assert first_bad(numpy_bundle) == stage


def test_bilinear_instead_of_bicubic_is_stage_pixels(numpy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(image.FILTERS, "bicubic", Image.Resampling.BILINEAR)
    assert first_bad(numpy_bundle) == "pixels"


@pytest.mark.parametrize("change", [{"strategy": "stretch"}, {"pad_rgb": (0, 0, 0)}, {"std": (0.25, 0.25, 0.2501)}])
def test_another_preprocessing_in_the_manifest_is_stage_pixels(
    numpy_bundle: Path, rehash: Callable[..., None], change: dict
) -> None:
    rehash(numpy_bundle, image=read_manifest(numpy_bundle).image.model_copy(update=change))
    assert first_bad(numpy_bundle) == "pixels"


@pytest.mark.parametrize("change", [{"suffix": " ASSISTANT: "}, {"prefix": "USER: "}, {"after_image": ""}])
def test_another_prompt_in_the_manifest_is_stage_prompt(
    numpy_bundle: Path, rehash: Callable[..., None], change: dict
) -> None:
    rehash(numpy_bundle, prompt=read_manifest(numpy_bundle).prompt.model_copy(update=change))
    assert first_bad(numpy_bundle) == "prompt"


def test_relative_error() -> None:
    wanted = np.array([3.0, 4.0], dtype=np.float32)
    assert relative_error(wanted, wanted) == 0
    assert relative_error(np.array([[3.0], [4.5]], dtype=np.float32), wanted) == pytest.approx(0.1)
    assert relative_error(np.array([3.0, np.inf], dtype=np.float32), wanted) == float("inf")
    assert relative_error(wanted[:1], wanted) == float("inf")
    assert relative_error(np.zeros(2, dtype=np.float32), np.zeros(2, dtype=np.float32)) == 0


def test_the_command_prints_the_ladder_and_exits_0(numpy_bundle: Path, capsys: Any, monkeypatch: Any) -> None:
    code, out, err = run(capsys, monkeypatch, numpy_bundle, "--json")
    assert (code, err) == (0, "")
    assert all(stage in out for stage in STAGES)
    assert "every stage is within tolerance" in out and "covers: the test's own arithmetic" in out
    assert "64 of 64 answer tokens are the checkpoint's in float32" in out
    last = json.loads(out.splitlines()[-1])
    assert last["ok"] is True and last["verdicts"][0]["first_bad_stage"] is None
    assert [row["stage"] for row in last["verdicts"][0]["stages"]] == list(STAGES)


def test_the_command_names_the_stage_and_exits_3(
    numpy_bundle: Path, numpy_module: Any, capsys: Any, monkeypatch: Any
) -> None:
    numpy_module.runtime.faults["decode"] = lambda output: output * np.float32("nan")
    code, out, err = run(capsys, monkeypatch, numpy_bundle, "--json")
    assert code == 3
    assert "first out of tolerance: greedy_tokens" in out and "kind:  graph" in out and "KV cache" in out
    assert "stage 'greedy_tokens', kind graph: inf" in err and "(on numpy)" in err and err.count("\n") == 1
    verdict = json.loads(out.splitlines()[-1])["verdicts"][0]
    assert verdict["first_bad_stage"] == "greedy_tokens"
    last = verdict["stages"][-1]
    assert (last["stage"], last["error"], last["tolerance"], last["ok"]) == ("greedy_tokens", None, 1e-5, False)
    assert (last["quantization_error"], last["where"]) == (0.0, "case 'stripes', answer token 1")


def truncate(bundle: Path) -> None:
    (bundle / "text_decoder.bin").write_bytes((bundle / "text_decoder.bin").read_bytes()[:-1])


def flip_a_bit(bundle: Path) -> None:
    content = bytearray((bundle / "text_decoder.bin").read_bytes())
    content[3] ^= 1
    (bundle / "text_decoder.bin").write_bytes(content)


def remove(bundle: Path) -> None:
    (bundle / "text_decoder.bin").unlink()


def replace_by_a_link(bundle: Path) -> None:
    (bundle / "text_decoder.bin").rename(bundle.parent / "outside.bin")
    (bundle / "text_decoder.bin").symlink_to(bundle.parent / "outside.bin")


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (truncate, 3, "has 143 bytes, the manifest says 144"),
        (flip_a_bit, 3, "was changed"),
        (remove, 3, "is missing"),
        (replace_by_a_link, 2, "leaves its folder"),
    ],
)
def test_a_damaged_file_is_named(
    numpy_bundle: Path, capsys: Any, monkeypatch: Any, damage: Callable[[Path], None], code: int, message: str
) -> None:
    damage(numpy_bundle)
    found, out, err = run(capsys, monkeypatch, numpy_bundle, "--json")
    assert found == code and "text_decoder.bin" in err and message in err and err.count("\n") == 1
    if code == 3:
        assert json.loads(out)["ok"] is False and "text_decoder.bin" in json.loads(out)["problem"]


def test_an_added_file_is_named(numpy_bundle: Path) -> None:
    (numpy_bundle / "golden/extra.txt").write_text("hello")
    with pytest.raises(VerificationError, match="file 'golden/extra.txt' is not listed"):
        verify_bundle(numpy_bundle)


def test_a_changed_manifest(numpy_bundle: Path, capsys: Any, monkeypatch: Any) -> None:
    path = numpy_bundle / MANIFEST_FILE
    whole = path.read_text()
    manifest = json.loads(whole)

    def verify_with(text: str) -> tuple[int, str]:
        path.write_text(text)
        code, _, err = run(capsys, monkeypatch, numpy_bundle)
        assert err.count("\n") == 1
        return code, err

    digest = manifest["files"]["tokenizer.model"]["sha256"]
    other = ("0" if digest[0] != "0" else "1") + digest[1:]
    code, err = verify_with(whole.replace(digest, other))
    assert code == 3 and "file 'tokenizer.model' was changed" in err
    code, err = verify_with(whole.replace("{", "[", 1))
    assert code == 2 and "manifest.json is not JSON" in err
    code, err = verify_with(json.dumps({**manifest, "manifest_version": 3}))
    assert code == 2 and "manifest_version 3" in err and "pip install --upgrade alignkd" in err
    code, err = verify_with(json.dumps({**manifest, "manifest_version": 1, "golden": {"vectors": "v", "cases": "c"}}))
    assert code == 2 and "manifest_version 1, written by an older alignkd; this one reads 2" in err
    code, err = verify_with(
        json.dumps({**manifest, "files": {"../../etc/passwd": manifest["files"]["tokenizer.model"]}})
    )
    assert code == 2 and "'../../etc/passwd' leaves its folder" in err
    code, err = verify_with(json.dumps({**manifest, "surprise": 1}))
    assert code == 2 and "field 'surprise'" in err
    golden = {**manifest["golden"], "tolerances": {host_family(): {"prompt": 0}}}
    code, err = verify_with(json.dumps({**manifest, "golden": golden}))
    assert code == 2 and "no tolerance for stage 'pixels'" in err
    golden = {**manifest["golden"], "tolerances": {"apple": {}}}
    code, err = verify_with(json.dumps({**manifest, "golden": golden}))
    assert code == 2 and f"no tolerances for '{host_family()}'" in err and "it has them for apple" in err


def test_no_runtime_here_is_exit_6(numpy_bundle: Path, numpy_module: Any, capsys: Any, monkeypatch: Any) -> None:
    numpy_module.reason = "runs on macOS only"
    code, out, err = run(capsys, monkeypatch, numpy_bundle)
    assert code == 6 and out == ""
    assert "no runtime on this host for target 'onnx' (numpy: runs on macOS only)" in err


def test_a_runtime_that_is_not_here_is_listed_with_its_reason(
    numpy_bundle: Path, numpy_module: Any, capsys: Any, monkeypatch: Any
) -> None:
    absent = type(numpy_module)(numpy_module.runtime, "runs on macOS only")
    here, there = registry.RUNTIMES["onnx"][0], registry.RuntimeEntry("absent", lambda: absent)
    monkeypatch.setitem(registry.RUNTIMES, "onnx", (there, here))
    code, out, _ = run(capsys, monkeypatch, numpy_bundle, "--json")
    assert code == 0 and "absent: not run here (runs on macOS only)" in out
    assert json.loads(out.splitlines()[-1])["skipped"] == [{"runtime": "absent", "reason": "runs on macOS only"}]
    with pytest.raises(BackendMissingError, match="absent: runs on macOS only"):
        verify_bundle(numpy_bundle, runtimes=("absent",))
    with pytest.raises(UsageError, match="runtime 'tpu' does not run bundles for 'onnx'; allowed: absent, numpy"):
        verify_bundle(numpy_bundle, runtimes=("tpu",))


def test_weights_further_than_rounding_are_kind_quantization(
    numpy_bundle: Path, numpy_module: Any, rehash: Callable[..., None]
) -> None:
    manifest = read_manifest(numpy_bundle)
    recording = read_golden(numpy_bundle, manifest)
    in_float = dict(recording.sets["float"])
    in_float["text.first_logits"] = in_float["text.first_logits"] * np.float32(1.25)
    files = write_golden(numpy_bundle, recording.cases, {"float": in_float, "dequantized": recording.sets["float"]})
    rehash(numpy_bundle, golden=manifest.golden.model_copy(update={"vectors": files}))
    (verdict,) = verify_bundle(numpy_bundle)
    assert verdict.diagnosis is not None
    assert (verdict.diagnosis.stage, verdict.diagnosis.kind) == ("first_logits", "quantization")
    assert "further from the checkpoint's than rounding to fp32" in verdict.diagnosis.cause
    row = next(row for row in verdict.stages if row.stage == "first_logits")
    assert row.error <= row.tolerance and row.quantization_error == pytest.approx(0.2)
    assert row.total_error == pytest.approx(0.2), "the runtime computes what the files hold"


def test_a_changed_constant_is_told_from_a_changed_graph(
    numpy_bundle: Path, numpy_module: Any, rehash: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    numpy_module.runtime.faults["prefill"] = lambda output: output * np.float32(1.1)
    (verdict,) = verify_bundle(numpy_bundle)
    assert verdict.diagnosis is not None and verdict.diagnosis.kind == "graph"
    assert "look at rotary base" in verdict.diagnosis.cause and "--fp32" in verdict.diagnosis.next_step
    assert verdict.diagnosis.measured.startswith("1.00e-01, 10000.0 times the tolerance 1.00e-05 (case '")
    flip_a_bit(numpy_bundle)
    rehash(numpy_bundle)
    (verdict,) = verify_bundle(numpy_bundle)
    assert verdict.diagnosis is not None and verdict.diagnosis.kind == "quantization"
    assert "1 constants of text_decoder.bin are not those of the recording: weights" in verdict.diagnosis.cause

    def absent(path: Path) -> Any:
        raise missing_extra("onnx", "onnx")

    monkeypatch.setitem(constants.READERS, "onnx", absent)
    (verdict,) = verify_bundle(numpy_bundle)
    assert verdict.diagnosis is not None and verdict.diagnosis.kind == "graph"
    assert "not checked whether its weights changed: the package 'onnx' is not installed" in verdict.diagnosis.cause


def test_tolerances_can_be_scaled_to_measure(
    numpy_bundle: Path, numpy_module: Any, capsys: Any, monkeypatch: Any
) -> None:
    numpy_module.runtime.faults["embed"] = lambda output: output * np.float32(1 + 3e-5)
    assert run(capsys, monkeypatch, numpy_bundle)[0] == 3
    code, out, _ = run(capsys, monkeypatch, numpy_bundle, "--tolerance-scale", 100, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["verdicts"][0]["stages"][3]["tolerance"] == 1e-3


def test_flags_of_a_comparison_need_one(numpy_bundle: Path, capsys: Any, monkeypatch: Any) -> None:
    code, _, err = run(capsys, monkeypatch, numpy_bundle, "--min-agreement", 0.5)
    assert code == 2 and "--cases and --min-agreement need --compare OTHER" in err
