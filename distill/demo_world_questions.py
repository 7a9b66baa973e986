"""Scene -> questions whose answers follow from it, worded as the six benchmarks word them; one function a family."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from distill.demo_world import (
    ANIMALS,
    BACKGROUNDS,
    CELLS,
    COLOURS,
    LEXICON,
    SHAPES,
    Scene,
    Thing,
    place_name,
)

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCD"
DESCRIBE = "describe"  # the one family with a long answer and no suffix
NUMBERS = tuple("012345")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SCENE_CONTEXT = "Context: The image shows shapes."


@dataclass(frozen=True)
class Question:
    """One question and its answer.

    Args:
        family: the task family, a key of FAMILIES.
        text: the bare question.
        answer: short; a letter where there are choices.
        choices: lettered options.
        lead: a line in front of the question (ScienceQA's context, MMBench's hint), or "".
        reference: OCR hints (TextVQA); None where the prompt has no such line.
    """

    family: str
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    lead: str = ""
    reference: tuple[str, ...] | None = None

    @property
    def body(self) -> str:
        """Everything but the suffix: lead, question, OCR hints, options."""
        lines = [self.lead] if self.lead else []
        lines.append(self.text)
        if self.reference is not None:
            lines.append("Reference OCR token: " + ", ".join(self.reference))
        lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join(lines)

    @property
    def prompt(self) -> str:
        """The question as a model reads it, suffix included."""
        if self.family == DESCRIBE:
            return self.body
        return self.body + (LETTER_ANSWER if self.choices else SHORT_ANSWER)


Asker = Callable[[Scene, random.Random], Question | None]


# ---- open questions: a colour, a shape, a number, a place, a word


def colour(scene: Scene, rng: random.Random) -> Question | None:
    """Colour of a thing named by its place, or by its shape where that is unique; in American spelling mostly."""
    thing = rng.choice(scene.things)
    named = _only(scene, "shape", thing.shape) and rng.random() < 0.5
    name = thing.shape if named else f"shape in the {place_name(thing.cell)}"
    text = f"What {rng.choice(('color', 'color', 'colour'))} is the {name}?"
    return Question("colour", text, thing.colour)


def shape(scene: Scene, rng: random.Random) -> Question | None:
    """Shape of a thing named by its place, or by its colour where that is unique."""
    thing = rng.choice(scene.things)
    named = _only(scene, "colour", thing.colour) and rng.random() < 0.5
    text = f"What shape is {thing.colour}?" if named else f"What shape is in the {place_name(thing.cell)}?"
    return Question("shape", text, thing.shape)


def count(scene: Scene, rng: random.Random) -> Question | None:
    """Number of all shapes, of one shape or of one colour; zero now and then."""
    what, number = _counted(scene, rng)
    return Question("count", f"How many {what} are there?", str(number))


def where(scene: Scene, rng: random.Random) -> Question | None:
    """Place of a thing that colour and shape name without doubt."""
    unique = scene.unique_pairs()
    if not unique:
        return None
    thing = rng.choice(unique)
    return Question("where", f"Where is the {thing.colour} {thing.shape}?", place_name(thing.cell))


def word(scene: Scene, rng: random.Random) -> Question | None:
    """Read the word."""
    return None if scene.word is None else Question("word", "What is the word in the image?", scene.word)


def hinted_word(scene: Scene, rng: random.Random) -> Question | None:
    """Read the word beside OCR hints, which lack it in a third of all cases; now and then there are no hints."""
    if scene.word is None:
        return None
    others = rng.sample([entry for entry in LEXICON if entry != scene.word], rng.choice((0, 1, 1, 2)))
    hints = others + ([scene.word] if not others or rng.random() < 0.5 else [])
    rng.shuffle(hints)
    reference = tuple(hints) if rng.random() < 0.8 else None
    return Question("hinted_word", "what word is written in the image?", scene.word, reference=reference)


def describe(scene: Scene, rng: random.Random) -> Question:
    """Name everything, cell by cell: many supervised tokens a picture, as the captions of LLaVA's first stage."""
    contents = {thing.cell: f"{thing.colour} {thing.shape}" for thing in scene.things}
    if scene.word is not None and scene.word_cell is not None:
        contents[scene.word_cell] = scene.word
    named = [f"{place_name(cell)} {contents[cell]}" for cell in sorted(contents)]
    return Question(DESCRIBE, "Describe the image.", ", ".join(named))


