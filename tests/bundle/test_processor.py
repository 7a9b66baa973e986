"""bundle.processor: features of a CPU -> its family."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from bundle import processor
from bundle.manifest import Family
from bundle.processor import family_of, host_family


@pytest.mark.parametrize(
    ("machine", "system", "flags", "family"),
    [
        ("x86_64", "Linux", {"avx2", "avx512_vnni"}, "x86_64-vnni"),
        ("AMD64", "Linux", {"avx2", "avx_vnni"}, "x86_64-vnni"),
        ("x86_64", "Linux", {"avx2", "avx512f"}, "x86_64-avx2"),
        ("x86_64", "Darwin", set(), "x86_64-avx2"),
        ("aarch64", "Linux", {"asimddp", "i8mm"}, "arm64-i8mm"),
        ("aarch64", "Linux", {"asimddp"}, "arm64-dotprod"),
        ("aarch64", "Linux", {"asimd"}, "arm64"),
        ("arm64", "Darwin", {"hw.optional.arm.FEAT_I8MM", "hw.optional.arm.FEAT_DotProd"}, "arm64-i8mm"),
        ("arm64", "Darwin", {"hw.optional.arm.FEAT_DotProd"}, "arm64-dotprod"),
    ],
)
def test_family(machine: str, system: str, flags: set[str], family: Family) -> None:
    assert family_of(machine, system, frozenset(flags)) == family


@pytest.mark.parametrize(
    ("line", "machine", "family"),
    [
        ("Features\t: fp asimd aes asimddp sve i8mm", "aarch64", "arm64-i8mm"),
        ("flags\t\t: fpu sse avx2 avx512_vnni", "x86_64", "x86_64-vnni"),
        ("model name\t: nothing said", "x86_64", "x86_64-avx2"),
    ],
)
def test_cpuinfo_is_read(
    line: str, machine: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert host_family() == family


def test_an_unknown_system_is_taken_to_have_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    monkeypatch.setattr("platform.system", lambda: "Plan9")
    assert host_family() == "x86_64-avx2" and host_family() in get_args(Family)
