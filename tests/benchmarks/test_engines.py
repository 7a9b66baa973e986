"""The benchmark of engines: a tiny bundle end to end, a peer that cannot be had, the table's arithmetic, the limits."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
STUDENT = Path(__file__).parents[1] / "golden" / "reference" / "student"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the benchmark, as its script imports it."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"engines.{name}")

    return load


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The two configs of MobileVLM V2 1.7B's shapes: all that the limits are computed from."""
    folder = tmp_path / "checkpoint"
    (folder / "clip").mkdir(parents=True)
    text = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "vocab_size": 32000}
    text |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "image_size": 336}
    (folder / "config.json").write_text(json.dumps(text))
    (folder / "clip" / "config.json").write_text(json.dumps({**tower, "patch_size": 14}))
    (folder / "clip" / "preprocessor_config.json").write_text("{}")
    return folder


def test_a_bundle_is_measured_and_a_peer_that_fails_is_one_line(
    part: Any,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from export.frame import ExportJob, export_bundle

    bundle = tmp_path / "bundle"
    export_bundle(ExportJob(STUDENT, "onnx", "int4", bundle, 320, "tiny"), progress=lambda line: None)
    command, peers = part("command"), part("peers")
    broken = peers.Environment("broken", ("./no-such-package-here",))
    peer = peers.Peer("broken engine", broken, ("{python}", "-c", "pass"), "genai_engine.py", ".")
    monkeypatch.setitem(peers.PEERS, "mnn", peer)
    monkeypatch.setattr(command, "measure_limit", lambda threads, folder: "machine limits not measured: a test")
    output = tmp_path / "table"
    flags = ["--checkpoint", checkpoint, "--bundles", bundle, "--cache", tmp_path / "cache", "--output", output]
    flags += ["--peers", "mnn", "--threads", "1", "--rounds", "2", "--repeats", "1"]
    command.main([*map(str, flags), "--prompt-tokens", "8", "--new-tokens", "3"])

    printed, facts = capsys.readouterr().out, json.loads(output.with_suffix(".json").read_text())
    assert output.with_suffix(".md").read_text() == printed
    assert "broken engine: not measured, broken cannot be installed (" in printed and "no-such-package" in printed
    assert "machine limits not measured: a test" in printed
    parts = [(sample["round"], sample["part"]) for sample in facts["samples"]]
    assert parts == [(0, "vision"), (0, "text"), (1, "vision"), (1, "text")]
    assert all(sample["failure"] == "" for sample in facts["samples"])
    for sample in facts["samples"]:
        answer = sample["answer"]
        assert answer["peak_bytes"] > answer["anonymous_bytes"] > 1e7 and answer["engine"].startswith("onnxruntime ")
        assert len(answer["encode_s"]) == (sample["part"] == "vision")
        assert len(answer["prefill_s"]) == len(answer["decode_s"]) == (sample["part"] == "text")
    row = next(line for line in printed.splitlines() if line.startswith("| **alignkd tiny**"))
    sizes = [float(cell) for cell in row.strip("| ").split("|")[-2:]]
    graphs = {name: (bundle / "onnx" / name).stat().st_size for name in ("vision_encoder_q4.onnx_data",)}
    assert sizes[1] == round(sum(graphs.values()) / 1e6) and "–" not in row


def sample(part: Any, label: str, kind: str, number: int, **answer: Any) -> Any:
    return part("rounds").Sample(label, kind, 1, number, 0.5, part("drivers.protocol").Answer(**answer))


@pytest.fixture
def measured(part: Any, tmp_path: Path) -> tuple[Any, list[Any], list[Any]]:
    """Ours and two peers: work, contestants, samples."""
    rounds = part("rounds")
    work = rounds.Work(100, 10, 50, 28, 2, 1, (1,))
    contestants = []
    for label, ours, size in (("ours", True, 2_000_000), ("L", False, 4_000_000), ("M", False, 1_000_000)):
        file = tmp_path / label
        file.write_bytes(bytes(size))
        contestants.append(rounds.Contestant(label, Path("python"), "d.py", file, {"text": [file]}, {}, ours=ours))
    samples = [
        sample(part, "ours", "text", 0, load_s=1.0, prefill_s=[0.5], decode_s=[0.2], peak_bytes=3_000_000),
        sample(part, "ours", "text", 1, load_s=3.0, prefill_s=[0.25], decode_s=[0.2], peak_bytes=3_000_000),
        sample(part, "ours", "vision", 0, encode_s=[0.2], peak_bytes=1_000_000),
        sample(part, "L", "text", 0, load_s=1.0, prefill_s=[1.0], decode_s=[0.25], peak_bytes=6_000_000),
        sample(part, "L", "vision", 0, encode_s=[1.0], peak_bytes=1_000_000),
        sample(part, "M", "text", 0, load_s=1.0, prefill_s=[2.0], decode_s=[0.1], peak_bytes=2_000_000),
    ]
    return work, contestants, samples


def test_the_table_has_medians_and_ratios_to_ours(part: Any, measured: tuple[Any, list[Any], list[Any]]) -> None:
    work, contestants, samples = measured
    table = part("table")
    found = table.medians(samples, work, 1)
    assert found["ours"]["prefill"] == 300.0 and found["ours"]["decode"] == 50.0 and found["ours"]["load_s"] == 2.0
    lines = table.markdown(found, contestants, 1).splitlines()
    assert lines[0] == "1 thread"
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines[4:]}
    assert cells["**ours**"][:5] == ["0.20", "300", "50.0", "2.00", "3"]
    assert cells["L"][:5] == ["1.00 (5.00x)", "100 (0.33x)", "40.0 (0.80x)", "1.00 (0.50x)", "6 (2.00x)"]
    assert cells["M"][0] == "–" and cells["M"][-2:] == ["1", "–"]


