"""The measuring protocol on a counting runtime, and a real bundle measured in its own process."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_rows import CONTEXT, TOKENIZER_MODEL, VISUAL_TOKENS, CountingRuntime, manifest_of

from bundle.errors import AlignKDError, BackendMissingError, UsageError, VerificationError
from bundle.manifest import MANIFEST_FILE, Manifest, PrefixCache
from bundle.runtimes import registry
from bundle.staging import sha256_of
from bundle.tokenizer import Tokenizer, open_tokenizer
from runtime_bench import probe as probe_module
from runtime_bench.measure import MeasureSettings, check_bundle, choose_runtime, measure_bundle
from runtime_bench.memory import parse_status, read_memory
from runtime_bench.pages import cached_pages, drop_pages
from runtime_bench.probe import ProbeRequest, probe
from runtime_bench.report_table import _prefix_note
from runtime_bench.result import Row
from runtime_bench.workload import make_picture, make_workload, run_once

VOCABULARY = 512
ONE_MS = 1_000_000
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: /proc and posix_fadvise")


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return manifest_of(VOCABULARY)


@pytest.fixture(scope="module")
def tokenizer(manifest: Manifest) -> Tokenizer:
    return open_tokenizer(manifest.tokenizer, TOKENIZER_MODEL.parent)


def ticking(step_ns: int = ONE_MS) -> Callable[[], int]:
    """A clock that goes on by one step each time it is read."""
    return itertools.count(0, step_ns).__next__


def test_one_repeat_does_exactly_the_work_it_reports(manifest: Manifest, tokenizer: Tokenizer) -> None:
    log: list[str] = []
    work = make_workload(manifest, tokenizer, new_tokens=3)
    times = run_once(CountingRuntime(VOCABULARY, log), manifest, tokenizer, work, ticking())
    text = work.prompt_tokens - VISUAL_TOKENS
    one_step = ["embed 1", "decode 1"]
    assert log == [
        "reset",
        "encode [1, 3, 28, 28]",
        f"embed {text}",
        f"decode {work.prompt_tokens}",
        *one_step,
        *one_step,
    ]
    assert [times[stage] for stage in ("preprocess_ms", "prompt_ms", "vision_encode_ms", "embed_ms", "prefill_ms")] == [
        1.0
    ] * 5
    assert (times["first_token_ms"], times["ttft_ms"]) == (1.0, 6.0)
    assert times["prefill_tokens_per_s"] == pytest.approx(1000 * work.prompt_tokens)
    assert (times["decode_ms_per_token"], times["decode_tokens_per_s"]) == (0.5, 2000.0)  # two steps in one tick


def test_a_prefix_cache_saves_its_rows_and_the_whole_prefill_is_measured_too(
    manifest: Manifest, tokenizer: Tokenizer
) -> None:
    ids = make_workload(manifest, tokenizer).token_ids
    known = ids[: ids.index(manifest.tokenizer.image_token_id)]
    with_cache = manifest.model_copy(update={"prefix_cache": PrefixCache(path="p", token_ids=known)})
    log: list[str] = []
    work = make_workload(with_cache, tokenizer, new_tokens=2)
    times = run_once(CountingRuntime(VOCABULARY, log), with_cache, tokenizer, work, ticking())
    assert work.known_tokens == len(known) > 5
    rows = work.prompt_tokens - len(known)
    assert log[0] == f"reset to {len(known)}" and log.index(f"decode {rows}") < log.index("decode 1")
    assert log[-2:] == ["reset", f"decode {work.prompt_tokens}"]
    assert times["prefill_tokens_per_s"] == rows / 1e-3
    assert times["ttft_whole_prefill_ms"] == times["ttft_ms"]  # each took one tick of this clock

    settings = SimpleNamespace(known_tokens=len(known), prompt_tokens=work.prompt_tokens)
    medians = {"ttft_ms": 200.0, "ttft_whole_prefill_ms": 300.0}
    note = _prefix_note("b", SimpleNamespace(settings=settings, median=medians.get))  # type: ignore[arg-type]
    assert note is not None and note.endswith("TTFT 200.0 ms instead of 300.0 (1.50x).")
    assert f"{len(known)} of {work.prompt_tokens} prompt rows" in note


def test_stages_sum_to_the_time_to_first_token(manifest: Manifest, tokenizer: Tokenizer) -> None:
    work = make_workload(manifest, tokenizer, new_tokens=2)
    clock = iter([0, 3, 10, 30, 31, 80, 81, 99])
    times = run_once(CountingRuntime(VOCABULARY, []), manifest, tokenizer, work, lambda: next(clock) * ONE_MS)
    stages = ("preprocess_ms", "prompt_ms", "vision_encode_ms", "embed_ms", "prefill_ms", "first_token_ms")
    assert [times[stage] for stage in stages] == [3, 7, 20, 1, 49, 1]
    assert times["ttft_ms"] == 81 and times["decode_ms_per_token"] == 18


def test_the_prompt_has_the_asked_length_and_one_image(manifest: Manifest, tokenizer: Tokenizer) -> None:
    natural = make_workload(manifest, tokenizer).prompt_tokens
    longer = make_workload(manifest, tokenizer, prompt_tokens=natural + 11)
    assert len(longer.token_ids) - 1 + VISUAL_TOKENS == longer.prompt_tokens == natural + 11
    assert longer.token_ids.count(manifest.tokenizer.image_token_id) == 1
    assert longer.token_ids[0] == manifest.tokenizer.bos_id


def test_a_prompt_that_is_too_short_or_too_long_is_refused(manifest: Manifest, tokenizer: Tokenizer) -> None:
    natural = make_workload(manifest, tokenizer).prompt_tokens
    with pytest.raises(UsageError, match=rf"--prompt-tokens 5 is too short .* allowed: {natural}\.\.{CONTEXT - 31}"):
        make_workload(manifest, tokenizer, prompt_tokens=5)
    make_workload(manifest, tokenizer, prompt_tokens=CONTEXT - 31, new_tokens=32)
    with pytest.raises(UsageError, match=f"do not fit its context of {CONTEXT}"):
        make_workload(manifest, tokenizer, prompt_tokens=CONTEXT - 30, new_tokens=32)


def test_the_picture_is_the_same_everywhere() -> None:
    first, second = make_picture(), make_picture()
    assert first.tobytes() == second.tobytes() and first.size == (640, 480)
    assert first.getpixel((0, 0)) == (35, 14, 202)


def test_probe_warms_up_keeps_every_repeat_and_reloads_last(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def opened(*given: object) -> CountingRuntime:
        log.append("open")
        return CountingRuntime(VOCABULARY, log)

    monkeypatch.setattr(probe_module, "open_runtime", opened)
    response = probe(
        ProbeRequest(bundle=str(bundle), runtime="onnx", warmup=2, repeats=3, load_repeats=2, new_tokens=2)
    )
    assert log.count("reset") == 5  # two of them are warm-up
    assert {len(values) for name, values in response.samples.items() if not name.endswith("load_ms")} == {3}
    assert [len(response.samples[name]) for name in ("first_load_ms", "cold_load_ms", "warm_load_ms")] == [1, 2, 2]
    assert log[-9:] == ["close", *["open", "close"] * 4]  # memory is read before the first close


@pytest.fixture(scope="module")
def measured(made_bundle: Path) -> tuple[Path, Row]:
    return made_bundle, measure_bundle(
        made_bundle, MeasureSettings(warmup=1, repeats=4, load_repeats=2, threads=1, new_tokens=4)
    )


def test_a_real_bundle_is_measured_in_its_own_process(measured: tuple[Path, Row]) -> None:
    bundle, row = measured
    assert row.bundle.manifest_sha256 == sha256_of(bundle / MANIFEST_FILE)
    assert row.runtime.startswith("onnxruntime") and not row.emulated and row.settings is not None
    assert row.settings.threads == 1 and row.settings.prompt_tokens > VISUAL_TOKENS
    assert all(value > 0 for found in row.measurements.values() for value in found.samples)
    assert {len(found.samples) for name, found in row.measurements.items() if "load" not in name} == {4}
    found = row.measurements["ttft_ms"].summary
    assert found.low is not None and found.high is not None and found.low <= found.median <= found.high


@linux
def test_peak_memory_is_that_of_the_child_not_of_this_process(measured: tuple[Path, Row]) -> None:
    _, row = measured
    assert row.memory is not None
    # this process has torch loaded; the child has not
    assert row.memory.baseline_bytes < row.memory.peak_bytes < read_memory().peak_bytes
    assert 20e6 < row.memory.peak_bytes < 250e6


def test_sizes_come_from_the_files(measured: tuple[Path, Row]) -> None:
    bundle, row = measured
    on_disk = {path.name: path.stat().st_size for path in bundle.rglob("*") if path.is_file()}
    assert row.bundle.size_bytes == sum(on_disk.values())
    graphs = [size for name, size in on_disk.items() if name.endswith((".onnx", "_data"))]
    carrier = next(size for name, size in on_disk.items() if "genai" in name and name.endswith(".onnx"))
    assert row.bundle.weights_bytes == sum(graphs) - carrier  # it runs on the embedding's own weights


def test_a_changed_file_is_never_measured(bundle: Path) -> None:
    victim = next(path for path in bundle.rglob("*") if "decoder" in path.name)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(VerificationError, match=f"{victim.name}.*changed"):
        measure_bundle(bundle, MeasureSettings())


def test_a_mistake_found_in_the_child_comes_back_as_its_own_error(bundle: Path) -> None:
    with pytest.raises(UsageError, match="--prompt-tokens 3 is too short for tiny-onnx-fp32"):
        measure_bundle(bundle, MeasureSettings(prompt_tokens=3))


def test_a_child_that_dies_is_reported_with_its_last_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", os.devnull)  # Python itself cannot start
    with pytest.raises(AlignKDError, match="ended with code .*; run: alignkd-verify"):
        measure_bundle(bundle, MeasureSettings())


def test_wrong_settings_are_all_named_at_once() -> None:
    with pytest.raises(
        UsageError, match=r"--repeats is 0; it must be at least 1; --new-tokens is 1; it must be at least 2"
    ):
        MeasureSettings(repeats=0, new_tokens=1)


def test_no_bundle_and_no_runtime_have_their_own_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"is no bundle"):
        check_bundle(tmp_path)

    class Absent:
        def available(self) -> str | None:
            return "no such engine"

    monkeypatch.setitem(registry.RUNTIMES, "onnx", (registry.RuntimeEntry("onnx", Absent),))  # type: ignore[arg-type]
    with pytest.raises(BackendMissingError, match="no such engine"):
        choose_runtime("onnx")


def test_process_status_is_read_by_name_not_by_line() -> None:
    text = "Name:\tpython\nRssFile:\t   300 kB\nVmPeak:\t 9999 kB\nVmHWM:\t  1000 kB\nRssAnon:\t   700 kB\n"
    memory = parse_status(text)
    assert (memory.peak_bytes, memory.anonymous_bytes, memory.file_bytes) == (1_024_000, 716_800, 307_200)
    assert parse_status("VmHWM:\t1 kB\n").file_bytes is None


@linux
def test_peak_memory_sees_an_allocation() -> None:
    now = read_memory()
    size = max(80_000_000, now.peak_bytes - now.anonymous_bytes)  # tests before this one may have needed more
    block = bytearray(size)
    block[::4096] = b"x" * len(block[::4096])
    assert read_memory().peak_bytes > max(now.peak_bytes, 80_000_000)


@linux
def test_dropped_pages_are_counted_not_assumed(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(1 << 20))
    total = (1 << 20) // os.sysconf("SC_PAGESIZE")
    assert cached_pages(file) == (total, total)
    dropped = drop_pages(tmp_path)
    assert dropped == (cached_pages(file)[0] <= 0.05 * total)
    file.read_bytes()
    assert cached_pages(file) == (total, total)
    assert not drop_pages(tmp_path / "nothing")
