"""Checkpoint directory (ours, MobileVLM's as published, Hugging Face LLaVA) -> MobileVlm; safetensors only, no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.initialization import no_init_weights

from bundle.errors import UsageError
from bundle.staging import inside
from distill.models.llava import LLAVA_ARCHITECTURE, llava_config, our_names, refuse_other_parts
from distill.models.mobilevlm import MobileVlm, MobileVlmConfig
from distill.models.projector import LDP_V1, LDP_V2, LINEAR, mlp_depth
from distill.models.unsupported import unsupported_architecture

# MobileVLM's as published; LLaVA's own training code writes the same layout
PUBLISHED_ARCHITECTURES = ("MobileLlamaForCausalLM", "LlavaLlamaForCausalLM")
OUR_ARCHITECTURE = "MobileVlm"
SUPPORTED = (OUR_ARCHITECTURE, *PUBLISHED_ARCHITECTURES, LLAVA_ARCHITECTURE)
IGNORED_SUFFIXES = ("position_ids", "rotary_emb.inv_freq")  # buffers in older files, recomputed here
# what transformers and torch raise for sizes that fit no model
IMPOSSIBLE_CONFIG = (StrictDataclassError, ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError)
# published name -> ours; the first prefix that fits wins
PUBLISHED_NAMES = {
    "model.vision_tower.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.vision_tower.": "vision_tower.",
    "model.": "language_model.",
    "lm_head.": "lm_head.",
}
PUBLISHED_PROJECTOR, OUR_PROJECTOR = "model.mm_projector.", "projector."
# the same for what follows these two, by the projector's type
LDP_V2_NAMES = {"mlp.mlp.0.": "linear_1.", "mlp.mlp.2.": "linear_2.", "peg.peg.0.": "position."}
MOBILE_BLOCK_NAMES = {
    "block.0.0.": "depthwise.", "block.0.1.": "depthwise_norm.", "block.1.fc1.": "squeeze.", "block.1.fc2.": "excite.",
    "block.2.0.": "pointwise.", "block.2.1.": "pointwise_norm.",
}  # fmt: skip
LDP_V1_NAMES = {"model.mlp.1.": "linear_1.", "model.mlp.3.": "linear_2."} | {
    f"model.mb_block.{number + 1}.{theirs}": f"blocks.{number}.{ours}"
    for number in range(2)
    for theirs, ours in MOBILE_BLOCK_NAMES.items()
}
LLAMA_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "rms_norm_eps", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A weight of a checkpoint that was not read yet."""

    file: Path
    name: str  # as stored
    shape: tuple[int, ...]

    def load(self) -> torch.Tensor:
        """Its values in the stored type, mapped from the file: pages that nobody reads cost no memory."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.name)


def load_vlm(path: str | Path, dtype: torch.dtype = torch.float32) -> MobileVlm:
    """Open a checkpoint directory.

    Raises:
        UsageError: the directory, config, weights or vision tower is missing, unsupported or damaged.
    """
    skeleton, weights = open_checkpoint(path)
    with no_init_weights():  # values that are replaced at once: neither drawn nor touched, so they cost no memory
        vlm = MobileVlm(skeleton.config)
    # copied, since a tensor that lies in a mapped file would change with the file
    vlm.load_state_dict({name: w.load().to(dtype, copy=True) for name, w in weights.items()}, strict=False, assign=True)
    vlm.tie_head()
    return vlm.eval()


def open_checkpoint(path: str | Path) -> tuple[MobileVlm, dict[str, StoredTensor]]:
    """A checkpoint's model on the meta device, without values, and where the value of each state-dict name lies.

    Raises:
        UsageError: as ``load_vlm``.
    """
    folder = Path(path)
    config = read_json(folder / "config.json", folder)
    architecture = architecture_of(config, folder)
    if architecture in PUBLISHED_ARCHITECTURES:
        open_layout = _open_published
    else:
        open_layout = _open_llava if architecture == LLAVA_ARCHITECTURE else _open_ours
    try:
        ours, weights = open_layout(folder, config)
        with torch.device("meta"):
            vlm = MobileVlm(ours)
    except IMPOSSIBLE_CONFIG as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"{folder}: config.json describes no model that can be built ({type(error).__name__}: {reason})"
        ) from error
    _check(vlm, weights, folder)
    return vlm.eval(), weights


def architecture_of(config: dict[str, Any], folder: Path) -> str:
    """The architecture that config.json names.

    Raises:
        UsageError: it, or a part of a LLaVA, is not supported; the line says what is, and what is nearest.
    """
    name = (config.get("architectures") or ["(none)"])[0]
    if name not in SUPPORTED:
        raise UsageError(f"{folder}: {unsupported_architecture(name, SUPPORTED, LLAVA_ARCHITECTURE)}")
    if name == LLAVA_ARCHITECTURE:
        refuse_other_parts(config, folder)
    return name


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint, or one line that says what is missing."""
    if not path.is_file():
        raise UsageError(
            f"{folder} is no checkpoint: {path.name} is missing; give a directory with config.json and *.safetensors"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors shards of a checkpoint, in name order; pickled weights are never opened."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index, folder).get("weight_map", {}).values()))
        return [inside(folder, name, "weight file") for name in names]
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is never opened: convert it to safetensors first" if pickled else ""
        raise UsageError(f"{folder} has no model*.safetensors{hint}")
    return files


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its stored name; values are not read."""
    weights: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        if not path.is_file():
            raise UsageError(f"{folder}: weight file {path.name} is named by the index but missing")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    weights[name] = StoredTensor(path, name, tuple(file.get_slice(name).get_shape()))
        except SafetensorError as error:
            raise UsageError(f"{path} is damaged ({error}); copy or download it again") from error
    return weights


def _open_ours(folder: Path, config: dict[str, Any]) -> tuple[MobileVlmConfig, dict[str, StoredTensor]]:
    return MobileVlmConfig.from_dict(config), read_weights(folder)


def _open_llava(folder: Path, config: dict[str, Any]) -> tuple[MobileVlmConfig, dict[str, StoredTensor]]:
    ours = llava_config(config, folder)
    stored = {name: tensor for name, tensor in read_weights(folder).items() if not name.endswith(IGNORED_SUFFIXES)}
    names, ours.llava_names = our_names(stored, folder)
    return ours, {names[name]: tensor for name, tensor in stored.items()}


def _open_published(folder: Path, config: dict[str, Any]) -> tuple[MobileVlmConfig, dict[str, StoredTensor]]:
    projector = str(config.get("mm_projector_type"))
    weights = {
        published_name(name, projector, folder): tensor
        for name, tensor in read_weights(folder).items()
        if not name.endswith(IGNORED_SUFFIXES)
    }
    tower_folder = tower_directory(folder, config)
    if not any(name.startswith("vision_tower.") for name in weights):
        if tower_folder is None:
            raise _no_tower(folder, config)
        weights.update(_tower_weights(tower_folder))
    vision = _vision_config(folder, config, tower_folder)
    text = LlamaConfig(**{key: config[key] for key in LLAMA_FIELDS if key in config}, rope_parameters=_rope(config))
    text.tie_word_embeddings = False
    ours = MobileVlmConfig(
        text_config=text,
        vision_config=vision,
        vision_select_layer=config.get("mm_vision_select_layer", -2),
        projector_type=projector,
        image_aspect_ratio={"pad": "pad"}.get(config.get("image_aspect_ratio", "pad"), "crop"),
    )
    return ours, weights


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": float(config.get("rope_theta", 10000.0))}


def _names(projector: str, folder: Path) -> dict[str, str]:
    """Published name -> ours for a checkpoint with this projector; the first prefix that fits wins."""
    if projector in (LDP_V2, LDP_V1):
        inner = LDP_V2_NAMES if projector == LDP_V2 else LDP_V1_NAMES
    elif projector == LINEAR:
        inner = {"": "linears.0."}
    else:
        try:
            depth = mlp_depth(projector)
        except ValueError as error:
            raise UsageError(f"{folder}: mm_projector_type: {error}") from None
        inner = {f"{2 * number}.": f"linears.{number}." for number in range(depth)}  # GELUs take the odd numbers
    return {PUBLISHED_PROJECTOR + theirs: OUR_PROJECTOR + ours for theirs, ours in inner.items()} | PUBLISHED_NAMES


def published_name(name: str, projector: str, folder: Path) -> str:
    """A tensor's name in the published layout -> ours.

    Raises:
        UsageError: the name is not part of that layout, or the projector is not known.
    """
    return _rename(name, _names(projector, folder), folder)


def _rename(name: str, names: dict[str, str], folder: Path) -> str:
    for theirs, ours in names.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise UsageError(f"{folder}: tensor '{name}' is not part of the published MobileVLM layout")


def tower_directory(folder: Path, config: dict[str, Any]) -> Path | None:
    """The folder that ``mm_vision_tower`` names: absolute, inside the checkpoint, or beside it; None if not on disk."""
    name = str(config.get("mm_vision_tower") or "")
    places = [Path(name), folder / name, folder.parent / name] if name else []
    return next((place for place in places if (place / "config.json").is_file()), None)


def _no_tower(folder: Path, config: dict[str, Any]) -> UsageError:
    return UsageError(
        f"{folder} has no vision tower: none in its weights, and mm_vision_tower '{config.get('mm_vision_tower')}' is "
        f"no folder on this disk; put the CLIP tower (config.json, model.safetensors) into {folder.parent} by that name"
    )


def _vision_config(folder: Path, config: dict[str, Any], tower_folder: Path | None) -> CLIPVisionConfig:
    if tower_folder is None:
        raise _no_tower(folder, config)
    raw = read_json(tower_folder / "config.json", tower_folder)
    return CLIPVisionConfig(
        **{k: v for k, v in raw.get("vision_config", raw).items() if k not in ("architectures", "model_type")}
    )


def _tower_weights(tower_folder: Path) -> dict[str, StoredTensor]:
    weights = read_weights(tower_folder)
    return {
        "vision_tower." + name.removeprefix("vision_model."): tensor
        for name, tensor in weights.items()
        if name.startswith("vision_model.") and not name.endswith(IGNORED_SUFFIXES)
    }


def _check(vlm: MobileVlm, weights: Mapping[str, StoredTensor], folder: Path) -> None:
    wanted: Mapping[str, torch.Tensor] = vlm.state_dict()
    tied = {"lm_head.weight"} if vlm.config.text_config.tie_word_embeddings else set()
    missing = sorted(set(wanted) - set(weights) - tied)
    extra = sorted(set(weights) - set(wanted))
    if missing or extra:
        raise UsageError(
            f"{folder}: weights do not fit the config: {len(missing)} missing (first: {missing[:1]}), "
            f"{len(extra)} unknown (first: {extra[:1]})"
        )
    for name, weight in weights.items():
        if weight.shape != tuple(wanted[name].shape):
            raise UsageError(
                f"{folder}: '{name}' has shape {list(weight.shape)}, the config asks for {list(wanted[name].shape)}"
            )
