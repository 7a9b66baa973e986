"""alignkd-export with recipes, methods and budgets: the bundle says what was done, bad options are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bundle.manifest import read_manifest
from export.quantize.blame import BLAME_FILE, Blame
from tests.export.conftest import CONTEXT, STUDENT, Command
from tests.export.quantize.calibration_set import write_set


def test_gptq_from_the_command(run_export: Command, tmp_path: Path) -> None:
    data, out = write_set(tmp_path), tmp_path / "out"
    ran = run_export(
        STUDENT, "--target", "onnx", "--context-length", str(CONTEXT), "--output", out, "--calibration", data, "--json"
    )
    assert ran.code == 0, ran.stderr
    manifest = read_manifest(out)
    assert manifest.recipe is not None and manifest.recipe.calibration is not None
    assert (manifest.recipe.name, manifest.recipe.method, manifest.recipe.calibration.rows) == ("int4", "gptq", 6)
    assert manifest.precision == json.loads(ran.stdout)["precision"] == "int4"
    assert "14 matrices: codes chosen by gptq" in ran.stderr
    assert not (out / BLAME_FILE).exists()


def test_a_recipe_for_a_budget(run_export: Command, tmp_path: Path) -> None:
    data, out = write_set(tmp_path), tmp_path / "out"
    budget = ("--recipe", "auto", "--budget-mb", "0.3", "--calibration", data, "--context-length", str(CONTEXT))
    ran = run_export(STUDENT, "--target", "onnx", "--output", out, *budget)
    assert ran.code == 0, ran.stderr
    blame = Blame.model_validate_json((out / BLAME_FILE).read_text(encoding="utf-8"))
    assert {row.bits for row in blame.rows} == {4, 8}
    assert blame.weights_mb <= blame.budget_mb == 0.3
    assert "decoder layer 1 mlp" in ran.stderr and "fix MB" in ran.stderr
    record = read_manifest(out).recipe
    assert record is not None and record.name == "auto" and record.budget_mb == 0.3
    fours = [rule for rule in record.rules if rule.bits == 4]
    assert len(fours) == sum(row.bits == 4 for row in blame.rows)


@pytest.mark.parametrize(
    "options,says",
    [
        (("--int4", "--recipe", "int8"), "leave out --int4"),
        (("--recipe", "auto"), "--recipe auto and --budget-mb N go together"),
        (("--budget-mb", "3"), "--recipe auto and --budget-mb N go together"),
        (("--recipe", "auto", "--budget-mb", "-1"), "--budget-mb -1 is not above 0"),
        (("--recipe", "auto", "--budget-mb", "3"), "give data by --calibration"),
        (("--quant-method", "awq"), "'awq' is unknown; allowed: rtn, hqq, gptq"),
        (("--quant-method", "gptq"), "give data by --calibration"),
        (("--int8", "--quant-method", "hqq"), "chooses 4-bit codes, of which int8 has none"),
        (("--int8", "--calibration", "rows.json"), "--calibration is for --recipe auto"),
        (("--quant-method", "hqq", "--calibration", "rows.json"), "not for hqq of int4"),
        (("--calibration", "missing.json"), "missing.json does not exist"),
        (("--recipe", "missing.yaml"), "is no file and no recipe of ours"),
    ],
)
def test_options_that_do_not_go_together(
    run_export: Command, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    ran = run_export(STUDENT, "--target", "onnx", "--output", tmp_path / "out", *options)
    assert ran.code == 2 and says in ran.error
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_is_too_small_leaves_nothing(run_export: Command, tmp_path: Path) -> None:
    data = write_set(tmp_path)
    before = sorted(tmp_path.iterdir())
    options = ("--recipe", "auto", "--budget-mb", "0.01", "--calibration", data)
    ran = run_export(STUDENT, "--target", "onnx", "--output", tmp_path / "out", *options)
    assert ran.code == 2 and "--budget-mb 0.01 is too little" in ran.error
    assert sorted(tmp_path.iterdir()) == before


def test_a_stopped_export_keeps_its_choice_and_codes(
    run_export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--recipe", "auto", "--budget-mb", "0.3", "--calibration", write_set(tmp_path))
    command = (STUDENT, "--target", "onnx", "--output", tmp_path / "out", "--context-length", str(CONTEXT), *options)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("export.onnx.to_onnx.ModelWriter", stop)
        assert run_export(*command).code == 130
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.work" / "finished" / "codes").iterdir()}
    assert "choice.json" in kept and len(kept) > 1
    with monkeypatch.context() as patched:
        patched.setattr("export.quantize.search.gptq", stop)  # neither is made again
        patched.setattr("export.quantize.decide.Sensitivity", stop)
        ran = run_export(*command)
    assert ran.code == 0, ran.stderr
    assert (tmp_path / "out" / BLAME_FILE).exists()


def test_the_manifest_says_how_a_recipe_of_the_users_stores_each_graph(run_export: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\nrules: [{pattern: 'language_model.*0\\.self_attn.*', bits: 8}, {pattern: 'lm_.*', bits: 4}]\n"
    )
    out = tmp_path / "out"
    ran = run_export(STUDENT, "--target", "onnx", "--recipe", recipe, "--output", out, "--context-length", str(CONTEXT))
    assert ran.code == 0, ran.stderr
    decoder = read_manifest(out).quantization["text_decoder"]
    assert (decoder.weights, decoder.group_size) == ("int4 symmetric; 4 matrices int8 symmetric", 32)
    record = read_manifest(out).recipe
    assert record is not None and (record.name, record.method, record.rules[0].bits) == ("mine", "rtn", 8)
