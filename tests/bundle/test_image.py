"""bundle.image against the published loader's recorded pixels, the shared contract vectors, and damaged files."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from bundle.errors import UsageError
from bundle.image import normalise, open_image, preprocess, resize, to_rgb
from bundle.manifest import ImageSpec

GOLDEN = Path(__file__).parents[1] / "golden"
REFERENCE, CONTRACT = GOLDEN / "reference", GOLDEN / "contract"
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
PIXEL_CASES = json.loads((CONTRACT / "pixels.json").read_text(encoding="utf-8"))["cases"]


def spec(strategy: str, size: int = 24) -> ImageSpec:
    return ImageSpec.model_validate({"size": size, "strategy": strategy, **CLIP})


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_the_published_loader_gave_these_pixels() -> None:
    image = open_image(REFERENCE / "prep0_in.png")
    wanted = Image.open(REFERENCE / "prep0_resized336.png")
    assert np.array_equal(np.asarray(resize(image, spec("pad", 336))), np.asarray(wanted))
    pixels = preprocess(image, spec("pad", 336))
    assert pixels.shape == (1, 3, 336, 336) and pixels.dtype == np.float32
    recorded = load_file(REFERENCE / "outputs.safetensors")["prep0.pixel_values_every16"]
    assert np.array_equal(pixels[0, :, ::16, ::16], recorded)
    numbers = json.loads((REFERENCE / "golden.json").read_text())["preprocess"][0]
    assert pixels.mean() == pytest.approx(numbers["mean"], rel=1e-6)
    assert pixels.std() == pytest.approx(numbers["std"], rel=1e-5)
    assert np.abs(pixels).sum() == pytest.approx(numbers["sum_abs"], rel=1e-6)


@pytest.mark.parametrize("case", PIXEL_CASES, ids=lambda case: Path(case["resized"]).stem)
def test_contract_pixels(case: dict) -> None:
    rgb = open_image(CONTRACT / case["input"])
    assert rgb.mode == "RGB" and hashlib.sha256(rgb.tobytes()).hexdigest() == case["rgb_sha256"]
    image_spec = ImageSpec.model_validate(case["spec"])
    square = resize(rgb, image_spec)
    assert np.array_equal(np.asarray(square), np.asarray(Image.open(CONTRACT / case["resized"])))
    values = normalise(square, image_spec)[0].astype(np.float64)
    assert values.sum() == pytest.approx(case["sum"], abs=1e-6)
    assert np.abs(values).sum() == pytest.approx(case["sum_abs"], abs=1e-6)
    assert np.array_equal(values[:, ::7, ::7], np.array(case["every_7"]))


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 70), height=st.integers(1, 70), strategy=st.sampled_from(["pad", "crop", "stretch"]))
def test_any_size_becomes_a_square_and_a_flat_colour_stays_flat(width: int, height: int, strategy: str) -> None:
    image = Image.new("RGB", (width, height), (122, 116, 104))
    square = np.asarray(resize(image, spec(strategy)))
    assert square.shape == (24, 24, 3)
    assert (square == [122, 116, 104]).all()


@pytest.mark.parametrize("size, origin", [((5, 2), (0, 1)), ((2, 5), (1, 0)), ((6, 2), (0, 2)), ((4, 4), (0, 0))])
def test_padding_is_centred_and_rounds_towards_the_upper_left(size: tuple[int, int], origin: tuple[int, int]) -> None:
    side = max(size)
    square = np.asarray(resize(Image.new("RGB", size, (255, 0, 0)), spec("pad", side)))
    red = np.argwhere((square == [255, 0, 0]).all(-1))
    assert tuple(red.min(0)[::-1]) == origin
    assert len(red) == size[0] * size[1]


def test_crop_keeps_the_middle() -> None:
    image = Image.new("RGB", (30, 10), (0, 0, 0))
    image.paste((255, 255, 255), (10, 0, 20, 10))
    assert (np.asarray(resize(image, spec("crop", 10))) == 255).all()


def test_preprocess_leaves_its_input_alone(picture: Image.Image) -> None:
    before = picture.tobytes()
    preprocess(picture, spec("pad"))
    assert picture.tobytes() == before


def test_modes_become_rgb() -> None:
    assert to_rgb(Image.new("CMYK", (2, 2), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    assert to_rgb(Image.new("L", (2, 2), 77)).getpixel((1, 1)) == (77, 77, 77)
    assert to_rgb(Image.new("LA", (2, 2), (77, 0))).getpixel((1, 1)) == (77, 77, 77), "alpha is dropped, not blended"
    assert to_rgb(Image.new("RGBA", (2, 2), (9, 8, 7, 0))).getpixel((0, 0)) == (9, 8, 7)
    sixteen = Image.fromarray(np.full((2, 2), 0x80FF, dtype=np.uint16))
    assert open_image(png(sixteen)).getpixel((0, 0)) == (0x80, 0x80, 0x80), "the high byte, not clipped to white"


def test_exif_rotation_is_ignored_like_the_published_loader_does(picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view"
    assert open_image(png(picture, exif=exif)).tobytes() == picture.tobytes()


def test_bytes_and_path_are_the_same(tmp_path: Path, picture: Image.Image) -> None:
    (tmp_path / "a.png").write_bytes(png(picture))
    assert open_image(tmp_path / "a.png").tobytes() == open_image(png(picture)).tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
def test_a_truncated_file_is_one_line_that_names_it(
    tmp_path: Path, picture: Image.Image, kind: str, keep: float
) -> None:
    path = tmp_path / f"cut.{kind.lower()}"
    picture.resize((200, 150)).save(path, kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UsageError, match=r"cut\.\w+ (is damaged or truncated|is no picture)"):
        open_image(path)


def test_a_picture_opened_but_truncated_is_one_line(tmp_path: Path, picture: Image.Image) -> None:
    content = png(picture)
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "cut.png") as lazy, pytest.raises(UsageError, match="the given image is damaged"):
        open_image(lazy)


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone.png does not exist"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(UsageError, match="does not exist or is no file"):
        open_image(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UsageError, match="text.png is no picture that Pillow can read"):
        open_image(tmp_path / "text.png")
    with pytest.raises(UsageError, match="the given image is no picture"):
        open_image(b"")


@pytest.mark.parametrize("strategy", ["pad", "crop"])
def test_a_thread_like_picture_is_refused_before_memory_is_taken(strategy: str) -> None:
    with pytest.raises(UsageError, match="60000 x 1 would need"):
        preprocess(Image.new("RGB", (60_000, 1)), spec(strategy, 336))
