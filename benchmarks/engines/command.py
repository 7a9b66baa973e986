"""Flags -> peers prepared, rounds run, tables printed as Markdown and written as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bundle.manifest import Manifest, read_manifest
from engines.limits import Limit, arithmetic, measure_limit
from engines.peers import PEERS
from engines.preparation import Cache, NotPreparedError, Prepared, fill
from engines.rounds import Contestant, Sample, Work, run_rounds
from engines.table import COLUMNS, aims, markdown, medians
from runtime_bench.device import local_device, source_commit

NOTES = (
    "Medians over all processes and runs. One process an engine, part and number of threads, taking turns, who begins "
    "changes with the round; in each process one run warms up. Vision: tower and projector on a normalised picture. "
    "Prefill: a prompt of random ids from an empty cache to its next token. Decode: the greedy steps behind it. Load: "
    "text, files in the operating system's cache. Peak: high-water mark of the process, Python and mapped files in it; "
    "the vision encoder is open in the vision processes alone. (x): the value over the best of ours. Weights are "
    "random: speed at these shapes, not quality."
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="engines.py", description="Our bundles and the engines a user would pick instead, on the same checkpoint."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="by scripts/make_real_size_checkpoint.py")
    parser.add_argument("--bundles", type=Path, nargs="+", required=True, help="our exports of that checkpoint")
    parser.add_argument("--cache", type=Path, required=True, help="environments and converted files, kept between runs")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each engine, part and number of threads")
    parser.add_argument("--repeats", type=int, default=2, help="measured runs in each process")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True, help="OUTPUT.md, and OUTPUT.json with every sample")
    flags = parser.parse_args(arguments)
    if not (flags.checkpoint / "config.json").is_file():
        parser.error(
            f"--checkpoint {flags.checkpoint} has no config.json; "
            f"run: python scripts/make_real_size_checkpoint.py --output {flags.checkpoint}"
        )
    for name in ("rounds", "repeats", "new_tokens", "prompt_tokens"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(flags, name)}; it must be at least 1")
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Prepare, measure, print."""
    flags, start = parse(arguments), time.monotonic()
    flags.checkpoint = flags.checkpoint.resolve()  # peers' tools run in the cache folder, where they leave their logs

    def progress(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - start:6.0f} s  {line}\n")

    bundles = {path: read_manifest(path) for path in flags.bundles}
    shape = next(iter(bundles.values()))
    work = Work(
        prompt_tokens=flags.prompt_tokens,
        new_tokens=flags.new_tokens,
        vocabulary=shape.model.vocab_size,
        image_size=shape.image.size,
        rounds=flags.rounds,
        repeats=flags.repeats,
        threads=tuple(flags.threads),
    )
    contestants = [_bundle(path, manifest) for path, manifest in bundles.items()]
    cache, missing, labels = Cache(flags.cache.resolve(), progress), [], {}
    for name in flags.peers:
        try:
            contestants.append(_peer(cache.prepare(name, PEERS[name], flags.checkpoint)))
            labels[name] = PEERS[name].label
        except NotPreparedError as error:
            missing.append(f"{PEERS[name].label}: not measured, {error}")
            progress(missing[-1])
    limits = {threads: measure_limit(threads, flags.cache) for threads in work.threads}
    samples = run_rounds(contestants, work, progress)
    conditions = _conditions(samples, work, time.monotonic() - start)
    text = _report(samples, contestants, labels, missing, limits, conditions, work, flags.checkpoint)
    sys.stdout.write(text)
    flags.output.with_suffix(".md").write_text(text, encoding="utf-8")
    facts: dict[str, Any] = {
        "conditions": conditions,
        "limits": {threads: asdict(v) if isinstance(v, Limit) else v for threads, v in limits.items()},
        "missing": missing,
        "medians": {threads: medians(samples, work, threads) for threads in work.threads},
        "samples": [asdict(sample) for sample in samples],
    }
    flags.output.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _bundle(path: Path, manifest: Manifest) -> Contestant:
    graphs = {name: graph.path for name, graph in manifest.graphs.items()}
    files = [path / name for name in manifest.files]

    def belonging(*names: str) -> list[Path]:
        # graph.onnx, graph.onnx_data and the files of a package belong to the graph
        stems = tuple(str(path / graphs[name]) for name in names)
        return [file for file in files if str(file).startswith(stems)]

    text, vision = belonging("token_embedding", "text_decoder"), belonging("vision_encoder")
    if set(text) == set(vision):  # one file holds all
        vision = []
    return Contestant(
        label=f"alignkd {manifest.name}",
        python=Path(sys.executable),
        driver="bundle_engine.py",
        model=path.resolve(),
        files={"text": text, "vision": vision},
        ours=True,
    )


def _peer(prepared: Prepared) -> Contestant:
    peer = prepared.peer
    return Contestant(
        label=peer.label,
        python=prepared.python,
        driver=peer.driver,
        model=prepared.output / peer.text,
        files={part: prepared.files(part) for part in ("text", "vision") if part == "text" or peer.vision},
        options={k: fill(v, {"output": str(prepared.output)}) for k, v in peer.options.items()},
        note=peer.note,
    )


def _conditions(samples: list[Sample], work: Work, seconds: float) -> dict[str, str]:
    loads, device = sorted(sample.load_average for sample in samples), local_device()
    return {
        "machine": f"{device.cores} cores of {device.cpu}, {device.memory_bytes / 2**30:.0f} GiB, {platform.system()}",
        "commit": source_commit() or "no checkout",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "work": f"{work.prompt_tokens} prompt tokens, {work.new_tokens} new, {work.rounds} rounds x {work.repeats}",
        "load average before each process": f"{loads[0]:.1f} to {loads[-1]:.1f}, median {loads[len(loads) // 2]:.1f}"
        if loads
        else f"{os.getloadavg()[0]:.1f}",
        "took": f"{seconds / 60:.0f} min",
    }


def _report(
    samples: list[Sample],
    contestants: list[Contestant],
    labels: dict[str, str],
    missing: list[str],
    limits: dict[int, Limit | str],
    conditions: dict[str, str],
    work: Work,
    checkpoint: Path,
) -> str:
    parts = []
    for threads in work.threads:
        found = medians(samples, work, threads)
        parts += [markdown(found, contestants, threads), _limit_line(limits[threads], work, checkpoint)]
        parts.append(aims(found, contestants, labels))
    failures = {f"{s.label}, {s.part}: {s.failure}" for s in samples if s.answer is None}
    parts += [*missing, *sorted(failures)]
    parts += [f"{c.label}: {c.note}" for c in contestants if c.note]
    versions = sorted({s.answer.engine for s in samples if s.answer})
    parts += [NOTES, ", ".join(versions), "; ".join(f"{name}: {value}" for name, value in conditions.items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _limit_line(limit: Limit | str, work: Work, checkpoint: Path) -> str:
    if isinstance(limit, str):
        return limit
    allowed = arithmetic(checkpoint).limits(limit, work.prompt_tokens, work.new_tokens)
    shown = ", ".join(f"{COLUMNS[name].name} {value:.{COLUMNS[name].digits}f}" for name, value in allowed.items())
    return (
        f"The machine's limit: {shown} (it reads {limit.read_gb_per_s:.0f} GB/s and multiplies int8 at "
        f"{limit.int8_tops:.2f} TOPS in registers; 4.5 bits a weight, cache at float16)"
    )
