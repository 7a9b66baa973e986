"""The committed configurations: accelerate's own loader and launcher take them; the command lists and finds them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from bundle.errors import UsageError
from distill import cli
from distill.launch.configs import launch_config, launch_configs

GPUS = {"1gpu": 1, "8gpu": 8, "2x8gpu": 16}
KINDS = {
    "ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP, "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}  # fmt: skip


@pytest.mark.parametrize("file", launch_configs().values(), ids=launch_configs().keys())
def test_accelerate_takes_it_and_it_is_what_its_name_says(file: Path) -> None:
    config = load_config_from_file(str(file))
    kind, _, size = file.stem.partition("_")
    if kind == "cpu":
        assert config.use_cpu and config.num_processes == 2
        return
    assert config.num_processes == GPUS[size or kind] and config.num_machines == (2 if "2x8" in size else 1)
    assert config.distributed_type == KINDS.get(kind, DistributedType.NO)
    assert config.mixed_precision == "bf16" and not config.use_cpu
    if kind == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if kind.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(kind[-1])


@pytest.mark.parametrize("name", ["fsdp2_8gpu", "ddp_2x8gpu", "zero3_8gpu", "zero2_2x8gpu"])
def test_accelerate_hands_it_on_to_the_processes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True, raising=False)
    words = ["--config_file", str(launch_config(name)), "--main_process_ip", "10.0.0.1", "-m", "distill.cli"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if name.startswith("zero"):
        args.deepspeed_fields_from_accelerate_config = ""
        _, env = prepare_deepspeed_cmd_env(args)
        assert env["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name[4]
    else:
        env = prepare_multi_gpu_env(args)
        assert (env.get("FSDP_VERSION") == "2") is name.startswith("fsdp2")
    assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_the_command_lists_them_and_prints_a_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["alignkd-distill", "launch", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
        return capsys.readouterr().out

    lines = run().splitlines()
    assert [line.split()[0] for line in lines] == list(launch_configs())
    path = Path(run("fsdp2_8gpu").strip())
    assert yaml.safe_load(path.read_text())["num_processes"] == 8
    with pytest.raises(UsageError, match="no launch configuration 'ddp'; there are: 1gpu, cpu_2_ddp"):
        launch_config("ddp")


@pytest.mark.slow
def test_accelerate_launch_itself(tmp_path: Path) -> None:
    """The two real commands together, up to the first mistake that the program finds."""
    command = [
        Path(sys.executable).parent / "accelerate", "launch", "--config_file", launch_config("cpu_2_ddp"),
        "--main_process_port", "0", "-m", "distill.cli", "--losses", "ce", "--student", tmp_path / "none", "--data",
        "d.json", "--output", tmp_path / "new",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    said = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert run.returncode != 0 and len(said) == 1 and "data file d.json does not exist" in said[0]
