"""Tiny random LlavaForConditionalGeneration checkpoints, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

VOCABULARY, IMAGE_ID = 120, 110
KINDS = [(text, tower) for text in ("llama", "qwen2") for tower in ("clip_vision_model", "siglip_vision_model")]


def make_llava(
    text: str = "llama", tower: str = "clip_vision_model", seed: int = 0, text_changes: dict[str, Any] | None = None,
    tower_changes: dict[str, Any] | None = None, **changes: Any,
) -> LlavaForConditionalGeneration:  # fmt: skip
    """A model with 9 (CLIP) or 9 (SigLIP) patches; weights large enough that every part shows in the logits."""
    decoder = {
        "model_type": text, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": VOCABULARY, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    } | (text_changes or {})  # fmt: skip
    vision = {
        "model_type": tower, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 32, "image_size": 24, "patch_size": 8,
    } | (tower_changes or {})  # fmt: skip
    strategy = "default" if tower.startswith("clip") else "full"
    fields = {"image_token_index": IMAGE_ID, "vision_feature_select_strategy": strategy} | changes
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=decoder, vision_config=vision, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_llava(folder: Path, model: LlavaForConditionalGeneration, **options: Any) -> Path:
    """Save it as transformers does."""
    model.save_pretrained(folder, **options)
    return folder


VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# of llava-interleave-qwen: a line feed before every text, and an answered turn written otherwise than an asked one
INTERLEAVE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = (
    "what colour is the circle how many are there red a green square blue three user assistant USER ASSISTANT : ? . \n"
)
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<image>")


def write_tokens(folder: Path, chat: str, words: str = WORDS, begins: bool = True) -> int:
    """A LLaMA-like tokenizer.json with its template, by transformers; returns the image token's id."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.train_from_iterator(words.split(" "), trainers.BpeTrainer(vocab_size=90, special_tokens=list(SPECIAL)))
    if begins:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    end = "</s>" if chat == VICUNA else "<|im_end|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if begins else None, eos_token=end, pad_token="<pad>",
        unk_token="<unk>", chat_template=chat,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return SPECIAL.index("<image>")


def write_images(folder: Path, kind: str, size: int = 24, **changes: Any) -> None:
    """preprocessor_config.json of a CLIP, LLaVA or SigLIP image processor."""
    import json

    sizes: dict[str, Any] = {"size": {"height": size, "width": size}}
    if kind != "SiglipImageProcessor":
        sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}, "do_center_crop": True}
    fields = {
        "image_processor_type": kind, "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.3, 0.2],
    } | sizes | ({"do_pad": True} if kind == "LlavaImageProcessor" else {}) | changes  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))


def write_whole(
    folder: Path, text: str = "llama", tower: str = "clip_vision_model", chat: str = VICUNA, words: str = WORDS,
    **changes: Any,
) -> LlavaForConditionalGeneration:  # fmt: skip
    """A checkpoint with all its files."""
    folder.mkdir(parents=True, exist_ok=True)
    image_id = write_tokens(folder, chat, words, begins=text == "llama")
    model = make_llava(text, tower, image_token_index=image_id, **changes)
    write_llava(folder, model)
    (folder / "generation_config.json").unlink()
    write_images(folder, "CLIPImageProcessor" if tower.startswith("clip") else "SiglipImageProcessor")
    return model
