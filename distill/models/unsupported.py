"""Architecture that no part of this toolkit opens -> the line that says why, what is supported, and what is nearest."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

TILES = "it cuts a picture into tiles, so that the number of visual tokens changes with it"
TEXT_ONLY = "it is a decoder without a vision tower"
# Well-known architectures, by how their names begin -> why. Nearest to all of them is the LLaVA of transformers; a name
# that is not here is compared letter by letter, for it may be a slip of the pen.
REASONS: dict[str, str] = {
    "Qwen2VL": "its tower takes any size of picture and its decoder has positions in three dimensions",
    "Qwen2_5_VL": "its tower takes any size of picture and its decoder has positions in three dimensions",
    "Qwen3VL": "its tower takes any size of picture and its decoder has positions in three dimensions",
    "MiniCPM": "it cuts a picture into slices, resamples them by attention, and needs code of its own",
    "LlavaNext": TILES,
    "LlavaOnevision": TILES,
    "LlavaQwen": TILES,
    "InternVL": TILES,
    "Idefics": TILES,
    "SmolVLM": TILES,
    "Phi3V": TILES,
    "VipLlava": "its projector normalises what it reads of the tower",
    "PaliGemma": "its decoder is a Gemma and sees the whole prompt both ways",
    "Gemma3": "its decoder is a Gemma with windows of two kinds",
    "Mllama": "its decoder looks at the picture by cross-attention",
    "LlamaForCausalLM": TEXT_ONLY,
    "Qwen2ForCausalLM": TEXT_ONLY,
}


def unsupported_architecture(name: str, supported: Sequence[str], nearest_family: str) -> str:
    """The sentence for an architecture outside ``supported``; ``nearest_family`` is of those that REASONS names."""
    reason = next((why for begin, why in REASONS.items() if name.startswith(begin)), None)
    nearest = nearest_family if reason else get_close_matches(name, supported, n=1, cutoff=0)[0]
    because = f" ({reason})" if reason else ""
    return (
        f"architecture '{name}' is not supported{because}; supported: {', '.join(supported)}; the nearest is {nearest}"
    )