def test_aims_say_by_how_much_they_are_met_or_missed(part: Any, measured: tuple[Any, list[Any], list[Any]]) -> None:
    work, contestants, samples = measured
    table = part("table")
    lines = table.aims(table.medians(samples, work, 1), contestants, {"llama.cpp": "L", "mnn": "M"}).splitlines()
    assert lines == [
        "- vision s: 0.20x of llama.cpp (aim: at most 0.25x): met",
        "- prefill tokens/s: 3.00x of llama.cpp (aim: at least 1.5x): met",
        "- decode tokens/s: 0.50x of the best peer (aim: at least 1.15x): missed",
        "- peak MB: 1.50x of mnn (aim: at most 1.1x): missed",
        "- files, text and vision: 0.50x of llama.cpp (aim: at most 1x): met",
    ]


def test_limits_follow_from_the_shapes(part: Any, checkpoint: Path) -> None:
    limits = part("limits")
    model = limits.arithmetic(checkpoint)
    assert model.decoder_weights == 24 * (4 * 2048**2 + 3 * 2048 * 5632) + 2048 * 32000
    assert model.vision_operations == pytest.approx(373e9, rel=0.01)  # 23 layers on 577 rows, projector on 576
    assert model.cache_bytes_per_row == 196_608
    allowed = model.limits(limits.Limit(2, 67.7, 1.89), 256, 64)
    assert allowed["vision_s"] == pytest.approx(0.197, rel=0.01)
    assert allowed["prefill"] == pytest.approx(1.89e12 / (2 * model.decoder_weights + 4 * 24 * 2048 * 128))
    assert allowed["decode"] == pytest.approx(67.7e9 / (model.decoder_weights * 4.5 / 8 + 196_608 * 288))


def test_a_missing_checkpoint_is_one_line(part: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--checkpoint", tmp_path, "--bundles", tmp_path, "--cache", tmp_path, "--output", tmp_path / "t"]
    with pytest.raises(SystemExit) as stopped:
        part("command").main([str(flag) for flag in flags])
    assert stopped.value.code == 2
    assert "make_real_size_checkpoint.py --output" in capsys.readouterr().err
