"""Image file or bytes -> pixel_values [1, 3, S, S] float32: the reference that Kotlin and Swift reproduce.

The steps are those of the published loader: RGB, square by pad, crop or stretch, Pillow bicubic on uint8, rescale,
normalise. Like that loader it ignores EXIF orientation (a rotated photo is seen as stored) and drops alpha (the colour
under it stays). Unlike it, 16-bit grey keeps its high byte instead of clipping to white, as Pillow does for 16-bit RGB.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from bundle.errors import UsageError
from bundle.manifest import ImageSpec

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs, applied to the padded or resized picture too
FILTERS = {"bicubic": Image.Resampling.BICUBIC}
DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, MemoryError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip  # what Pillow's decoders raise on damaged files


def open_image(source: str | Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """Decode an image file, its bytes, or a picture that Pillow has opened but not yet read, to RGB.

    Args:
        name: what messages call it; default: its path, or "the given image".

    Raises:
        UsageError: it is missing, no image, truncated, or too large.
    """
    name = name or (f"image {source}" if isinstance(source, str | Path) else "the given image")
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise UsageError(f"{name} does not exist or is no file; give the path of a PNG, JPEG or other picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures and palette transparency: both handled here
            if isinstance(source, Image.Image):
                return to_rgb(source)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return to_rgb(image)
    except UnidentifiedImageError as error:
        raise UsageError(
            f"{name} is no picture that Pillow can read (PNG, JPEG, WebP, ...); convert it first"
        ) from error
    except DAMAGE as error:
        raise UsageError(f"{name} is damaged or truncated ({error}); copy or download it again") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, by Pillow's conversion; 16-bit grey by its high byte."""
    image.load()
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I;16"):
        high = (np.asarray(image.convert("I")) >> 8).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    return image.convert("RGB")


def preprocess(image: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    """Picture -> pixel_values [1, 3, S, S] by ``spec``."""
    return normalise(resize(image, spec), spec)


def resize(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Picture -> RGB picture of S x S, uint8: everything before the arithmetic in floats."""
    rgb = image if image.mode == "RGB" else to_rgb(image)
    square = {"pad": _pad, "crop": _crop, "stretch": _stretch}[spec.strategy]
    return square(rgb, spec)


def normalise(square: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    """RGB S x S -> (value * rescale - mean) / std, rescaled in float64 and rounded once, the rest in float32."""
    rescaled = (np.asarray(square, dtype=np.float64) * spec.rescale).astype(np.float32)  # [S, S, 3]
    normal = (rescaled - np.array(spec.mean, dtype=np.float32)) / np.array(spec.std, dtype=np.float32)  # [S, S, 3]
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None])  # [1, 3, S, S]


def _pad(image: Image.Image, spec: ImageSpec) -> Image.Image:
    width, height = image.size
    side = max(width, height)
    _refuse_huge(image, side, side)
    if width != height:
        padded = Image.new("RGB", (side, side), spec.pad_rgb)
        padded.paste(image, ((side - width) // 2, (side - height) // 2))
        image = padded
    return _stretch(image, spec)


def _crop(image: Image.Image, spec: ImageSpec) -> Image.Image:
    width, height = image.size
    shortest = min(width, height)
    wide, high = int(spec.size * width / shortest), int(spec.size * height / shortest)
    _refuse_huge(image, wide, high)
    left, top = (wide - spec.size) // 2, (high - spec.size) // 2
    resized = image.resize((wide, high), FILTERS[spec.resample])
    return resized.crop((left, top, left + spec.size, top + spec.size))


def _stretch(image: Image.Image, spec: ImageSpec) -> Image.Image:
    return image.resize((spec.size, spec.size), FILTERS[spec.resample])


def _refuse_huge(image: Image.Image, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"a picture of {image.width} x {image.height} would need {width} x {height} pixels on its way in, "
            f"more than {MAX_PIXELS}; cut or shrink it first"
        )
