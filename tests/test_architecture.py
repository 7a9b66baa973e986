"""The house rules that tools can check: who imports whom, docstrings first, lazy heavy imports, help without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("bundle", "distill", "export", "runtime_bench")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
COMMANDS = {
    "alignkd-data": "distill.data_cli",
    "alignkd-distill": "distill.cli",
    "alignkd-export": "export.cli",
    "alignkd-verify": "bundle.verify_cli",
    "alignkd-bench": "runtime_bench.cli",
    "alignkd-doctor": "bundle.doctor_cli",
}
HEAVY = (
    "torch", "transformers", "torchao", "executorch", "coremltools", "onnx", "onnxruntime", "scipy", "plotly",
    "skimage", "coreai", "coreai_torch",
)  # fmt: skip
# A finder that refuses them, as if they were not installed (None in sys.modules would count as imported for tyro).
BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
sys.meta_path.insert(0, Refuse())
"""


def test_rooms_import_one_way() -> None:
    linter = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert linter.returncode == 0, linter.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_line_says_what_the_file_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring and len(docstring.splitlines()[0]) > 15


@pytest.mark.parametrize("command,module", COMMANDS.items())
def test_help_needs_only_the_base_dependencies(command: str, module: str) -> None:
    program = BLOCK.format(heavy=HEAVY) + f"sys.argv = [{command!r}, '--help']\nimport {module} as m\nm.main()"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "usage" in run.stdout.lower()
