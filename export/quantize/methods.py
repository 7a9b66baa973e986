"""The ways to choose 4-bit codes, by name; what computes them is imported when it is asked for."""

from __future__ import annotations

from typing import Literal, get_args

# rtn: each target's packer rounds to nearest with scales that it finds itself; hqq: scales by torchao's HQQ; gptq:
# codes that make up for each other's errors on calibration data.
Method = Literal["rtn", "hqq", "gptq"]
METHODS: tuple[Method, ...] = get_args(Method)
CALIBRATED: tuple[Method, ...] = ("gptq",)
