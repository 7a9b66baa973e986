"""Words of the demo world -> tokenizer.model: llama-style sentencepiece BPE, one token for each word of the world."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

from bundle.prompt import TEMPLATES
from distill.demo_world.lessons import conversation, text_conversation
from distill.demo_world.open_questions import describe
from distill.demo_world.question import LETTER_ANSWER, LETTERS, SHORT_ANSWER, Question
from distill.demo_world.scene import make_scene

VOCABULARY = 768  # 259 bytes and specials; the rest makes every word below one token
CORPUS_SCENES = 4000
# How often a line stands in the corpus decides what is merged first: words before sentences, so that no token ends
# inside a word.
WORD_LINES, SENTENCE_LINES = 3000, 600
AFTER_NEWLINE = ("What", "Is", "How", "Where", "Does", "Which", "what", "Answer", "Reference", "Context", "Describe")


def train_tokenizer(path: Path, seed: int = 0) -> None:
    """Write a tokenizer.model. The two suffixes that close nearly every question become one token each.

    Merges may cross blanks (``split_by_whitespace`` off): a prompt of the demo is then half as long, and so is the
    demo. Everything else is as in LLaMA's tokenizer: byte fallback, dummy prefix, unk 0, bos 1, eos 2.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(random.Random(f"{seed} tokenizer"))),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_by_number=False,
        split_by_unicode_script=False,
        max_sentencepiece_length=128,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


def corpus(rng: random.Random) -> list[str]:
    """Lines to train on: words alone, sentences that never change whole."""
    system = TEMPLATES["v1"].prefix
    suffix = TEMPLATES["v1"].suffix
    fixed = [text.strip() + suffix for text in (SHORT_ANSWER, LETTER_ANSWER)]
    fixed += ["Reference OCR token:", "Context:", *(f"{letter}." for letter in LETTERS)]
    words = dict.fromkeys(
        word for text in (*_texts(rng), system, *fixed) for word in re.findall(r"[A-Za-z]+|[^\sA-Za-z]", text)
    )
    lines = [word for word in words for _ in range(WORD_LINES)]
    # what stands after a line feed has no blank in front: different first characters keep it apart from them
    lines += [before + word for word in AFTER_NEWLINE for before in "?0!" for _ in range(WORD_LINES // 3)]
    lines += [before + text for text in fixed for before in ("?", "0", "!", "") for _ in range(SENTENCE_LINES)]
    return lines + [text for text in (system, "USER:", "ASSISTANT:") for _ in range(WORD_LINES // 3)]


def _texts(rng: random.Random) -> list[str]:
    """Questions and answers of many scenes, without what stands in ``corpus`` as a whole."""
    asked: list[Question] = []
    for number in range(CORPUS_SCENES):
        scene = make_scene(rng)
        asked += [*conversation(scene, rng, 5), describe(scene, rng)] if number % 5 else text_conversation(rng, 3)
    return [f"{question.body} {question.answer}" for question in asked]
