"""Disk and memory are asked for before any work, and the estimates hold for what exports really take."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import get_args

import psutil
import pytest

from bundle.manifest import ModelShape, Precision, read_manifest
from distill.models.checkpoint import open_checkpoint
from export.job import room
from tests.export.conftest import STUDENT, Command, Exported

GIB = 1 << 30


@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_the_estimate_is_what_the_files_take(exported: Exported, precision: Precision) -> None:
    bundle = exported("onnx", precision)
    taken = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    shapes = {name: weight.shape for name, weight in open_checkpoint(STUDENT)[1].items()}
    vocabulary = read_manifest(bundle).model.vocab_size
    needed = room.disk_needed(shapes, precision, 4, vocabulary)
    assert taken <= needed <= taken + room.SPARE_DISK_BYTES


def test_bytes_of_one_weight_by_precision() -> None:
    shapes = {"language_model.layers.0.mlp.up_proj.weight": (5632, 2048)}
    values = 5632 * 2048
    assert [room.file_bytes(shapes, precision) / values for precision in get_args(Precision)] == [
        0.5 + 4 / 32,
        1 + 4 / 128,
        2,
        4,
    ]


def test_a_1_7b_model_at_int4_fits_into_8_gb() -> None:
    d, f, v = 2048, 5632, 32000
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.embed_tokens.weight": (v, d),
        "lm_head.weight": (v, d),
    }
    for layer in range(24):
        block = f"language_model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{part}_proj.weight": (d, d) for part in "qkvo"}
        shapes |= {f"{block}.mlp.{part}_proj.weight": (f, d) for part in ("gate", "up", "down")}
    model = ModelShape(
        hidden_size=d,
        num_layers=24,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        vocab_size=v,
        context_length=1024,
        visual_tokens=144,
    )
    assert 2 * GIB < room.memory_needed("onnx", shapes, "int4", model) < 4 * GIB
    longer = model.model_copy(update={"context_length": 2048})
    cache = 2 * 24 * 2048 * 1024 * 4
    assert (
        room.memory_needed("onnx", shapes, "int4", longer) - room.memory_needed("onnx", shapes, "int4", model) == cache
    )
    assert room.memory_needed("onnx", shapes, "fp32", model) > 8 * GIB
    lowered = room.memory_needed("executorch", shapes, "int4", model)
    assert 7.0e9 < lowered < 7.3e9, "7.07 GB were measured"
    assert lowered < room.memory_needed("executorch", shapes, "int8", model)

    tower: dict[str, tuple[int, ...]] = {f"vision_tower.{number}": (1000, 1000) for number in range(304)}
    assert 12.2e9 < room.memory_needed("coreml", shapes | tower, "int4", model) < 12.7e9, "12.28 GB were measured"
    assert room.scratch_bytes("onnx", shapes) == 0
    assert 4 * GIB < room.scratch_bytes("coreml", shapes) < 6 * GIB


def refused(run_export: Command, tmp_path: Path) -> str:
    ran = run_export(STUDENT, "--target", "onnx", "--int4", "--output", tmp_path / "deep" / "out")
    assert ran.code == 2 and list(tmp_path.iterdir()) == []
    return ran.error


def test_too_little_disk(run_export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_disk_bytes", lambda folder: 1 << 20)
    line = refused(run_export, tmp_path)
    assert "the bundle takes 0.1 GiB of disk" in line and "has 0.0 GiB free" in line and str(tmp_path) in line


def test_too_little_disk_for_a_conversion(run_export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_disk_bytes", lambda folder: 1 << 20)
    ran = run_export(STUDENT, "--target", "coreml", "--int4", "--output", tmp_path / "out")
    assert ran.code == 2 and list(tmp_path.iterdir()) == []
    assert "of disk and its conversion 0.0 GiB more, " in ran.error


def test_too_little_memory(run_export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory_bytes", lambda: GIB // 4)
    line = refused(run_export, tmp_path)
    assert "the export takes about 1.8 GiB of memory, 0.2 GiB are available" in line and "--context-length" in line


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert room.free_disk_bytes(tmp_path / "a" / "b") == pytest.approx(room.free_disk_bytes(tmp_path), rel=0.01)


@pytest.mark.parametrize("limit,least", [("max", 1 << 20), (str(3 << 30), 1 << 30)])
def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, least: int) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.stat").write_text(f"anon {2 << 30}\nfile {5 << 30}\n")
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    available = room.available_memory_bytes()
    assert available >= least and (limit == "max" or available == 1 << 30)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_goes_back() -> None:
    blocks = [bytearray(100_000) for _ in range(1000)]
    pin = bytearray(100_000)  # keeps the top of the heap
    full = psutil.Process().memory_info().rss
    del blocks
    room.release_free_memory()
    assert psutil.Process().memory_info().rss < full - 50_000_000
    assert len(pin) == 100_000