# ---- yes or no, half of each


def existence(scene: Scene, rng: random.Random) -> Question | None:
    """Is a pair there? A wrong pair is half the time a colour and a shape that are both there, but not together."""
    have = [thing.pair for thing in scene.things]
    frame = rng.choice(("the", "this"))
    if rng.random() < 0.5:
        return exists(rng.choice(have), True, frame)
    absent = [pair for pair in scene.pairs if pair not in have]
    crossed = crossed_pairs(scene)
    return exists(rng.choice(crossed if crossed and rng.random() < 0.5 else absent), False, frame)


def exists(pair: tuple[str, str], answer: bool, frame: str = "the") -> Question:
    """The existence question for one pair."""
    return Question("existence", f"Is there a {pair[0]} {pair[1]} in {frame} image?", _yes(answer))


def crossed_pairs(scene: Scene) -> list[tuple[str, str]]:
    """Absent pairs whose colour and whose shape are both in the scene: what a careless reader sees."""
    have = {thing.pair for thing in scene.things}
    shapes = {pair[1] for pair in have}
    colours = {pair[0] for pair in have}
    return [pair for pair in scene.pairs if pair not in have and pair[0] in colours and pair[1] in shapes]


def relation(scene: Scene, rng: random.Random) -> Question | None:
    """Left, right, above or below between two things that differ in that direction."""
    unique = scene.unique_pairs()
    if len(unique) < 2:
        return None
    first, second = rng.sample(unique, 2)
    ways = _relations(first, second)
    true_way = rng.choice(ways)
    answer = rng.random() < 0.5
    way = true_way if answer else OPPOSITE[true_way]
    text = f"Is the {first.colour} {first.shape} {way} the {second.colour} {second.shape}?"
    return Question("relation", text, _yes(answer))


def colour_check(scene: Scene, rng: random.Random) -> Question | None:
    """Has the only thing of a shape this colour?"""
    single = [thing for thing in scene.things if _only(scene, "shape", thing.shape)]
    if not single:
        return None
    thing, answer = rng.choice(single), rng.random() < 0.5
    asked = thing.colour if answer else _other(COLOURS, thing.colour, rng)
    return Question("colour_check", f"Is the {thing.shape} in this image {asked}?", _yes(answer))


def shape_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is the thing at a place of this shape?"""
    thing, answer = rng.choice(scene.things), rng.random() < 0.5
    asked = thing.shape if answer else _other(SHAPES, thing.shape, rng)
    return Question("shape_check", f"Is the shape in the {place_name(thing.cell)} a {asked}?", _yes(answer))


def count_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is the number of some things this?"""
    what, number = _counted(scene, rng)
    answer = rng.random() < 0.5
    asked = str(number) if answer else _other(NUMBERS, str(number), rng)
    return Question("count_check", f"Is the number of {what} in this image {asked}?", _yes(answer))


def place_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is there a shape at a place?"""
    answer = rng.random() < 0.5
    cells = [cell for cell in range(CELLS) if (scene.at(cell) is not None) == answer]
    return Question(
        "place_check", f"Is there a shape in the {place_name(rng.choice(cells))} of this image?", _yes(answer)
    )


def hue_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is anything of this colour there?"""
    answer = rng.random() < 0.5
    there = {thing.colour for thing in scene.things}
    asked = rng.choice([name for name in COLOURS if (name in there) == answer])
    return Question("hue_check", f"Does this artwork have a {asked} shape?", _yes(answer))


def background_check(scene: Scene, rng: random.Random) -> Question | None:
    """Dark or bright?"""
    asked = rng.choice(BACKGROUNDS)
    return Question("background_check", f"Is the background of this scene {asked}?", _yes(asked == scene.background))


