"""Seed -> a checkpoint of MobileVLM V2 1.7B's shapes (or the 7B teacher's) with random weights, as published.

    python scripts/make_real_size_checkpoint.py --output /tmp/real/mobilevlm-1.7b

For measuring what an export, a runtime or a training step takes at real size without a download: float16 safetensors in
shards, the CLIP ViT-L/14-336 tower in its own folder inside, a tokenizer of 32000 pieces. Weights have a trained
model's scale, so that activations stay in range through all layers; they know nothing. Memory holds one shard.
"""

from __future__ import annotations

import io
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from safetensors.torch import save_file

from bundle.errors import UsageError, run_command
from bundle.staging import fresh_directory, write_text_whole

VOCABULARY, CONTEXT = 32000, 2048
IMAGE, PATCH, TOWER_WIDTH, TOWER_HEADS, TOWER_FEED_FORWARD, TOWER_LAYERS = 336, 14, 1024, 16, 4096, 24
SHARD_BYTES = 500_000_000
HALF_BYTES = 2
STD = 0.02  # of LLaMA's and CLIP's matrices
NORM_STD, BIAS_STD = 0.1, 0.02  # unlike fresh ones, so that a lost norm or bias is seen
TOWER_FOLDER = "clip-vit-large-patch14-336"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# syllables of the synthetic words that the tokenizer is trained on
ONSETS = ("b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "pl", "sh", "ch")
VOWELS, CODAS = ("a", "e", "i", "o", "u", "ai", "ea", "oo"), ("", "n", "r", "s", "t", "l", "ng", "ck")
WORDS, WORDS_PER_LINE = 40_000, 10

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class RealSizeConfig:
    """Write a checkpoint of real size with random weights."""

    output: Path
    """directory to write; must not exist"""
    teacher: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """the 7B teacher's decoder (4096 wide, 32 layers), not the 1.7B student's (2048 wide, 24 layers)"""
    layers: int | None = None
    """decoder layers, for a smaller variant; default: all"""
    vision_layers: int = TOWER_LAYERS
    """layers of the tower; the last is stored and never run"""
    seed: int = 0
    """of the weights and of the tokenizer's words"""

    def __post_init__(self) -> None:
        if self.layers is not None and self.layers < 1:
            raise UsageError(f"--layers is {self.layers}; it must be at least 1")
        if self.vision_layers < 1:
            raise UsageError(f"--vision-layers is {self.vision_layers}; it must be at least 1")


@dataclass(frozen=True)
class DecoderSize:
    """Sizes of a LLaMA decoder."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int


STUDENT, TEACHER = DecoderSize(2048, 24, 16, 5632), DecoderSize(4096, 32, 32, 11008)


def decoder_shapes(size: DecoderSize, layers: int) -> Shapes:
    """Published name -> shape of decoder and projector."""
    d, f = size.hidden, size.feed_forward
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, d)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{part}_proj.weight": (d, d) for part in "qkvo"}
        shapes |= {f"{block}.mlp.{part}_proj.weight": (f, d) for part in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (d, f)}
        shapes |= {f"{block}.{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
    return shapes | {
        "model.norm.weight": (d,),
        "lm_head.weight": (VOCABULARY, d),
        "model.mm_projector.mlp.mlp.0.weight": (d, TOWER_WIDTH),
        "model.mm_projector.mlp.mlp.0.bias": (d,),
        "model.mm_projector.mlp.mlp.2.weight": (d, d),
        "model.mm_projector.mlp.mlp.2.bias": (d,),
        "model.mm_projector.peg.peg.0.weight": (d, 1, 3, 3),
        "model.mm_projector.peg.peg.0.bias": (d,),
    }


def tower_shapes(layers: int) -> Shapes:
    """Published name -> shape of the CLIP tower."""
    d, f = TOWER_WIDTH, TOWER_FEED_FORWARD
    shapes: Shapes = {
        "vision_model.embeddings.class_embedding": (d,),
        "vision_model.embeddings.patch_embedding.weight": (d, 3, PATCH, PATCH),
        "vision_model.embeddings.position_embedding.weight": ((IMAGE // PATCH) ** 2 + 1, d),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"vision_model.{norm}.{part}": (d,) for part in ("weight", "bias")}
    for layer in range(layers):
        block = f"vision_model.encoder.layers.{layer}"
        linears = {f"self_attn.{part}_proj": (d, d) for part in ("q", "k", "v", "out")}
        for name, (rows, columns) in (linears | {"mlp.fc1": (f, d), "mlp.fc2": (d, f)}).items():
            shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{block}.{norm}.{part}": (d,) for part in ("weight", "bias")}
    return shapes


def random_weight(name: str, shape: tuple[int, ...], seed: int, depth: int) -> torch.Tensor:
    """One seeded weight as float16; matrices that write to the residual stream are smaller the deeper the model is."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    values = torch.randn(shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        values = 1 + NORM_STD * values
    elif name.endswith("bias"):
        values *= BIAS_STD
    elif name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
        values *= STD / (2 * depth) ** 0.5
    else:
        values *= STD
    return values.half()


def shards(shapes: Shapes) -> Iterator[list[str]]:
    """Names in files of at most SHARD_BYTES each."""
    names: list[str] = []
    held = 0
    for name, shape in shapes.items():
        size = HALF_BYTES * int(torch.Size(shape).numel())
        if names and held + size > SHARD_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def write_weights(folder: Path, shapes: Shapes, seed: int, depth: int, console: Console) -> None:
    """Write model-0000i-of-0000n.safetensors and their index; one file is model.safetensors."""
    parts = list(shards(shapes))
    files = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    if len(files) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, parts, strict=True):
        state = {name: random_weight(name, shapes[name], seed, depth) for name in names}
        save_file(state, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        console.print(f"[dim]{folder.name}/{file} written[/dim]", highlight=False)
    if len(files) > 1:
        total = HALF_BYTES * sum(int(torch.Size(shape).numel()) for shape in shapes.values())
        weight_map = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(path: Path, seed: int) -> None:
    """Train a LLaMA-style tokenizer of exactly VOCABULARY pieces on made-up words."""
    from sentencepiece import SentencePieceTrainer

    rng, words = random.Random(seed), dict[str, None]()
    while len(words) < WORDS:
        count = rng.choice((1, 2, 2, 3))
        words["".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(count))] = None
    listed = list(words)
    lines = [" ".join(listed[at : at + WORDS_PER_LINE]) for at in range(0, WORDS, WORDS_PER_LINE)]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 2),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def write_json(path: Path, value: object) -> None:
    """Indented, with a line feed at the end."""
    write_text_whole(path, json.dumps(value, indent=2) + "\n")


