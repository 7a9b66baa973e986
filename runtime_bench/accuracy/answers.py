"""LLaVA answer file (jsonl) <-> Answer records."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import Field, JsonValue

from bundle.errors import UsageError
from runtime_bench.accuracy.data_files import DataRecord, read_jsonl
from runtime_bench.accuracy.questions import Question


class Answer(DataRecord):
    """What a model answered to one question.

    Attributes:
        prompt: the question as it was asked; MME and TextVQA are joined by it, SQA's script reads "<image>" in it.
        where: "file:line" for messages; not part of the file.
    """

    question_id: str | int
    text: str
    prompt: str = ""
    metadata: dict[str, JsonValue] = {}
    where: str = Field(default="", exclude=True)


def read_answers(path: Path) -> list[Answer]:
    """Read an answer file.

    Raises:
        UsageError: no file, no answers in it, or a line of the wrong shape; names file and line.
    """
    if not path.is_file():
        raise UsageError(f"answer file {path} does not exist; --answers takes a LLaVA answer file (jsonl)")
    answers = [line.model_copy(update={"where": f"{path.name}:{number}"}) for number, line in read_jsonl(path, Answer)]
    if not answers:
        raise UsageError(f"answer file {path} holds no answers; it takes one JSON object per line")
    return answers


def answer_line(question: Question, text: str, model: str, manifest_sha256: str, finish: str) -> str:
    """One line as model_vqa_loader writes it, ready to append; its metadata says which bundle answered, why it ended.

    Args:
        finish: why generation ended, e.g. "eos" or "max_new_tokens".
    """
    identity = f"{manifest_sha256} {question.question_id} {question.prompt}"
    line: dict[str, JsonValue] = {
        "question_id": question.question_id,
        "prompt": question.prompt,
        "text": text,
        "answer_id": hashlib.sha256(identity.encode()).hexdigest()[:22],
        "model_id": model,
        "metadata": {"manifest_sha256": manifest_sha256, "finish": finish},
    }
    return json.dumps(line | question.extra) + "\n"
