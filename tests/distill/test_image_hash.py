"""Copies are found through resizing and recompression, others are not; the search equals comparing all pairs."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bundle.errors import UsageError
from distill.data_doctor.benchmark_pictures import benchmark_pictures
from distill.data_doctor.image_hash import FINGERPRINT, HASH_DISTANCE, Fingerprints, fingerprint
from distill.data_doctor.like_pictures import first_copies, like_pairs, nearest
from distill.demo_world.demo_benchmarks import WRITERS
from distill.demo_world.scene import SEEN_PAIRS, draw, make_scene


def scene(seed: int) -> Image.Image:
    draws = random.Random(seed)
    return Image.fromarray(draw(make_scene(draws, SEEN_PAIRS), draws)).convert("RGB")


def saved(picture: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


def prints(pictures: list[Image.Image]) -> Fingerprints:
    return np.concatenate([fingerprint(picture) for picture in pictures])


def test_a_copy_is_found_and_another_scene_is_not() -> None:
    scenes = [scene(seed) for seed in range(60)]
    copies = [saved(one, 50) for one in scenes[:20]] + [one.resize((336, 336)) for one in scenes[20:40]]
    found, others, bits = nearest(prints(copies), prints(scenes), HASH_DISTANCE)
    assert found.tolist() == others.tolist() == list(range(40)) and bits.max() <= HASH_DISTANCE
    assert first_copies(prints(scenes), HASH_DISTANCE).tolist() == list(range(60))
    assert first_copies(prints(scenes[:3] + copies[:2]), HASH_DISTANCE).tolist() == [0, 1, 2, 0, 1]


def test_pictures_that_differ_in_colour_alone_are_different() -> None:
    red, green = Image.new("RGB", (40, 40), (200, 0, 0)), Image.new("RGB", (40, 40), (0, 102, 0))
    both = prints([red, green])
    assert (both["hash"][0] == both["hash"][1]).all()
    assert first_copies(both, HASH_DISTANCE).tolist() == [0, 1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), left=st.integers(0, 40), right=st.integers(0, 40), distance=st.integers(0, 32))
def test_the_search_equals_comparing_all_pairs(seed: int, left: int, right: int, distance: int) -> None:
    draws = np.random.RandomState(seed)
    made = np.zeros(left + right, FINGERPRINT)
    base = draws.randint(0, 2, (4, 128))
    for one in made:
        bits = base[draws.randint(4)].copy()
        bits[draws.permutation(128)[: draws.randint(0, 20)]] ^= 1
        one["hash"] = np.packbits(bits).view("<u8")
        one["thumbnail"] = draws.choice([0, 20, 60])
    ours, theirs = made[:left], made[left:]
    found = {
        (i, j, bits)
        for lefts, rights, differ in like_pairs(ours, theirs, distance)
        for i, j, bits in zip(lefts.tolist(), rights.tolist(), differ.tolist(), strict=True)
    }
    expected = set()
    for i, one in enumerate(ours):
        for j, other in enumerate(theirs):
            bits = int(np.bitwise_count(one["hash"] ^ other["hash"]).sum())
            if bits <= distance and abs(int(one["thumbnail"].max()) - int(other["thumbnail"].max())) <= 24:
                expected.add((i, j, bits))
    assert found == expected


def test_a_twenty_thousand_hashes_do_not_need_all_pairs() -> None:
    draws = np.random.RandomState(0)
    many, few = np.zeros(20_000, FINGERPRINT), np.zeros(1000, FINGERPRINT)
    many["hash"] = draws.randint(0, 2**63, (20_000, 2))
    few["hash"] = many["hash"][::20]
    few["hash"][:, 0] ^= np.uint64(0b10010001)
    compared = [len(lefts) for lefts, _, _ in like_pairs(few, many, HASH_DISTANCE)]
    assert sum(compared) >= 1000
    found, others, bits = nearest(few, many, HASH_DISTANCE)
    assert others.tolist() == list(range(0, 20_000, 20)) and set(bits.tolist()) == {3}


@pytest.mark.parametrize("name", WRITERS)
def test_pictures_of_the_six_benchmarks_are_read_in_their_own_layouts(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, random.Random(name), 6)
    found = list(benchmark_pictures(tmp_path / name))
    assert len(found) >= (1 if name == "pope" else 4)
    for _, source in found:
        Image.open(source if isinstance(source, Path) else io.BytesIO(source)).load()
    if name == "mmbench":
        assert all(":" in shown and isinstance(source, bytes) for shown, source in found)
        assert len(found) > len({source for _, source in found if isinstance(source, bytes)})  # rotations


def test_only_pictures_that_questions_name_count(tmp_path: Path) -> None:
    for place in ("gqa/images/a.png", "gqa/images/b.png", "other/c.png", "mme/art/images/d.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / place)
    (tmp_path / "gqa" / "q.jsonl").write_text(json.dumps({"image": "b.png"}) + "\nno json\n")
    (tmp_path / "mme" / "q.jsonl").write_text(json.dumps({"image": "art/images/d.png"}) + "\n")
    names = [name for name, _ in benchmark_pictures(tmp_path)]
    assert names == ["gqa/images/b.png", "mme/art/images/d.png", "other/c.png"]
    with pytest.raises(UsageError, match="is no folder"):
        list(benchmark_pictures(tmp_path / "none"))


def test_rows_of_a_table_that_refer_to_others_or_hold_no_base64_are_passed_over(tmp_path: Path) -> None:
    picture = base64.b64encode(b"x" * 99).decode()
    rows = [("index", "image"), ("1", picture), ("1000001", "1"), ("2", "!" * 99)]
    (tmp_path / "t.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    assert list(benchmark_pictures(tmp_path)) == [("t.tsv:1", b"x" * 99)]
