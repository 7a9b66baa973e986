"""Question, image or none -> prompt text, token ids and the spliced embeddings; decoded answer -> clean answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bundle.errors import UsageError
from bundle.manifest import PromptSpec, TokenizerSpec
from bundle.runtimes.contract import Floats
from bundle.tokenizer import Tokenizer

IMAGE_MARKER = "<image>"

TEMPLATES: dict[str, PromptSpec] = {
    # vicuna_v1, letter for letter: single spaces, no newline before ASSISTANT, nothing after the colon
    "v1": PromptSpec(
        template="v1",
        prefix=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
        ),
        after_image="\n",
        suffix=" ASSISTANT:",
    ),
    # stage 1 of training: the image, then its caption; a question is the beginning of that caption
    "plain": PromptSpec(template="plain", prefix="", after_image="", suffix=""),
}


@dataclass(frozen=True)
class Prompt:
    """What the model is asked.

    Attributes:
        text: the whole text, with the image marker where the image stands.
        token_ids: BOS first, ``image_token_id`` once where the image stands.
    """

    text: str
    token_ids: tuple[int, ...]


def build_prompt(
    spec: PromptSpec, tokenizer: Tokenizer, tokenizer_spec: TokenizerSpec, question: str, has_image: bool
) -> Prompt:
    """Fill the template with ``question``.

    Raises:
        UsageError: the question itself holds an image marker: it would stand for a second image.
    """
    if spec.image_marker in question or IMAGE_MARKER in question:
        raise UsageError(
            f"the question holds '{IMAGE_MARKER}'; the template '{spec.template}' places the image itself: "
            f"remove '{IMAGE_MARKER}' from the question"
        )
    refuse_special_names(question, tokenizer, "the question")
    image = spec.image_marker + spec.after_image if has_image else ""
    text = f"{spec.prefix}{image}{spec.before_question}{question}{spec.suffix}"
    pieces = encode_pieces(text, tokenizer, tokenizer_spec.image_token_id, spec.image_marker)
    return Prompt(text, (*opening_ids(tokenizer_spec), *pieces))


def opening_ids(spec: TokenizerSpec) -> list[int]:
    """What every prompt begins with: BOS, or nothing."""
    return [] if spec.bos_id is None else [spec.bos_id]


def refuse_special_names(text: str, tokenizer: Tokenizer, what: str) -> None:
    """Raise where a user's text would be read as a mark of the template.

    Raises:
        UsageError: ``text`` holds the name of a special token, which this kind of tokenizer reads as the token itself.
    """
    found = next((name for name in tokenizer.special_names if name in text), None)
    if found is not None:
        raise UsageError(f"{what} holds '{found}', which this tokenizer reads as a mark of its own: remove it")


def encode_pieces(text: str, tokenizer: Tokenizer, image_token_id: int, image_marker: str = IMAGE_MARKER) -> list[int]:
    """Text of a template with image markers -> ids without BOS, the image id where a marker stands."""
    return tokenizer.encode_template(text, image_marker, image_token_id)


def text_ids(token_ids: tuple[int, ...], image_token_id: int) -> list[int]:
    """The ids that have an embedding: all but the image's."""
    return [i for i in token_ids if i != image_token_id]


def splice(token_ids: tuple[int, ...], image_token_id: int, embeddings: Floats, visual_tokens: Floats | None) -> Floats:
    """Put the image's rows where its id stands.

    Args:
        token_ids: T text ids, and the image id once if there is an image.
        embeddings: [1, T, D], of the text ids in order.
        visual_tokens: [1, N, D] or None.

    Returns:
        [1, T + N, D], what the decoder is fed.
    """
    if visual_tokens is None:
        return embeddings
    at = token_ids.index(image_token_id)
    return np.concatenate([embeddings[:, :at], visual_tokens, embeddings[:, at:]], axis=1)  # [1, T + N, D]


def clean_answer(text: str) -> str:
    """Decoded answer -> answer: blanks around it and one trailing end mark go, as in the published evaluation."""
    return text.strip().removesuffix("</s>").strip()
