"""Faults planted into a bundle that alignkd-export wrote: alignkd-verify names stage or file and exits with 3."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bundle import image, verify_cli
from bundle.manifest import GraphName, Precision, file_records, read_manifest, write_manifest

pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

REFERENCE = Path(__file__).parents[1] / "golden/reference"


def export(output: Path, precision: Precision) -> Path:
    from export.frame import ExportJob, export_bundle

    export_bundle(ExportJob(REFERENCE / "student", "onnx", precision, output), lambda line: None)
    return output


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference student as an ONNX bundle in float32, where nothing hides behind a wide tolerance."""
    return export(tmp_path_factory.mktemp("exported") / "student-fp32", "fp32")


@pytest.fixture(scope="session")
def exported_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same at int4, as users ship it."""
    return export(tmp_path_factory.mktemp("exported") / "student-int4", "int4")


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(exported, tmp_path / "spoilt"))


@pytest.fixture
def int4_bundle(exported_int4: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(exported_int4, tmp_path / "spoilt-int4"))


@pytest.fixture
def verify(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], tuple[int, str, Any]]:
    """alignkd-verify --json in this process -> exit code, stderr, the JSON of the last line."""

    def command(folder: Path) -> tuple[int, str, Any]:
        monkeypatch.setattr("sys.argv", ["alignkd-verify", str(folder), "--json"])
        with pytest.raises(SystemExit) as leaving:
            verify_cli.main()
        out, err = capsys.readouterr()
        return int(str(leaving.value.code)), err, json.loads(out.splitlines()[-1])

    return command


def rewrite(folder: Path, **changes: object) -> None:
    """Make the manifest consistent with the files again: what a careless exporter would ship."""
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"files": file_records(folder), **changes}))


def graph_file(folder: Path, graph: GraphName) -> Path:
    return folder / read_manifest(folder).graphs[graph].path


def alter_one_weight(folder: Path, graph: GraphName, element: int) -> Path:
    """Add 1 to one element of the graph's largest float32 weight (at int4: of scales) -> the data file it lies in."""
    import onnx

    path = graph_file(folder, graph)
    model = onnx.load(str(path), load_external_data=False)
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.external_data]
    weights = [tensor for tensor in floats if not tensor.name.startswith("rotary")]  # tables, whose rows few cases read
    largest = max(weights, key=lambda tensor: int(np.prod(tensor.dims)))
    place = {entry.key: entry.value for entry in largest.external_data}
    data = path.parent / place["location"]
    values = np.memmap(data, np.float32, "r+", offset=int(place["offset"]), shape=(int(np.prod(largest.dims)),))
    values[element] += 1.0
    values.flush()
    return data


def swap_key_and_value_caches(folder: Path) -> None:
    """Feed each layer's past keys where its past values belong, and the other way round."""
    import onnx

    path = graph_file(folder, "text_decoder")
    model = onnx.load(str(path), load_external_data=False)
    other = {".key": ".value", ".value": ".key"}
    swapped = 0
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            stem, dot, kind = name.rpartition(".")
            if stem.startswith("past_key_values"):
                node.input[index] = stem + other[dot + kind]
                swapped += 1
    assert swapped >= 2, "the decoder's past inputs are named otherwise"
    path.write_bytes(model.SerializeToString())


def test_the_bundle_is_whole_before(exported: Path, verify: Callable) -> None:
    code, err, result = verify(exported)
    assert (code, err) == (0, "")
    assert all(stage["error"] < 1e-4 for stage in result["verdicts"][0]["stages"])


