"""A checkpoint's tokenizer -> the tokenizer.json and tokenizer_config.json that stock runners read."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def write_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Write both files into ``folder``: the checkpoint's own, or tokenizer.model converted by transformers."""
    if tokenizer.suffix == ".json":
        for file in TOKENIZER_FILES:
            if (tokenizer.parent / file).is_file():
                shutil.copyfile(tokenizer.parent / file, folder / file)
        return
    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory(prefix="alignkd-tokenizer-") as name:
        alone = Path(name)  # a checkpoint's own JSON files would ask for other classes
        shutil.copyfile(tokenizer, alone / "tokenizer.model")
        LlamaTokenizer.from_pretrained(alone).save_pretrained(alone)
        for file in TOKENIZER_FILES:
            shutil.copyfile(alone / file, folder / file)
