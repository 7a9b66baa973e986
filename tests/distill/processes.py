"""Words of alignkd-distill -> real processes that run it, forked from a server that has imported torch once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["distill.cli", "distill.training.run", "peft", "torch.distributed.fsdp", "torch.distributed.checkpoint"]


@dataclass(frozen=True)
class Running:
    """One process and where it writes."""

    process: ForkServerProcess
    out: Path
    err: Path

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Return once ``text`` stands in its stderr."""
        end = time.monotonic() + seconds
        while text not in self.err.read_text():
            assert self.process.is_alive() or text in self.err.read_text(), self.err.read_text()
            assert time.monotonic() < end, self.err.read_text()
            time.sleep(0.002)

    def end(self, seconds: float = 240) -> int:
        """Its exit code; negative is a signal."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.err.read_text()
        return self.process.exitcode


def start(
    words: Sequence[object],
    folder: Path,
    name: str = "0",
    env: Mapping[str, str] | None = None,
    kept: Path | None = None,
) -> Running:
    """Start ``alignkd-distill`` as a process.

    Args:
        words: its command line.
        folder: for its stdout and stderr, ``name`` in their names.
        env: added to its environment.
        kept: where a copy of the work folder is left before the run tidies up.
    """
    CONTEXT.set_forkserver_preload(PRELOADED)
    files = [folder / f"{stream}-{name}-{time.monotonic_ns()}" for stream in ("out", "err")]
    for file in files:
        file.touch()
    arguments = ([str(word) for word in words], *map(str, files), dict(env or {}), kept)
    process = CONTEXT.Process(target=_run, args=arguments)
    process.start()
    return Running(process, *files)


def launch(config: Path, words: Sequence[object], folder: Path) -> list[Running]:
    """Start the processes that ``accelerate launch --config_file config`` starts on this machine."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    asked = launch_command_parser().parse_args(["--config_file", str(config), "-m", "distill.cli"])
    args, _, _ = _validate_launch_command(asked)
    before = set(os.environ)
    settings = {name: value for name, value in prepare_multi_gpu_env(args).items() if name not in before}
    count = args.num_processes
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    return [
        start(words, folder, str(rank), settings | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def _run(words: list[str], out: str, err: str, env: dict[str, str], kept: Path | None) -> None:
    os.environ.update(env)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = ["alignkd-distill", *words]
    import torch

    from distill import cli
    from distill.training import run

    torch.set_num_threads(1)
    if kept is not None:
        run.finish = _after_copying(run.finish, kept)
    cli.main()


def _after_copying(finish: Callable[..., None], kept: Path) -> Callable[..., None]:
    import shutil

    def copy_and_finish(run, ranks, config, *rest):  # type: ignore[no-untyped-def]
        shutil.copytree(config.work, kept)
        finish(run, ranks, config, *rest)

    return copy_and_finish


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
