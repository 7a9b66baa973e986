"""An export that is killed goes on from its finished graphs; one that fails leaves nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from bundle.errors import UsageError
from bundle.manifest import Graph, Manifest, read_manifest
from bundle.staging import sha256_of
from export.frame import ExportJob, export_bundle
from export.job.work_folder import work_folder
from export.onnx import to_onnx
from export.onnx.linear import ModelWriter
from tests.export.conftest import CONTEXT, STUDENT, Exported

Write = Callable[..., Graph]


def export(output: Path, lines: list[str] | None = None, context: int = CONTEXT) -> Manifest:
    told = (lambda line: None) if lines is None else lines.append
    return export_bundle(ExportJob(STUDENT, "onnx", "int4", output, context), progress=told)


def killed_while_writing_the_decoder(output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run an export in a child that SIGKILL ends in the middle of the decoder -> its work folder."""

    def dying(writer: ModelWriter, **_arguments: object) -> Graph:
        writer.vector("language_model.norm.weight")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(to_onnx, "write_decoder", dying)
        child = os.fork()
        if child == 0:
            export(output)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not output.exists()
    return output.with_name(f"{output.name}.work")


def test_after_a_kill_only_the_unfinished_graph_is_made(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = read_manifest(exported("onnx", "int4"))
    work = killed_while_writing_the_decoder(tmp_path / "out", monkeypatch)
    assert {note.stem for note in (work / "finished").iterdir()} == {"vision_encoder", "token_embedding"}
    assert (work / "bundle" / "onnx" / "decoder_model_merged_q4.onnx_data").exists()  # half of it

    def never(*_arguments: object, **_named: object) -> Graph:
        raise AssertionError("a finished graph is made again")

    monkeypatch.setattr(to_onnx, "write_vision_encoder", never)
    monkeypatch.setattr(to_onnx, "write_embedding", never)
    lines: list[str] = []
    again = export(tmp_path / "out", lines)
    assert (again.files, again.graphs) == (straight.files, straight.graphs)  # as if nothing had happened
    assert sum("is whole from the run before" in line for line in lines) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_finished_graph_that_was_changed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = killed_while_writing_the_decoder(tmp_path / "out", monkeypatch)
    data = work / "bundle" / "onnx" / "vision_encoder_q4.onnx_data"
    whole = sha256_of(data)
    with data.open("r+b") as file:
        file.seek(5000)
        file.write(b"spoilt")
    export(tmp_path / "out")
    assert sha256_of(tmp_path / "out" / "onnx" / "vision_encoder_q4.onnx_data") == whole


def test_another_job_does_not_go_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = killed_while_writing_the_decoder(tmp_path / "out", monkeypatch)
    with pytest.raises(UsageError) as refused:
        export(tmp_path / "out", context=CONTEXT + 1)
    assert str(refused.value) == (
        f"an unfinished export of another kind lies in {work} (context_length was {CONTEXT}, is {CONTEXT + 1}); "
        "remove it and run again"
    )
    assert (work / "finished" / "vision_encoder.json").exists()


def test_ctrl_c_keeps_finished_graphs_and_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt), work_folder(tmp_path / "out", {"a": 1}, lines.append) as work:
        (work.bundle / "whole.onnx").write_bytes(b"whole")
        work.finish("text_decoder", [work.bundle / "whole.onnx"], {"rows": 3})
        (work.bundle / "half").write_bytes(b"ha")
        raise KeyboardInterrupt
    assert len(lines) == 1 and "the same command goes on from there" in lines[0]
    with work_folder(tmp_path / "out", {"a": 1}, lines.append) as work:
        assert work.finished("text_decoder") == {"rows": 3} and work.finished("vision_encoder") is None
        assert [path.name for path in work.bundle.iterdir()] == ["whole.onnx"]
    assert (tmp_path / "out" / "whole.onnx").read_bytes() == b"whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, UsageError])
def test_without_a_finished_graph_nothing_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), work_folder(tmp_path / "out", {}, lambda line: None) as work:
        (work.bundle / "half").write_bytes(b"ha")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_nothing_even_of_finished_graphs(tmp_path: Path) -> None:
    with pytest.raises(OSError), work_folder(tmp_path / "out", {}, lambda line: None) as work:
        (work.bundle / "whole").write_bytes(b"w")
        work.finish("text_decoder", [work.bundle / "whole"], {})
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_two_at_once(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", {}, lambda line: None):
        with pytest.raises(UsageError, match="another export is writing .*out"):
            with work_folder(tmp_path / "out", {}, lambda line: None):
                raise AssertionError
        assert (tmp_path / "out.work").is_dir()
    assert (tmp_path / "out").is_dir()