def test_bilinear_resize_is_stage_pixels(bundle: Path, verify: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(image.FILTERS, "bicubic", Image.Resampling.BILINEAR)
    code, err, result = verify(bundle)
    assert code == 3 and "stage 'pixels', kind preprocessing" in err
    stages = {row["stage"]: row["ok"] for row in result["verdicts"][0]["stages"]}
    assert [stage for stage, ok in stages.items() if not ok] == ["pixels"], "later stages are fed the recorded pixels"


@pytest.mark.parametrize("change", [{"suffix": " ASSISTANT: "}, {"after_image": "\n "}, {"suffix": "ASSISTANT:"}])
def test_a_wrong_space_in_the_prompt_is_stage_prompt(bundle: Path, verify: Callable, change: dict[str, str]) -> None:
    rewrite(bundle, prompt=read_manifest(bundle).prompt.model_copy(update=change))
    code, err, result = verify(bundle)
    assert code == 3 and "stage 'prompt', kind preprocessing" in err
    assert result["verdicts"][0]["first_bad_stage"] == "prompt"


@pytest.mark.parametrize(
    ("graph", "stage", "element"),
    [
        ("vision_encoder", "visual_tokens", 1000),
        ("token_embedding", "embeddings", 64),  # first value of BOS, which every prompt holds
        ("text_decoder", "first_logits", 1000),
    ],
)
def test_one_altered_weight_is_the_stage_of_its_graph(
    bundle: Path, verify: Callable, graph: GraphName, stage: str, element: int
) -> None:
    data = alter_one_weight(bundle, graph, element)
    code, err, _ = verify(bundle)
    assert code == 3 and f"file '{data.relative_to(bundle).as_posix()}' was changed" in err
    rewrite(bundle)
    code, err, result = verify(bundle)
    assert code == 3 and f"stage '{stage}', kind quantization" in err and "are not those of the recording" in err
    assert result["verdicts"][0]["first_bad_stage"] == stage


def test_swapped_key_and_value_caches_are_stage_greedy_tokens(bundle: Path, verify: Callable) -> None:
    swap_key_and_value_caches(bundle)
    rewrite(bundle)
    code, err, result = verify(bundle)
    assert code == 3 and "stage 'greedy_tokens', kind graph" in err and "keys and values swapped" in err
    assert result["verdicts"][0]["first_bad_stage"] == "greedy_tokens", "a prefill starts from empty caches"


def test_faults_in_an_int4_bundle(int4_bundle: Path, verify: Callable) -> None:
    assert verify(int4_bundle)[0] == 0
    swap_key_and_value_caches(int4_bundle)
    rewrite(int4_bundle)
    code, err, _ = verify(int4_bundle)
    assert code == 3 and "stage 'greedy_tokens'" in err
    alter_one_weight(int4_bundle, "text_decoder", 100)
    rewrite(int4_bundle)
    code, err, _ = verify(int4_bundle)
    assert code == 3 and "stage 'first_logits'" in err, "the stage before the swap shows in"
    alter_one_weight(int4_bundle, "vision_encoder", 100)
    rewrite(int4_bundle)
    code, err, _ = verify(int4_bundle)
    assert code == 3 and "stage 'visual_tokens'" in err


def test_another_tokenizer_is_stage_prompt(bundle: Path, verify: Callable) -> None:
    content = (bundle / "tokenizer.model").read_bytes()
    spoilt = content.replace("▁colour".encode(), "▁colouR".encode())
    assert spoilt != content
    (bundle / "tokenizer.model").write_bytes(spoilt)
    rewrite(bundle)
    code, _, result = verify(bundle)
    assert code == 3 and result["verdicts"][0]["first_bad_stage"] == "prompt"


def test_every_truncated_file_is_named(bundle: Path, verify: Callable) -> None:
    for name in read_manifest(bundle).files:
        content = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content[: len(content) // 2])
        code, err, result = verify(bundle)
        assert code == 3 and f"file '{name}' has {len(content) // 2} bytes" in err and not result["ok"]
        (bundle / name).write_bytes(content)


def test_a_graph_truncated_with_its_hash_is_one_line(bundle: Path) -> None:
    path = graph_file(bundle, "text_decoder")
    path.write_bytes(path.read_bytes()[:-500])
    rewrite(bundle)
    command = [sys.executable, "-m", "bundle.verify_cli", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode in (2, 3) and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert path.name in done.stderr


def test_int4_against_fp32_token_by_token(
    exported: Path, exported_int4: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["alignkd-verify", str(exported), "--compare", str(exported_int4), "--json", "--max-new-tokens", "4"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as leaving:
        verify_cli.main()
    out, _ = capsys.readouterr()
    row = json.loads(out.splitlines()[-1])
    assert leaving.value.code == 0 and 0 < row["agreement"] <= 1 and row["tokens"] <= 16
    manifest = read_manifest(exported_int4)
    assert manifest.parity is not None
    # the two runtimes are apart by what the export found between the int4 runtime and the checkpoint in float32
    wanted = manifest.parity.total_error["visual_tokens"]
    assert row["relative_error"]["visual_tokens"] == pytest.approx(wanted, rel=0.02)
    assert row["mean_kl_nats"] > 0