def word_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is this the word? Asked of an image or of a poster."""
    frames = ("Is the word in this image {}?", "Is this poster titled {}?")
    return _about_word(scene, rng, "word_check", frames)


def poster_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is this the poster's title?"""
    return _about_word(scene, rng, "word_check", ("Is this poster titled {}?",))


def ocr_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is this the word in the image?"""
    return _about_word(scene, rng, "word_check", ("Is the word in this image {}?",))


# ---- knowledge about what was read or counted (MME's cognition half)


def animal_check(scene: Scene, rng: random.Random) -> Question | None:
    """Does the word name an animal, or a thing?"""
    if scene.word is None:
        return None
    kind = rng.choice(("an animal", "a thing"))
    return Question(
        "animal_check", f"Is the word in this image {kind}?", _yes((scene.word in ANIMALS) == (kind == "an animal"))
    )


def sum_check(scene: Scene, rng: random.Random) -> Question | None:
    """Number of shapes plus one."""
    number, answer = len(scene.things), rng.random() < 0.5
    asked = number + 1 if answer else rng.choice([other for other in range(1, 7) if other != number + 1])
    return Question("sum_check", f"Is the number of shapes plus 1 equal to {asked}?", _yes(answer))


def translation_check(scene: Scene, rng: random.Random) -> Question | None:
    """Is this the Spanish for the animal?"""
    if scene.word not in ANIMALS:
        return None
    answer = rng.random() < 0.5
    asked = scene.word if answer else _other(ANIMALS, scene.word, rng)
    text = f"Is the word in this image {ANIMALS[asked]} in Spanish?"
    return Question("translation_check", text, _yes(answer))


def length_check(scene: Scene, rng: random.Random) -> Question | None:
    """Number of letters, asked as code."""
    if scene.word is None:
        return None
    answer = rng.random() < 0.5
    asked = len(scene.word) if answer else rng.choice([size for size in (2, 3, 4) if size != len(scene.word)])
    return Question("length_check", f"Is len(word) {asked} for the word in this image?", _yes(answer))


# ---- lettered choices


def choice(scene: Scene, rng: random.Random) -> Question | None:
    """An open question with two to four lettered options, now and then with a context line."""
    asker = rng.choice((colour, colour, shape, shape, count, where, word, relation))
    asked = asker(scene, rng)
    return None if asked is None else with_choices(asked, rng, rng.choice((2, 3, 4, 4)), rng.random() < 0.25)


def with_choices(asked: Question, rng: random.Random, number: int, context: bool = False) -> Question:
    """An open question, made a lettered choice among ``number`` options."""
    wrong = [option for option in options_like(asked) if option != asked.answer]
    options = [asked.answer, *rng.sample(wrong, min(number - 1, len(wrong)))]
    rng.shuffle(options)
    letter = LETTERS[options.index(asked.answer)]
    return Question("choice", asked.text, letter, tuple(options), SCENE_CONTEXT if context else "")


def options_like(asked: Question) -> Sequence[str]:
    """All answers that a question's family can have."""
    return {
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "count": NUMBERS,
        "where": tuple(place_name(cell) for cell in range(CELLS)),
        "word": LEXICON,
    }.get(asked.family, ("Yes", "No"))


# ---- without an image


def category_choice(rng: random.Random) -> Question:
    """Which option is a colour, a shape, a number or an animal?"""
    groups = {"color": tuple(COLOURS), "shape": SHAPES, "number": NUMBERS, "animal": tuple(ANIMALS)}
    name = rng.choice(tuple(groups))
    rest = [entry for other, entries in groups.items() if other != name for entry in entries]
    options = [rng.choice(groups[name]), *rng.sample(rest, rng.choice((1, 2, 3)))]
    answer, article = options[0], "an" if name == "animal" else "a"
    rng.shuffle(options)
    return Question(
        "category_choice", f"Which of these is {article} {name}?", LETTERS[options.index(answer)], tuple(options)
    )


