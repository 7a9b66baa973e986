"""Checkpoint directory -> Processing: how its model wants images, prompts and tokens; checks vocabularies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bundle.errors import UsageError
from bundle.manifest import ImageSpec, PromptSpec, TokenizerSpec
from bundle.prompt import TEMPLATES
from bundle.tokenizer import open_tokenizer
from distill.models.chat_template import ChatTurns
from distill.models.checkpoint import PUBLISHED_ARCHITECTURES, architecture_of, read_json, tower_directory
from distill.models.llava import LLAVA_ARCHITECTURE
from distill.models.llava_processing import PILLOW_BICUBIC, PREPROCESSOR_FILE, llava_images, llava_tokens

TOKENIZER_FILE = "tokenizer.model"


@dataclass(frozen=True)
class Processing:
    """Everything between the user's picture and question and the model's tensors."""

    image: ImageSpec
    prompt: PromptSpec
    tokenizer_path: Path  # tokenizer.model of the checkpoint, or the tokenizer.json of a LLaVA
    tokenizer: TokenizerSpec
    turns: ChatTurns | None = None  # of a checkpoint with its own chat template


def read_processing(checkpoint: str | Path) -> Processing:
    """Read the processing of a checkpoint, ours, the published layout or Hugging Face LLaVA.

    Raises:
        UsageError: the architecture is not supported, a file is missing or of the wrong shape, a setting is not
            supported, or tokenizer and model have vocabularies of different size.
    """
    folder = Path(checkpoint)
    config = read_json(folder / "config.json", folder)
    architecture = architecture_of(config, folder)
    if architecture == LLAVA_ARCHITECTURE:
        spec, prompt, turns = llava_tokens(folder, config)
        return Processing(llava_images(folder, config), prompt, folder / spec.path, spec, turns)
    published = architecture in PUBLISHED_ARCHITECTURES
    text = config if published else config.get("text_config", {})
    tokenizer = _tokenizer_spec(folder, text)
    path = folder / TOKENIZER_FILE
    check_vocabulary(path, open_tokenizer(tokenizer, folder).vocab_size, int(text.get("vocab_size", 0)), folder)
    return Processing(
        image=_image_spec(folder, config, tower_directory(folder, config) if published else folder),
        prompt=_prompt_spec(folder, str(config.get("prompt_template", "v1"))),
        tokenizer_path=path,
        tokenizer=tokenizer,
    )


def check_vocabulary(tokenizer: Path, tokenizer_size: int, model_size: int, checkpoint: Path) -> None:
    """Refuse a tokenizer whose ids are not the model's rows."""
    if tokenizer_size != model_size:
        raise UsageError(
            f"tokenizer {tokenizer} has {tokenizer_size} tokens, but the model in {checkpoint} has a vocabulary of "
            f"{model_size}; put the model's own tokenizer.model there"
        )


def _tokenizer_spec(folder: Path, text: dict[str, Any]) -> TokenizerSpec:
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file, folder) if generation_file.is_file() else {}
    eos = generation.get("eos_token_id", text.get("eos_token_id", 2))
    pad = text.get("pad_token_id")
    return TokenizerSpec(
        kind="sentencepiece",
        path=TOKENIZER_FILE,
        bos_id=int(text.get("bos_token_id", 1)),
        eos_ids=tuple(eos) if isinstance(eos, list) else (int(eos),),
        pad_id=0 if pad is None else int(pad),
    )


def _prompt_spec(folder: Path, template: str) -> PromptSpec:
    if template not in TEMPLATES:
        raise UsageError(f"{folder}: prompt_template '{template}' is not known; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[template]


def _image_spec(folder: Path, config: dict[str, Any], preprocessor_folder: Path | None) -> ImageSpec:
    if preprocessor_folder is None or not (preprocessor_folder / PREPROCESSOR_FILE).is_file():
        where = preprocessor_folder or f"the vision tower '{config.get('mm_vision_tower')}' (not on this disk)"
        raise UsageError(
            f"{folder}: {PREPROCESSOR_FILE} is missing in {where}; copy it from the CLIP tower it was trained with"
        )
    path = preprocessor_folder / PREPROCESSOR_FILE
    raw = read_json(path, preprocessor_folder)
    if raw.get("resample", PILLOW_BICUBIC) != PILLOW_BICUBIC:
        raise UsageError(f"{path}: resample {raw['resample']} is not supported; supported: {PILLOW_BICUBIC} (bicubic)")
    crop = raw.get("crop_size", {})
    size = int(crop["height"] if isinstance(crop, dict) and "height" in crop else crop or 0)
    mean, std = _triple(path, raw, "image_mean"), _triple(path, raw, "image_std")
    return ImageSpec(
        size=size or _bad(path, "crop_size", crop),
        strategy=_strategy(config),
        pad_rgb=(int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)),
        rescale=float(raw.get("rescale_factor", 1 / 255)),
        mean=mean,
        std=std,
    )


def _strategy(config: dict[str, Any]) -> Literal["pad", "crop", "stretch"]:
    aspect = config.get("image_aspect_ratio") or "pad"
    if aspect == "stretch":
        return "stretch"
    return "pad" if aspect == "pad" else "crop"  # the published loader crops by CLIP's processor unless told to pad


def _triple(path: Path, raw: dict[str, Any], field: str) -> tuple[float, float, float]:
    value = raw.get(field)
    if not isinstance(value, list) or len(value) != 3:
        _bad(path, field, value)
    red, green, blue = (float(number) for number in value or ())
    return red, green, blue


def _bad(path: Path, field: str, value: object) -> int:
    raise UsageError(f"{path}: '{field}' is {value!r}; copy {PREPROCESSOR_FILE} of the CLIP tower")
