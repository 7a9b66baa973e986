"""A checkpoint's chat template -> PromptSpec and ChatTurns: rendered once around marked texts and cut where they stand.

Phones and data sets then need no Jinja: a conversation is the cut pieces with questions and answers between them. A
template that is not of that form (it moves, repeats or rewrites the texts) is refused in one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from bundle.errors import UsageError
from bundle.manifest import PromptSpec
from distill.models.checkpoint import read_json

QUESTION, ANSWER, SECOND = "QUESTIONfiller", "ANSWERfiller", "SECONDfiller"
Message = dict[str, Any]


@dataclass(frozen=True)
class ChatTurns:
    """What stands around answers in a conversation of several turns; training needs it, a phone does not.

    Attributes:
        before_answer: between what generation begins after and the answer.
        after_answer: the end of an answer, through its end token.
        next_question: from there to the next question (or its image).
    """

    before_answer: str
    after_answer: str
    next_question: str


def find_template(folder: Path) -> str:
    """The Jinja text, from whichever file this version of transformers kept it in.

    Raises:
        UsageError: there is none.
    """
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_json(folder / name, folder).get("chat_template")
            if isinstance(template, str):
                return template
    raise UsageError(
        f"{folder} has no chat template (chat_template.jinja, or chat_template in processor_config.json or "
        "tokenizer_config.json); copy it from where the model came from"
    )


def cut_template(
    template: str, image_marker: str, names: dict[str, str], eos_names: list[str], folder: Path
) -> tuple[PromptSpec, ChatTurns]:
    """Render the template around marked texts and cut it into pieces.

    Args:
        image_marker: the name of the image token.
        names: bos_token and eos_token, as the template may ask for them.
        eos_names: names of the tokens that end an answer.

    Raises:
        UsageError: it is no Jinja, refuses a plain conversation, or is not of the form that can be cut.
    """
    reasons = []
    for parts in (True, False):  # messages of typed parts, as processors pass them; or of text, as tokenizers do
        try:
            return _cut(_Rendered.of(template, image_marker, names, parts), image_marker, eos_names)
        except (TemplateError, TypeError) as error:
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
        except ValueError as error:
            reasons.append(str(error))
    raise UsageError(
        f"{folder}: the chat template cannot be cut into prefix, image, question and suffix ({reasons[0]})"
    )


@dataclass(frozen=True)
class _Rendered:
    """Four conversations, as text."""

    asked: str  # an image and a question, ready for the answer
    without_image: str
    answered: str
    asked_again: str  # after an answer

    @classmethod
    def of(cls, template: str, image_marker: str, names: dict[str, str], parts: bool) -> _Rendered:
        def user(text: str, image: bool) -> Message:
            if not parts:
                return {"role": "user", "content": f"{image_marker}\n{text}" if image else text}
            content: list[Message] = [{"type": "image"}] if image else []
            return {"role": "user", "content": [*content, {"type": "text", "text": text}]}

        def render(messages: list[Message], ready: bool) -> str:
            rendered: Any = render_jinja_template  # annotated as a text, returns texts and spans
            texts, _ = rendered([messages], chat_template=template, add_generation_prompt=ready, **names)
            return str(texts[0])

        answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}] if parts else ANSWER}
        talk = [user(QUESTION, True), answer]
        return cls(
            asked=render(talk[:1], True),
            without_image=render([user(QUESTION, False)], True),
            answered=render(talk, False),
            asked_again=render([*talk, user(SECOND, False)], True),
        )


def _cut(rendered: _Rendered, image_marker: str, eos_names: list[str]) -> tuple[PromptSpec, ChatTurns]:
    before, suffix = _halves(rendered.asked, QUESTION, "the question")
    prefix, after_image = _halves(before, image_marker, "the image")
    alone, _ = _halves(rendered.without_image, QUESTION, "the question")
    before_question = alone.removeprefix(prefix)
    if rendered.without_image != prefix + before_question + QUESTION + suffix or not after_image.endswith(
        before_question
    ):
        raise ValueError("without an image it says something else around the question")
    said, end = _halves(rendered.answered, ANSWER, "the answer")
    _, rest = _halves(rendered.asked_again, ANSWER, "the answer")
    between, again = _halves(rest, SECOND, "the second question")
    if not said.startswith(before + QUESTION) or not between.startswith(end) or again != suffix:
        raise ValueError("a second question does not go on from the first answer")
    between = between.removesuffix(before_question)
    # some templates write an answered turn otherwise than the one to be answered: trained is what will be asked
    before_answer = said.removeprefix(rendered.asked) if said.startswith(rendered.asked) else ""
    eos = next((name for name in eos_names if name in end), None)
    if eos is None:  # vicuna's templates leave out the end token, without which a model never learns to stop
        after, following = eos_names[0], between.lstrip()
    else:
        head, following = between.split(eos, 1)
        after = head + eos
    spec = PromptSpec(
        template="chat",
        prefix=prefix,
        image_marker=image_marker,
        after_image=after_image.removesuffix(before_question),
        before_question=before_question,
        suffix=suffix,
    )
    return spec, ChatTurns(before_answer, after, following)


def _halves(text: str, mark: str, what: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ValueError(f"it holds {what} {text.count(mark)} times")
    before, _, after = text.partition(mark)
    return before, after


def token_name(value: object) -> str | None:
    """The text of a token in tokenizer_config.json, where it is a string or an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
