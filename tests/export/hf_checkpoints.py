"""Tiny checkpoints of the Hugging Face LLaVA family with all their files, written by transformers itself.

Weights are random; tokenizers are trained: LLaMA's with metaspace and byte fallback, Qwen2's on bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.distill.llava_checkpoints import CHATML, INTERLEAVE, VICUNA, make_llava

SIZE, PATCH = 48, 16
KINDS = [(text, tower) for text in ("llama", "qwen2") for tower in ("clip_vision_model", "siglip_vision_model")]
SENTENCES = (
    "What colour is the circle? The circle is red, the square is blue and the triangle is green.",
    "How many shapes are there?\nAnswer the question using a single word or phrase.",
    "Is there a red square in the image? Answer yes or no. USER: ASSISTANT: user assistant",
    "A chat between a curious user and an artificial intelligence assistant. What is the capital of France? Paris.",
)
# Qwen2's own: contractions, words, single digits, punctuation, line ends, blanks
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# What a checkpoint of the family may say otherwise than the four plain ones.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied embeddings": ("qwen2", "clip_vision_model", {"text_changes": {"tie_word_embeddings": True}}),
    "biases everywhere, wide heads": (
        "llama",
        "clip_vision_model",
        {"text_changes": {"attention_bias": True, "mlp_bias": True, "head_dim": 32}},
    ),
    "scaled rotary": ("llama", "siglip_vision_model", {"text_changes": {"rope_parameters": LLAMA3_ROPE}}),
    "one key head, another base": (
        "qwen2",
        "siglip_vision_model",
        {
            "text_changes": {
                "num_key_value_heads": 1,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "layer_types": ["full_attention"] * 2,
            }
        },
    ),
    "several layers of the tower, class token kept": (
        "llama",
        "clip_vision_model",
        {"vision_feature_layer": [-2, 1, 0], "vision_feature_select_strategy": "full"},
    ),
    "last layer, first patch dropped, plain projector": (
        "qwen2",
        "siglip_vision_model",
        {
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "relu",
            "multimodal_projector_bias": False,
        },
    ),
    "a line feed before each text": ("qwen2", "siglip_vision_model", {"chat": INTERLEAVE}),
    "window as wide as the context": (
        "qwen2",
        "clip_vision_model",
        {"text_changes": {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 1}},
    ),
}


def llama_tokenizer(chat: str = VICUNA) -> PreTrainedTokenizerFast:
    """BPE over metaspace, no piece across words, with <s> first; written as LLaMA 2's: no words are split apart."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, special_tokens=pieces))
    backend.pre_tokenizer = None  # type: ignore[assignment]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"}, chat_template=chat,
    )  # fmt: skip


def qwen_tokenizer(chat: str = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE that begins with nothing."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(SENTENCES, trainer)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])  # behind the words, as Qwen2's are
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"}, chat_template=chat,
    )  # fmt: skip


def write_checkpoint(
    folder: Path,
    text: str = "llama",
    tower: str = "clip_vision_model",
    chat: str | None = None,
    seed: int = 0,
    text_changes: dict[str, Any] | None = None,
    tower_changes: dict[str, Any] | None = None,
    **changes: Any,
) -> LlavaForConditionalGeneration:
    """Model, tokenizer, chat template and image rule in ``folder``; returns the model."""
    is_clip = tower == "clip_vision_model"
    tokenizer = (llama_tokenizer if text == "llama" else qwen_tokenizer)(
        chat or (VICUNA if text == "llama" else CHATML)
    )
    strategy = changes.setdefault("vision_feature_select_strategy", "default" if is_clip else "full")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tower_sizes = {"hidden_size": 32, "intermediate_size": 64, "image_size": SIZE, "patch_size": PATCH}
    model = make_llava(
        text,
        tower,
        seed,
        sizes | ids | {"pad_token_id": tokenizer.pad_token_id} | (text_changes or {}),
        tower_sizes | (tower_changes or {}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **changes,
    )
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    images: Any
    if is_clip:
        images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    else:
        images = SiglipImageProcessorPil(
            size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(is_clip),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return model
