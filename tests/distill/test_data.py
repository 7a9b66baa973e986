"""LLaVA JSON -> tensors: the layout of inference, labels on answers alone, padding, order, every kind of bad row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bundle.errors import UsageError
from bundle.image import open_image, preprocess
from bundle.prompt import TEMPLATES, build_prompt
from bundle.tokenizer import Tokenizer, open_tokenizer
from distill.batches.batch_order import LengthGroupedOrder
from distill.batches.collator import Collator
from distill.batches.dataset import LlavaDataset
from distill.batches.encoding import encode_row
from distill.batches.image_store import BadImageError, ImageStore
from distill.data.rows import parse_row, read_rows
from distill.models.processing import Processing, read_processing

MakeData = Callable[..., Path]


@pytest.fixture(scope="module")
def processing(reference: Path) -> Processing:
    return read_processing(reference / "student")


@pytest.fixture(scope="module")
def tokenizer(reference: Path, processing: Processing) -> Tokenizer:
    return open_tokenizer(processing.tokenizer, reference / "student")


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def encoded(raw: dict[str, Any], processing: Processing, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    return encode_row(parse_row(raw, 0, Path("d.json"), Path("images")), processing, tokenizer)


@pytest.mark.parametrize("with_image", [True, False])
def test_one_turn_begins_with_the_ids_of_inference(
    with_image: bool, processing: Processing, tokenizer: Tokenizer
) -> None:
    raw: dict[str, Any] = {"conversations": talk(("<image>\n" if with_image else "") + "How many circles?", "two")}
    raw |= {"image": "a.png"} if with_image else {}
    ids, labels = encoded(raw, processing, tokenizer)
    prompt = build_prompt(processing.prompt, tokenizer, processing.tokenizer, "How many circles?", with_image).token_ids
    answer = [*tokenizer.encode("two"), 2]
    assert ids == [*prompt, *answer]
    assert labels == [-100] * len(prompt) + answer
    assert ids.count(-200) == with_image and ids.count(1) == 1


def test_the_marker_may_stand_anywhere_in_the_question(processing: Processing, tokenizer: Tokenizer) -> None:
    usual = encoded({"image": "a.png", "conversations": talk("<image>\nWhy?", "so")}, processing, tokenizer)
    behind = encoded({"image": "a.png", "conversations": talk("Why?\n<image>", "so")}, processing, tokenizer)
    assert usual == behind


def test_several_turns_follow_vicuna_v1(processing: Processing, tokenizer: Tokenizer) -> None:
    ids, labels = encoded({"conversations": talk("A?", "one", "B?", "two")}, processing, tokenizer)
    asked = build_prompt(processing.prompt, tokenizer, processing.tokenizer, "A?", False).token_ids
    second = tokenizer.encode("USER: B? ASSISTANT:")
    one, two = [*tokenizer.encode("one"), 2], [*tokenizer.encode("two"), 2]
    assert ids == [*asked, *one, *second, *two]
    assert [label for label in labels if label != -100] == one + two


def test_plain_is_the_recorded_stage_1_layout(processing: Processing, tokenizer: Tokenizer, case: Any) -> None:
    plain = Processing(processing.image, TEMPLATES["plain"], processing.tokenizer_path, processing.tokenizer)
    caption = tokenizer.decode(case.labels[case.labels != -100].tolist()).removesuffix("\n")
    ids, labels = encoded({"image": "a.png", "conversations": talk("<image>\nDescribe.", caption)}, plain, tokenizer)
    assert ids == case.input_ids[0].tolist() and labels == case.labels[0].tolist()


def dataset_of(data: Path, processing: Processing, tokenizer: Tokenizer, context: int = 2048) -> LlavaDataset:
    return LlavaDataset(read_rows(data, data.parent), processing, tokenizer, context, visual_tokens=144)


def test_a_batch_is_padded_to_the_right_with_images_in_reading_order(
    make_data: MakeData, processing: Processing, tokenizer: Tokenizer
) -> None:
    data = dataset_of(make_data(), processing, tokenizer)
    examples = [data[4], data[3], data[0]]
    batch = Collator(0, ImageStore(processing.image, 1 << 30))(examples)
    for i, example in enumerate(examples):
        n = len(example["input_ids"])
        assert batch["input_ids"][i, :n].tolist() == example["input_ids"] and (batch["input_ids"][i, n:] == 0).all()
        assert batch["labels"][i, :n].tolist() == example["labels"] and (batch["labels"][i, n:] == -100).all()
        assert batch["attention_mask"][i].sum() == n
    paths = [data.rows[3].image, data.rows[0].image]
    expected = [torch.from_numpy(preprocess(open_image(path), processing.image))[0] for path in paths if path]
    assert torch.equal(batch["pixel_values"], torch.stack(expected))
    blank = Collator(0, ImageStore(processing.image, 0))([data[1]])["pixel_values"]  # a row of text brings one
    assert blank.shape == (1, 3, processing.image.size, processing.image.size) and not blank.any()


def test_images_are_decoded_once_while_they_fit(
    make_data: MakeData, processing: Processing, tokenizer: Tokenizer
) -> None:
    data = dataset_of(make_data(), processing, tokenizer)
    one = 3 * 336 * 336 * 4
    store = ImageStore(processing.image, 2 * one)
    kept = [store.pixels(data.rows[i]) is store.pixels(data.rows[i]) for i in (0, 2, 3)]
    assert kept == [True, True, False]


def test_long_conversations_are_cut_at_the_context(
    make_data: MakeData, processing: Processing, tokenizer: Tokenizer
) -> None:
    data, whole = (dataset_of(make_data(), processing, tokenizer, context) for context in (200, 2048))
    assert len(whole[0]["input_ids"]) + 143 > 200
    assert len(data[0]["input_ids"]) + 143 == 200 == len(data[0]["labels"]) + 143
    assert data[0]["input_ids"] == whole[0]["input_ids"][:57]


def test_the_order_is_a_permutation_fixed_by_seed_and_epoch_with_like_lengths_together() -> None:
    lengths = torch.randint(1, 500, (1003,), generator=torch.Generator().manual_seed(0)).tolist()

    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedOrder(lengths, 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(1003))
    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    batches = [order(0, 0)[i : i + 8] for i in range(0, 1000, 8)]
    padding = sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)
    assert padding < 0.1 * sum(lengths)


Rows = list[dict[str, Any]]


def said(row: int, message: int, **changes: Any) -> Callable[[Rows], None]:
    return lambda rows: rows[row]["conversations"][message].update(changes)


def image(row: int, name: Any) -> Callable[[Rows], None]:
    return lambda rows: rows[row].update(image=name)


BAD_ROWS: dict[str, tuple[Callable[[Any], object], str]] = {
    "no object": (lambda rows: rows.insert(2, "text"), "row 2 is a JSON str"),
    "no conversations": (lambda rows: rows[1].pop("conversations"), "row 1: 'conversations' must be a list"),
    "one message": (lambda rows: rows[1]["conversations"].pop(), "row 1: 'conversations' must be a list"),
    "speaker": (said(3, 0, **{"from": "bot"}), 'row 3 message 0 must be {"from": "human"'),
    "system": (said(3, 0, **{"from": "system"}), "row 3 message 0 is a system message"),
    "value": (said(3, 1, value=7), 'row 3 message 1 must be {"from": "gpt"'),
    "empty answer": (said(0, 1, value=" "), "row 0 message 1: the answer is empty"),
    "no marker": (said(0, 0, value="Hm?"), "row 0: an image and 0 '<image>' markers"),
    "no image": (lambda rows: rows[0].pop("image"), "row 0: no image and 1 '<image>' markers"),
    "two markers": (said(0, 0, value="<image><image>"), "row 0 message 0: '<image>' may stand once"),
    "image type": (image(5, ["a", "b"]), "row 5: 'image' must be one file name"),
    "missing image": (image(5, "images/none.png"), "row 5: image .*none.png does not exist"),
    "climbing image": (image(5, "../../secret.png"), "row 5: image '../../secret.png' leaves its folder"),
    "absolute image": (image(5, "/etc/hostname"), "row 5: image '/etc/hostname' leaves its folder"),
}


@pytest.mark.parametrize("change,message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named(make_data: MakeData, change: Callable[[Any], object], message: str) -> None:
    data = make_data(change)
    with pytest.raises(UsageError, match=message) as raised:
        read_rows(data, data.parent)
    assert str(data) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text,message", [("{}", "row 0 is {}"), ("[]", "holds no row"), ("5", "is not JSON, parquet or tar")]
)
def test_a_file_of_the_wrong_shape_says_what_is_expected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"{message}; give LLaVA rows .* Hugging Face rows .* tar shards"):
        read_rows(path, tmp_path)


def test_a_link_out_of_the_folder_is_refused(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data(lambda rows: rows[0].update(image="images/link.png"))
    (tmp_path / "outside.png").write_bytes((data.parent / "images" / "0.png").read_bytes())
    (data.parent / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(UsageError, match="leaves its folder"):
        read_rows(data, data.parent)


def test_a_corrupt_image_names_its_row(make_data: MakeData, processing: Processing) -> None:
    data = make_data()
    (data.parent / "images" / "3.png").write_bytes(b"no picture")
    row = read_rows(data, data.parent)[3]
    with pytest.raises(BadImageError, match=r"row 3: image .*3\.png is no picture"):
        ImageStore(processing.image, 0).pixels(row)


def test_the_data_file_survives_a_round_trip(make_data: MakeData) -> None:
    data = make_data()
    before = list(read_rows(data, data.parent))
    data.write_text(json.dumps(json.loads(data.read_text()), indent=3))
    assert list(read_rows(data, data.parent)) == before
    assert [row.number for row in before if row.image is None] == [1, 4]
