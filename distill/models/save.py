"""MobileVlm + Processing -> a Hugging Face checkpoint directory that load_vlm and AutoTokenizer open again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor

from bundle.manifest import ImageSpec, PromptSpec, TokenizerSpec
from bundle.staging import write_text_whole
from distill.models.checkpoint import OUR_ARCHITECTURE
from distill.models.llava import their_config, their_tensors
from distill.models.llava_processing import KEPT_FILES
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import PILLOW_BICUBIC, PREPROCESSOR_FILE, TOKENIZER_FILE, Processing


def save_checkpoint(vlm: MobileVlm, folder: Path, processing: Processing, card: str | None = None) -> None:
    """Write weights, config, tokenizer, image processor, chat template and model card into ``folder``.

    A Hugging Face LLaVA is written under the names it came with, for transformers to open; any other in our layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if vlm.config.llava_names is not None:
        _save_llava(vlm, folder, processing.tokenizer_path.parent)
    else:
        _save_ours(vlm, folder, processing)
    write_text_whole(folder / "README.md", card or _plain_card(vlm))


def _save_llava(vlm: MobileVlm, folder: Path, source: Path) -> None:
    their_config(vlm).save_pretrained(folder)
    save_file(their_tensors(vlm), folder / "model.safetensors", metadata={"format": "pt"})
    for name in KEPT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _save_ours(vlm: MobileVlm, folder: Path, processing: Processing) -> None:
    vlm.config.architectures = [OUR_ARCHITECTURE]
    vlm.config.prompt_template = processing.prompt.template
    vlm.config.image_aspect_ratio = processing.image.strategy
    vlm.config.dtype = vlm.dtype
    vlm.config.save_pretrained(folder)
    tied = {"lm_head.weight"} if vlm.config.text_config.tie_word_embeddings else set()
    weights = {name: tensor.detach().contiguous() for name, tensor in vlm.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(processing.tokenizer_path, folder / TOKENIZER_FILE)
    tokens = _special_tokens(processing)
    _write_json(folder / "special_tokens_map.json", tokens)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(vlm, tokens))
    _write_json(folder / "generation_config.json", _generation_config(processing.tokenizer))
    _write_json(folder / PREPROCESSOR_FILE, _preprocessor_config(processing.image))
    write_text_whole(folder / "chat_template.jinja", chat_template(processing.prompt))


def chat_template(prompt: PromptSpec) -> str:
    """The prompt template as Jinja over messages with string content: the text of ``bundle.prompt`` for every turn."""
    if prompt.template == "plain":
        return "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    system = prompt.prefix.removesuffix(" USER: ")
    return (
        "{{ bos_token }}" + system + " {% for message in messages %}"
        "{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
        "{% else %}ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def _special_tokens(processing: Processing) -> dict[str, str]:
    pieces = SentencePieceProcessor(model_file=str(processing.tokenizer_path))
    spec = processing.tokenizer
    ids = {
        "bos_token": spec.bos_id,
        "eos_token": spec.eos_ids[0],
        "unk_token": pieces.unk_id(),
        "pad_token": spec.pad_id,
    }
    return {name: pieces.id_to_piece(number) for name, number in ids.items() if number is not None}


def _tokenizer_config(vlm: MobileVlm, tokens: dict[str, str]) -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,  # pieces around the image are encoded on their own, as LLaVA does
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "model_max_length": vlm.config.text_config.max_position_embeddings,
        **tokens,
    }


def _generation_config(spec: TokenizerSpec) -> dict[str, Any]:
    eos = spec.eos_ids[0] if len(spec.eos_ids) == 1 else list(spec.eos_ids)
    return {"bos_token_id": spec.bos_id, "eos_token_id": eos, "pad_token_id": spec.pad_id, "do_sample": False}


def _preprocessor_config(spec: ImageSpec) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": spec.size},
        "resample": PILLOW_BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": spec.size, "width": spec.size},
        "do_rescale": True,
        "rescale_factor": spec.rescale,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def _plain_card(vlm: MobileVlm) -> str:
    text, kind = vlm.config.text_config, "MobileVLM" if vlm.config.llava_names is None else "LLaVA"
    return (
        "---\nlibrary_name: alignkd\npipeline_tag: image-text-to-text\n---\n\n"
        f"{kind}: {text.num_hidden_layers} layers, width {text.hidden_size}, "
        f"{vlm.config.visual_tokens} visual tokens.\n"
        "Open it with `from distill.models import load_vlm; vlm = load_vlm(path)`.\n"
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text_whole(path, json.dumps(value, indent=2) + "\n")