def reading_choice(rng: random.Random) -> Question:
    """A context line gives two things their colours; one of them is asked."""
    shapes, colours = rng.sample(SHAPES, 2), rng.sample(tuple(COLOURS), 2)
    context = f"Context: The {shapes[0]} is {colours[0]} and the {shapes[1]} is {colours[1]}."
    which = rng.randrange(2)
    open_question = Question("colour", f"What color is the {shapes[which]}?", colours[which])
    asked = with_choices(open_question, rng, rng.choice((2, 3, 4)))
    return Question("reading_choice", asked.text, asked.answer, asked.choices, context)


# family -> how often a conversation draws it, against the others, and its function
FAMILIES: dict[str, tuple[float, Asker]] = {
    "colour": (1.0, colour),
    "shape": (1.0, shape),
    "count": (1.5, count),
    "where": (1.0, where),
    "word": (1.0, word),
    "hinted_word": (1.0, hinted_word),
    "existence": (2.0, existence),
    "relation": (2.0, relation),
    "choice": (4.0, choice),
    "colour_check": (0.6, colour_check),
    "shape_check": (0.6, shape_check),
    "count_check": (1.0, count_check),
    "place_check": (0.5, place_check),
    "hue_check": (0.5, hue_check),
    "background_check": (0.4, background_check),
    "word_check": (0.8, word_check),
    "animal_check": (0.5, animal_check),
    "sum_check": (0.5, sum_check),
    "translation_check": (1.0, translation_check),
    "length_check": (0.5, length_check),
}
TEXT_FAMILIES: dict[str, Callable[[random.Random], Question]] = {
    "category_choice": category_choice,
    "reading_choice": reading_choice,
}


def conversation(scene: Scene, rng: random.Random, turns: int) -> list[Question]:
    """About ``turns`` different questions on one scene, families drawn by weight."""
    names = list(FAMILIES)
    weights = [FAMILIES[name][0] for name in names]
    questions: list[Question] = []
    for name in rng.choices(names, weights, k=4 * turns):
        asked = FAMILIES[name][1](scene, rng)
        if asked is not None and all(asked.text != other.text for other in questions):
            questions.append(asked)
        if len(questions) == turns:
            break
    return questions


def text_conversation(rng: random.Random, turns: int) -> list[Question]:
    """Questions without an image."""
    return [rng.choice(list(TEXT_FAMILIES.values()))(rng) for _ in range(turns)]


def _yes(answer: bool) -> str:
    return "Yes" if answer else "No"


def _other(entries: Iterable[str], entry: str, rng: random.Random) -> str:
    return rng.choice([other for other in entries if other != entry])


def _only(scene: Scene, attribute: str, value: str) -> bool:
    values = [thing.shape if attribute == "shape" else thing.colour for thing in scene.things]
    return values.count(value) == 1


def _counted(scene: Scene, rng: random.Random) -> tuple[str, int]:
    """What is counted ('circles', 'red shapes', 'shapes') and how many there are."""
    kind = rng.random()
    if kind < 0.3:
        return "shapes", len(scene.things)
    thing = rng.choice(scene.things)
    if kind < 0.65:
        name = rng.choice(SHAPES) if rng.random() < 0.35 else thing.shape
        return f"{name}{'es' if name.endswith('s') else 's'}", sum(other.shape == name for other in scene.things)
    name = rng.choice(tuple(COLOURS)) if rng.random() < 0.35 else thing.colour
    return f"{name} shapes", sum(other.colour == name for other in scene.things)


def _relations(first: Thing, second: Thing) -> list[str]:
    ways = []
    if first.column != second.column:
        ways.append("left of" if first.column < second.column else "right of")
    if first.row != second.row:
        ways.append("above" if first.row < second.row else "below")
    return ways


def _about_word(scene: Scene, rng: random.Random, family: str, frames: tuple[str, ...]) -> Question | None:
    if scene.word is None:
        return None
    answer = rng.random() < 0.5
    asked = scene.word if answer else _other(LEXICON, scene.word, rng)
    return Question(family, rng.choice(frames).format(asked), _yes(answer))
