"""Files beside a Hugging Face LLaVA checkpoint -> how it wants images, prompts and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from bundle.errors import UsageError
from bundle.manifest import ImageSpec, PromptSpec, TokenizerSpec
from bundle.tokenizer import TokenizerJson
from distill.models.chat_template import ChatTurns, cut_template, find_template, token_name
from distill.models.checkpoint import read_json

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
PREPROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
PILLOW_BICUBIC = 3
# what is written again beside a trained student, byte for byte
KEPT_FILES = (
    TOKENIZER_JSON, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "merges.txt", PREPROCESSOR_FILE, PROCESSOR_FILE, "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


def llava_tokens(folder: Path, config: dict[str, Any]) -> tuple[TokenizerSpec, PromptSpec, ChatTurns]:
    """The tokenizer's marks, and the chat template cut to pieces.

    Raises:
        UsageError: tokenizer.json or a chat template is missing, or the model's ids are not the tokenizer's.
    """
    path = folder / TOKENIZER_JSON
    if not path.is_file():
        raise UsageError(
            f"{folder} has no {TOKENIZER_JSON}; write it there with transformers: "
            f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
        )
    model = TokenizerJson(path)
    text = config.get("text_config") or {}
    rows = int(text.get("vocab_size") or (32000 if text.get("model_type", "llama") == "llama" else 151936))
    if model.vocab_size > rows:
        raise UsageError(
            f"tokenizer {path} has {model.vocab_size} tokens, but the model in {folder} has a vocabulary of {rows}; "
            "put the model's own tokenizer.json there"
        )
    image_id = int(config.get("image_token_index", config.get("image_token_id", 32000)))
    marker = model.piece(image_id) if image_id < model.vocab_size else ""
    if model.encode_template(marker, marker, image_id) != [image_id]:
        raise UsageError(
            f"{folder}: the image token {image_id} of config.json is no token of its own in {path.name} "
            f"(it reads '{marker}'); put the model's own tokenizer.json there"
        )
    settings = read_json(folder / TOKENIZER_CONFIG, folder) if (folder / TOKENIZER_CONFIG).is_file() else {}
    ids = {model.piece(number): number for number in range(model.vocab_size)}
    named = {mark: token_name(settings.get(mark)) for mark in ("bos_token", "eos_token", "pad_token")}
    eos = _eos_ids(folder, config, ids.get(named["eos_token"] or ""))
    bos_name = named["bos_token"] or ""
    names = {"bos_token": bos_name, "eos_token": named["eos_token"] or model.piece(eos[0])}
    prompt, turns = cut_template(find_template(folder), marker, names, [model.piece(i) for i in eos], folder)
    opening = model.opening_ids
    if bos_name and prompt.prefix.startswith(bos_name):  # said by the template and, often, by the tokenizer again
        opening, prompt = [ids[bos_name]], prompt.model_copy(update={"prefix": prompt.prefix.removeprefix(bos_name)})
    pad = ids.get(named["pad_token"] or "", config.get("pad_token_id", text.get("pad_token_id")))
    spec = TokenizerSpec(
        kind="tokenizers",
        path=TOKENIZER_JSON,
        bos_id=opening[0] if opening else None,
        eos_ids=eos,
        pad_id=eos[0] if pad is None else int(pad),
        image_token_id=image_id,
    )
    return spec, prompt, turns


def _eos_ids(folder: Path, config: dict[str, Any], by_name: int | None) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    generation = read_json(path, folder) if path.is_file() else {}
    text = config.get("text_config") or {}
    for given in (generation.get("eos_token_id"), by_name, text.get("eos_token_id"), config.get("eos_token_id")):
        if given is not None:
            return tuple(given) if isinstance(given, list) else (int(given),)
    raise UsageError(
        f"{folder} names no end token; put eos_token_id into generation_config.json, or eos_token into "
        f"{TOKENIZER_CONFIG}"
    )


def llava_images(folder: Path, config: dict[str, Any]) -> ImageSpec:
    """The rule of CLIPImageProcessor, LlavaImageProcessor or SiglipImageProcessor.

    Raises:
        UsageError: the file is missing, or asks for what ``bundle.image`` does not do.
    """
    path, raw = _image_settings(folder)
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if raw.get(step, True) is not True:
            raise UsageError(f"{path}: {step} is {raw[step]}; supported: true")
    if raw.get("resample", PILLOW_BICUBIC) != PILLOW_BICUBIC:
        raise UsageError(f"{path}: resample {raw['resample']} is not supported; supported: {PILLOW_BICUBIC} (bicubic)")
    strategy, size = _square(path, raw)
    vision = config.get("vision_config")
    wanted = 336 if vision is None else vision.get("image_size", 224)  # transformers' defaults
    if size != wanted:
        raise UsageError(f"{path} makes images of {size} pixels, the vision tower takes {wanted}")
    mean, std = _triple(path, raw, "image_mean"), _triple(path, raw, "image_std")
    return ImageSpec(
        size=size,
        strategy=strategy,
        pad_rgb=(int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)),
        rescale=float(raw.get("rescale_factor", 1 / 255)),
        mean=mean,
        std=std,
    )


def _image_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    if (folder / PREPROCESSOR_FILE).is_file():
        return folder / PREPROCESSOR_FILE, read_json(folder / PREPROCESSOR_FILE, folder)
    path = folder / PROCESSOR_FILE
    raw = read_json(path, folder).get("image_processor") if path.is_file() else None
    if not isinstance(raw, dict):
        raise UsageError(
            f"{folder} has neither {PREPROCESSOR_FILE} nor an image_processor in {PROCESSOR_FILE}; copy it from where "
            "the model came from"
        )
    return path, raw


def _square(path: Path, raw: dict[str, Any]) -> tuple[Literal["pad", "crop", "stretch"], int]:
    """How a picture becomes a square, and its side: a whole size stretches, a shortest edge needs a crop or a pad."""
    size, crop = raw.get("size"), raw.get("crop_size")
    fields: dict[str, Any] = {"shortest_edge": size} if isinstance(size, int) else size or {}
    if raw.get("do_pad"):
        side = fields.get("shortest_edge", fields.get("height"))
        return "pad", _side(path, raw, side, side)
    if "height" in fields:
        return "stretch", _side(path, raw, fields["height"], fields.get("width"))
    edge = fields.get("shortest_edge")
    cut: dict[str, Any] = {"height": crop, "width": crop} if isinstance(crop, int) else crop or {}
    if not raw.get("do_center_crop", True) or cut.get("height") != edge:
        edge = None
    return "crop", _side(path, raw, edge, cut.get("width"))


def _side(path: Path, raw: dict[str, Any], height: object, width: object) -> int:
    if not isinstance(height, int) or height != width:
        raise UsageError(
            f"{path}: size {raw.get('size')} with crop_size {raw.get('crop_size')} makes no square in a way that is "
            "supported: a size of equal height and width, or a shortest edge with a centre crop of the same, or do_pad"
        )
    return height


def _triple(path: Path, raw: dict[str, Any], field: str) -> tuple[float, float, float]:
    value = raw.get(field)
    if not isinstance(value, list) or len(value) != 3:
        raise UsageError(f"{path}: '{field}' is {value!r}; give three numbers, one a colour")
    red, green, blue = (float(number) for number in value)
    return red, green, blue
