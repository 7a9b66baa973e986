"""Row + a checkpoint's own chat template, cut to pieces -> ids with one image id, and labels on the answers alone."""

from __future__ import annotations

from itertools import takewhile

from bundle.prompt import opening_ids, refuse_special_names
from bundle.tokenizer import Tokenizer
from distill.data.rows import Row
from distill.models.chat_template import ChatTurns
from distill.models.processing import Processing

IGNORED = -100


def encode_chat(
    row: Row, processing: Processing, turns: ChatTurns, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """A conversation -> ids and labels of the same length.

    The whole text is encoded at once, as transformers does, again after every question and answer: what an answer adds
    to the ids of its prompt is what the model has to say, and the prompt's ids are those of inference.

    Raises:
        UsageError: a text holds the name of a special token, which would be read as the token.
    """
    prompt, image_id = processing.prompt, processing.tokenizer.image_token_id
    opening = opening_ids(processing.tokenizer)
    text, ids, labels = "", list(opening), [IGNORED] * len(opening)
    for turn in row.turns:
        for said in (turn.question, turn.answer):
            refuse_special_names(said, tokenizer, f"row {row.number}: '{said[:40]}'")
        image = prompt.image_marker + prompt.after_image if turn.has_image else ""
        opened = turns.next_question if text else prompt.prefix
        text += f"{opened}{image}{prompt.before_question}{turn.question}{prompt.suffix}"
        asked = opening + tokenizer.encode_template(text, prompt.image_marker, image_id)
        text += f"{turns.before_answer}{turn.answer}{turns.after_answer}"
        ids = opening + tokenizer.encode_template(text, prompt.image_marker, image_id)
        begun = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, ids, strict=False)))
        labels += [IGNORED] * (begun - len(labels)) + ids[max(begun, len(labels)) :]
    return ids, labels
