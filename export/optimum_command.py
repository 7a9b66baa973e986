"""optimum-cli export alignkd ARGUMENTS -> alignkd-export ARGUMENTS; found through optimum/commands/register."""

from __future__ import annotations

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class AlignkdExportCommand(BaseOptimumCLICommand):
    """The whole of alignkd-export, its help and exit codes included, as a subcommand of optimum."""

    COMMAND = CommandInfo(
        name="alignkd",
        help="Export a LLaVA-like model to ONNX, ExecuTorch or Core ML, quantized and verified (alignkd-export).",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Leave every word behind ``alignkd`` to alignkd-export, whose flags have one place for type and help."""
        parser.prefix_chars = "\0"  # of no word: nothing is an option here, --help neither
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Run the export; the process ends with its exit code."""
        from export.cli import main

        main(self.args.arguments, prog="optimum-cli export alignkd")
