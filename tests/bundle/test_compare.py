"""alignkd-verify A --compare B: agreement token by token, first divergence, gates, and what cannot be compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle import verify_cli
from bundle.agreement import divergence_of
from bundle.compare import compare_bundles
from bundle.manifest import Manifest, read_manifest, write_manifest
from bundle.runtimes import registry
from bundle.runtimes.contract import Floats
from tests.bundle.conftest import NumpyRuntime

Faults = dict[str, Callable[[Floats], Floats]]


@dataclass
class Two:
    """Two bundle directories, and what the runtime of the second does wrong."""

    first: Path
    second: Path
    faults: Faults = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)

    def available(self) -> str | None:
        return None

    def open_runtime(self, bundle: Path, manifest: Manifest, threads: int | None) -> NumpyRuntime:
        self.opened.append(bundle.name)
        return NumpyRuntime(faults=self.faults if bundle == self.second else {})


@pytest.fixture
def two(numpy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Two:
    pair = Two(numpy_bundle, Path(shutil.copytree(numpy_bundle, tmp_path / "other")))
    monkeypatch.setitem(registry.RUNTIMES, "onnx", (registry.RuntimeEntry("numpy", lambda: pair),))
    return pair


@pytest.fixture
def command(
    two: Two, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """alignkd-verify FIRST --compare SECOND in this process -> exit code, stdout, the error line."""

    def run(*more: object) -> tuple[int, str, str]:
        monkeypatch.setattr(
            "sys.argv", ["alignkd-verify", str(two.first), "--compare", str(two.second), *map(str, more)]
        )
        with pytest.raises(SystemExit) as leaving:
            verify_cli.main()
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) <= 1
        return int(str(leaving.value.code)), out, errors[0] if errors else ""

    return run


def change(bundle: Path, **parts: object) -> None:
    write_manifest(bundle, read_manifest(bundle).model_copy(update=parts))


def test_a_bundle_agrees_with_its_copy(two: Two) -> None:
    found = compare_bundles(two.first, two.second)
    assert [each.question.name for each in found.questions] == ["stripes", "text"], "golden cases of both, once"
    assert found.agreement == found.match_rate == 1.0 and found.same_answers == 2 and found.first_divergence is None
    assert found.tokens == sum(each.tokens for each in found.questions) and max(found.kl) == 0.0
    assert all(found.worst(stage) == 0 for stage in ("visual_tokens", "embeddings", "first_logits", "answer_logits"))
    assert two.opened == ["numpy-bundle", "other"], "one after the other"


def test_the_first_divergence_is_where_one_token_was_changed(two: Two) -> None:
    calls = 0

    def at_the_fifth(logits: Floats) -> Floats:
        nonlocal calls
        calls += 1
        if calls != 4:  # calls of decode behind the prefill: answer token 4 of the first question
            return logits
        changed = logits.copy()
        changed[logits.argmin()] = logits.max() + 0.5
        return changed

    two.faults["decode"] = at_the_fifth
    found = compare_bundles(two.first, two.second)
    first = found.first_divergence
    assert first is not None and (first.question, first.position) == ("stripes", 4)
    assert first.margins[1] == pytest.approx(0.5) and first.margins[0] > 0 and first.tokens[0] != first.tokens[1]
    stripes, text = found.questions
    assert (stripes.agreed, text.agreed) == (stripes.tokens - 1, text.tokens)
    assert stripes.kl[4] > 0.1 and sum(stripes.kl) == pytest.approx(stripes.kl[4]), "fed the first bundle's tokens"
    assert found.agreement == 1 - 1 / found.tokens


def test_a_fault_shows_in_its_stage_and_all_behind(two: Two) -> None:
    two.faults["encode_image"] = lambda visual: visual * np.float32(1.1)
    found = compare_bundles(two.first, two.second)
    assert found.worst("visual_tokens") == pytest.approx(0.1, rel=1e-4) and found.worst("embeddings") == 0
    assert "visual_tokens" not in found.questions[1].errors, "no picture"


def test_kl_known_answers() -> None:
    even, sure = np.zeros((1, 2), np.float32), np.array([[np.log(3.0), 0.0]], np.float32)
    assert divergence_of(even, even) == pytest.approx([0.0])
    assert divergence_of(even, sure) == pytest.approx([0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)], rel=1e-5)
    assert divergence_of(sure * 1000, sure * 1000 + 5) == pytest.approx([0.0])


def test_the_table_and_the_json(two: Two, command: Callable[..., tuple[int, str, str]]) -> None:
    two.faults["decode"] = lambda logits: np.roll(logits, 1)
    code, out, _ = command("--json", "--max-new-tokens", 5)
    assert code == 0
    assert "first divergence: stripes, answer token 1" in out and "same place" in out
    row = json.loads(out.splitlines()[-1])
    assert row["tokens"] == 10 and row["agreement"] == 0.2 and row["ok"] is True
    assert row["first_divergence"]["position"] == 1 and len(row["questions"][0]["kl_nats"]) == 5
    assert row["relative_error"]["first_logits"] == 0 < row["relative_error"]["answer_logits"]


def test_the_gate(two: Two, command: Callable[..., tuple[int, str, str]]) -> None:
    assert command("--min-agreement", 1)[0] == 0
    two.faults["decode"] = lambda logits: np.roll(logits, 1)
    code, out, error = command("--min-agreement", 0.9, "--max-new-tokens", 5, "--json")
    assert code == 3 and "agrees with" in error and "20.0% of 10 answer tokens" in error and "90.0%" in error
    assert json.loads(out.splitlines()[-1])["ok"] is False
    assert command("--min-agreement", 0.2, "--max-new-tokens", 5)[0] == 0


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("prompt", "prompt template, suffix is ' ASSISTANT:' and ' ASSISTANT: '"),
        ("image", "image rule, strategy is 'pad' and 'crop'"),
        ("model", "vocabulary size is 512 and 513"),
        ("tokenizer", "BOS id is 1 and 7"),
    ],
)
def test_bundles_that_are_not_asked_the_same(
    part: str, message: str, two: Two, command: Callable[..., tuple[int, str, str]]
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "prompt": {"suffix": " ASSISTANT: "},
        "image": {"strategy": "crop"},
        "model": {"vocab_size": 513},
        "tokenizer": {"bos_id": 7},
    }
    whole = getattr(read_manifest(two.second), part)
    change(two.second, **{part: whole.model_copy(update=changes[part])})
    code, out, error = command()
    assert code == 5 and message in error and out == "" and not two.opened


def test_another_tokenizer_of_the_same_size(
    two: Two, rehash: Callable[..., None], command: Callable[..., tuple[int, str, str]]
) -> None:
    path = two.second / "tokenizer.model"
    path.write_bytes(path.read_bytes().replace("▁colour".encode(), "▁colouR".encode()))
    rehash(two.second)
    code, _, error = command()
    assert code == 5 and "tokenizer is" in error


def test_questions_of_a_file(two: Two, tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    shutil.copy(two.first / "golden/stripes.png", tmp_path / "p.png")
    file = tmp_path / "cases.jsonl"
    file.write_text('{"question": "Why?", "image": "p.png"}\n\n{"question": "And now?"}\n')
    code, out, _ = command("--cases", file, "--json")
    row = json.loads(out.splitlines()[-1])
    assert code == 0 and [each["name"] for each in row["questions"]] == ["line 1", "line 3"]
    assert "visual_tokens" in row["questions"][0]["relative_error"]
    for content, message in (
        ('{"question": "a"}\nno json', "line 2: Expecting value"),
        ('{"ask": "a"}', "line 1: Field required"),
        ('{"question": "a", "image": "gone.png"}', "gone.png does not exist"),
        ("", "holds no question"),
    ):
        file.write_text(content)
        code, _, error = command("--cases", file)
        assert code == 2 and message in error
    code, _, error = command("--cases", tmp_path / "nowhere.jsonl")
    assert code == 2 and "cannot be read" in error


def test_a_context_that_ends_first(two: Two, command: Callable[..., tuple[int, str, str]]) -> None:
    model = read_manifest(two.second).model
    change(two.second, model=model.model_copy(update={"context_length": 120}))
    found = compare_bundles(two.first, two.second, max_new_tokens=500)
    assert all(each.tokens < 100 for each in found.questions)
    change(two.second, model=model.model_copy(update={"context_length": 20}))
    code, _, error = command()
    assert code == 2 and "longer than a bundle's context" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--min-agreement", "1.5"), "--min-agreement 1.5 must lie between 0 and 1"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0 must be at least 1"),
        (("--tolerance-scale", "0"), "--tolerance-scale 0.0 must be above 0"),
        (("--runtime", "a", "--runtime", "b"), "--compare takes one --runtime, not 2"),
        (("--runtime", "tpu"), "runtime 'tpu' does not run bundles for 'onnx'; allowed: numpy"),
    ],
)
def test_flags_that_cannot_be(
    flags: tuple[str, ...], message: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, error = command(*flags)
    assert code == 2 and message in error