def write_configs(folder: Path, size: DecoderSize, layers: int, vision_layers: int) -> None:
    """The JSON files of checkpoint and tower."""
    tower = folder / TOWER_FOLDER
    write_json(
        folder / "config.json",
        {
            "architectures": ["MobileLlamaForCausalLM"],
            "model_type": "mobilevlm",
            "hidden_size": size.hidden,
            "intermediate_size": size.feed_forward,
            "num_hidden_layers": layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
            "hidden_act": "silu",
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "image_aspect_ratio": "pad",
            "mm_hidden_size": TOWER_WIDTH,
            "mm_projector_type": "ldpnetv2",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_vision_tower": TOWER_FOLDER,
            "vision_tower_type": "clip",
        },
    )
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    write_json(
        tower / "config.json",
        {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            "hidden_size": TOWER_WIDTH,
            "image_size": IMAGE,
            "intermediate_size": TOWER_FEED_FORWARD,
            "layer_norm_eps": 1e-5,
            "num_attention_heads": TOWER_HEADS,
            "num_hidden_layers": vision_layers,
            "patch_size": PATCH,
            "projection_dim": 768,
            "torch_dtype": "float16",
        },
    )
    write_json(
        tower / "preprocessor_config.json",
        {
            "crop_size": {"height": IMAGE, "width": IMAGE},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": CLIP_MEAN,
            "image_processor_type": "CLIPImageProcessor",
            "image_std": CLIP_STD,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": IMAGE},
        },
    )


def make(config: RealSizeConfig) -> int:
    """Write the checkpoint; it appears when it is whole."""
    console = Console(stderr=True)
    size = TEACHER if config.teacher else STUDENT
    layers = config.layers or size.layers
    with fresh_directory(config.output) as folder:
        tower = folder / TOWER_FOLDER
        tower.mkdir()
        write_configs(folder, size, layers, config.vision_layers)
        write_tokenizer(folder / "tokenizer.model", config.seed)
        write_weights(tower, tower_shapes(config.vision_layers), config.seed, config.vision_layers, console)
        write_weights(folder, decoder_shapes(size, layers), config.seed, layers, console)
    console.print(str(config.output), highlight=False)
    return 0


def main() -> None:
    """Entry point."""
    run_command(lambda: make(tyro.cli(RealSizeConfig, description=__doc__)))


if __name__ == "__main__":
    main()
