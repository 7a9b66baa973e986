"""bundle/ where torch is not installed: every module imports, prompts and pixels work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = ["torch", "transformers", "torchao", "executorch", "coremltools", "onnx", "onnxruntime", "coreai"]
BLOCKED = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "bundle").rglob("*.py")
    if path.as_posix().removeprefix(f"{ROOT.as_posix()}/") != "bundle/runtimes/executorch.py"
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_block_works() -> None:
    done = python("import torch")
    assert done.returncode == 1 and "No module named 'torch'" in done.stderr


def test_every_module_imports() -> None:
    assert "bundle.session" in MODULES and len(MODULES) >= 15
    done = python(f"import importlib\nfor name in {MODULES!r}: importlib.import_module(name)\nprint('all')")
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr


def test_prompt_and_pixels_work() -> None:
    done = python(
        "from pathlib import Path\n"
        "from bundle.image import open_image, preprocess\n"
        "from bundle.manifest import ImageSpec, TokenizerSpec\n"
        "from bundle.prompt import TEMPLATES, build_prompt\n"
        "from bundle.tokenizer import open_tokenizer\n"
        "golden = Path('tests/golden/reference')\n"
        "image = ImageSpec(size=336, strategy='pad', mean=(0.5,) * 3, std=(0.5,) * 3)\n"
        "print(preprocess(open_image(golden / 'prep0_in.png'), image).shape)\n"
        "spec = TokenizerSpec(kind='sentencepiece', path='tokenizer.model', bos_id=1, eos_ids=(2,), pad_id=0)\n"
        "tokenizer = open_tokenizer(spec, golden / 'student')\n"
        "print(build_prompt(TEMPLATES['v1'], tokenizer, spec, 'Why?', True).token_ids[:3])\n"
    )
    assert (done.returncode, done.stdout) == (0, "(1, 3, 336, 336)\n(1, 416, 467)\n"), done.stderr
