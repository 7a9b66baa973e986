"""A written ONNX bundle -> its prefix cache: keys and values of the text before the image, by its own decoder."""

from __future__ import annotations

from pathlib import Path

from bundle.errors import UsageError
from bundle.manifest import Manifest, PrefixCache, Target
from bundle.prefix import PREFIX_FILE, write_rows
from bundle.prompt import build_prompt
from bundle.runtimes.onnx import OnnxRuntime
from bundle.runtimes.registry import open_runtime
from bundle.tokenizer import open_tokenizer

# Why the other targets have none.
REFUSALS: dict[Target, str] = {
    "executorch": "ExecuTorch's stock multimodal runner fills its KV cache by prefill alone; it cannot load one",
    "coreml": "a Core ML decoder keeps them as state, which an app must write itself: no app of ours does yet",
    "coreai": "a Core AI decoder keeps them as state, which an app must write itself: no app of ours does yet",
}


def refuse_prefix(target: Target) -> None:
    """Raise where the target's runner cannot start from a cache.

    Raises:
        UsageError: naming what keeps the target from it.
    """
    if target in REFUSALS:
        raise UsageError(f"--prefix-cache is for --target onnx, not {target}: {REFUSALS[target]}; leave it out")


def write_prefix(bundle: Path, manifest: Manifest) -> PrefixCache:
    """Prefill the template's text before the image and write what is then in the cache.

    Raises:
        UsageError: the template has no text there.
    """
    prompt = build_prompt(manifest.prompt, open_tokenizer(manifest.tokenizer, bundle), manifest.tokenizer, "", True)
    ids = prompt.token_ids[: prompt.token_ids.index(manifest.tokenizer.image_token_id)]
    if not manifest.prompt.prefix:
        raise UsageError(
            f"--prefix-cache: template '{manifest.prompt.template}' of {manifest.source.name} begins with the image, "
            "so there is no constant text to keep; leave it out"
        )
    text = {name: graph for name, graph in manifest.graphs.items() if name != "vision_encoder"}
    runtime = open_runtime(bundle, manifest.model_copy(update={"graphs": text}))
    assert isinstance(runtime, OnnxRuntime)  # refuse_prefix lets no other target through
    try:
        write_rows(bundle / PREFIX_FILE, runtime.prefill(ids))
    finally:
        runtime.close()
    return PrefixCache(path=PREFIX_FILE, token_ids=ids)
