"""tokenizer.model of a checkpoint -> the tokenizer.json and tokenizer_config.json that stock runners read."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def write_tokenizer(sentencepiece: Path, folder: Path) -> None:
    """Write both files into ``folder``, by transformers' own conversion."""
    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory(prefix="alignkd-tokenizer-") as name:
        alone = Path(name)  # a checkpoint's own JSON files would ask for other classes
        shutil.copyfile(sentencepiece, alone / "tokenizer.model")
        LlamaTokenizer.from_pretrained(alone).save_pretrained(alone)
        for file in TOKENIZER_FILES:
            shutil.copyfile(alone / file, folder / file)
