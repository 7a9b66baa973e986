"""Conversation + processing -> v1 or plain ids with one image id, and labels on the answers alone."""

from __future__ import annotations

from bundle.prompt import build_prompt, encode_pieces
from bundle.tokenizer import Tokenizer
from distill.batches.chat_rows import encode_chat
from distill.data.conversation import Row, Turn
from distill.models.processing import Processing

IGNORED = -100  # label of a position that no loss looks at
NEXT_QUESTION = {"v1": "USER: ", "plain": ""}  # how every turn after the first begins, as in vicuna_v1
ANSWER_END = {"v1": "", "plain": "\n"}  # plain captions end with a line feed, v1 answers with EOS


def encode_row(row: Row, processing: Processing, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A conversation -> ids with one image id, and labels of the same length: the answers, IGNORED elsewhere.

    The first question is encoded by the function that encodes questions at inference, so both see the same ids.
    """
    if processing.turns is not None:
        return encode_chat(row, processing, processing.turns, tokenizer)
    template, spec = processing.prompt.template, processing.tokenizer
    ids: list[int] = []
    labels: list[int] = []
    for turn in row.turns:
        asked = _first_question(turn, processing, tokenizer) if not ids else _next_question(turn, processing, tokenizer)
        answer = tokenizer.encode(turn.answer + ANSWER_END[template])
        answer += [spec.eos_ids[0]] if template == "v1" else []
        ids += asked + answer
        labels += [IGNORED] * len(asked) + answer
    return ids, labels


def room_for_ids(row: Row, context_length: int, visual_tokens: int) -> int:
    """How many ids of a row fit: its one image id becomes ``visual_tokens`` positions."""
    return context_length - (visual_tokens - 1 if row.image else 0)


def _first_question(turn: Turn, processing: Processing, tokenizer: Tokenizer) -> list[int]:
    question = turn.question if processing.prompt.template == "v1" else ""  # stage 1 captions an image unasked
    return list(build_prompt(processing.prompt, tokenizer, processing.tokenizer, question, turn.has_image).token_ids)


def _next_question(turn: Turn, processing: Processing, tokenizer: Tokenizer) -> list[int]:
    prompt = processing.prompt
    image = prompt.image_marker + prompt.after_image if turn.has_image else ""
    text = f"{NEXT_QUESTION[prompt.template]}{image}{turn.question}{prompt.suffix}"
    return encode_pieces(text, tokenizer, processing.tokenizer.image_token_id, prompt.image_marker)
