"""Target name -> a line of JSON per layer that works here (import, export, run): what alignkd-doctor starts per target.

    python -m export.smoke --target onnx

Makes a tiny model with random weights, writes its graphs at int4, and compares what they compute with torch. The first
layer without a line is the broken one; its error is the last line of stderr.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tyro

from bundle.errors import VerificationError, run_command
from bundle.manifest import Golden, ImageSpec, Manifest, ModelShape, Source, Target, TokenizerSpec
from bundle.prompt import TEMPLATES
from bundle.replay import relative_error
from bundle.runtimes.registry import open_runtime
from export.targets import known_target, load_exporter

if TYPE_CHECKING:
    from bundle.runtimes.contract import Runtime
    from distill.models.mobilevlm import MobileVlm
    from export.contract import ExportedGraphs

SEED = 1
IMAGE_SIZE, PATCH, WIDTH, HEADS, CONTEXT, PROMPT_ROWS = 28, 7, 64, 2, 64, 5
TOLERANCE = 0.2  # int8 activations behind random weights are off by up to 0.1, a wrong graph by about 1
VOCABULARY = 288  # 3 special tokens, 256 bytes, a few pieces
SENTENCE = "A chat between a curious user and an assistant. What colour is the circle? yes no red green blue"
ENGINES: dict[Target, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxruntime"),
    "executorch": ("torchao", "executorch.exir", "executorch.runtime"),
    "coreml": ("coremltools",),
    "coreai": ("coreai.runtime", "coreai_torch"),
}
BOS_ID = 1
TOKENIZER = TokenizerSpec(kind="sentencepiece", path="tokenizer.model", bos_id=BOS_ID, eos_ids=(2,), pad_id=0)


@dataclass(frozen=True)
class SmokeConfig:
    """Export and run a tiny random model for one target."""

    target: str
    """executorch, coreml, coreai or onnx"""


def smoke(config: SmokeConfig) -> int:
    """Go through the layers; any error leaves the process as it is."""
    start = time.perf_counter()

    def passed(layer: str, **more: str) -> None:
        nonlocal start
        line = {"layer": layer, "seconds": round(time.perf_counter() - start, 2), **more}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        start = time.perf_counter()

    target = known_target(config.target)
    for engine in ENGINES[target]:
        import_module(engine)
    exporter = load_exporter(target)
    from export.contract import ExportRequest

    passed("import")
    with tempfile.TemporaryDirectory(prefix="alignkd-smoke-") as name:
        folder = Path(name)
        vlm = tiny_vlm(write_tokenizer(folder / TOKENIZER.path))
        request = ExportRequest(
            vlm=vlm,
            precision="int4",
            context_length=CONTEXT,
            tokenizer_path=folder / TOKENIZER.path,
            eos_ids=TOKENIZER.eos_ids,
            bos_id=BOS_ID,
            output=folder,
            progress=lambda line: None,
        )
        exported = exporter(request)
        passed("export")
        runtime = open_runtime(folder, tiny_manifest(target, vlm, exported), threads=1)
        compare(runtime, vlm, exported)
        passed("run", runtime=runtime.name, covers=runtime.covers)
        runtime.close()
    return 0


def write_tokenizer(path: Path) -> int:
    """Train a sentencepiece model on one sentence -> the number of its tokens."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([SENTENCE] * 8),
        model_writer=model,
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return int(SentencePieceProcessor(model_proto=model.getvalue()).vocab_size())


def tiny_vlm(vocabulary: int) -> MobileVlm:
    """A seeded model of some 10,000 parameters."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig

    from distill.models.mobilevlm import MobileVlm, MobileVlmConfig

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=vocabulary,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vlm = MobileVlm(MobileVlmConfig(text_config=text, vision_config=vision)).eval()
        for parameter in vlm.parameters():
            if parameter.dim() == 1:  # fresh biases are 0 and norms 1: converters fold them away, unlike trained ones
                torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return vlm


def tiny_manifest(target: Target, vlm: MobileVlm, exported: ExportedGraphs) -> Manifest:
    """What a runtime needs to open the graphs; there are no golden files to list."""
    text = vlm.config.text_config
    return Manifest(
        name="smoke",
        target=target,
        precision="int4",
        source=Source(name="random", architecture="MobileVlm", weights_sha256="0" * 64),
        created="",
        environment={},
        model=ModelShape(
            hidden_size=WIDTH,
            num_layers=text.num_hidden_layers,
            num_heads=HEADS,
            num_kv_heads=HEADS,
            head_dim=WIDTH // HEADS,
            vocab_size=text.vocab_size,
            context_length=CONTEXT,
            visual_tokens=vlm.config.visual_tokens,
        ),
        graphs=exported.graphs,
        quantization=exported.quantization,
        image=ImageSpec(size=IMAGE_SIZE, strategy="pad", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        prompt=TEMPLATES["v1"],
        tokenizer=TOKENIZER,
        golden=Golden(
            cases="none", vectors={}, constants="none", activation_error={}, tolerances={}, quantization_tolerances={}
        ),
        files={},
    )


def compare(runtime: Runtime, vlm: MobileVlm, exported: ExportedGraphs) -> None:
    """Image, embedding, a prefill and one step against torch with the weights that the graphs hold.

    Raises:
        VerificationError: a graph computes something else.
    """
    import torch

    vlm.load_state_dict(exported.dequantized, strict=False)
    random = np.random.default_rng(SEED)
    pixels = random.normal(size=(1, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    ids = random.integers(3, vlm.config.text_config.vocab_size, (1, PROMPT_ROWS))  # [1, T]
    with torch.no_grad():
        visual = vlm.encode_images(torch.from_numpy(pixels)).numpy()  # [1, N, D]
        rows = vlm.get_input_embeddings()(torch.from_numpy(ids))  # [1, T, D]
        logits = vlm.logits(torch.from_numpy(ids))[0].numpy()  # [T, V]
    runtime.reset()
    errors = {
        "vision_encoder": relative_error(runtime.encode_image(pixels), visual),
        "token_embedding": relative_error(runtime.embed(ids), rows.numpy()),
        "text_decoder, prefill": relative_error(runtime.decode(rows[:, :-1].numpy()), logits[-2]),
        "text_decoder, next token": relative_error(runtime.decode(rows[:, -1:].numpy()), logits[-1]),
    }
    for graph, error in errors.items():
        if not error <= TOLERANCE:
            raise VerificationError(
                f"{graph} on {runtime.name} is off by {error:.2e} from torch, tolerance {TOLERANCE}"
            )


def main() -> None:
    """Entry point of ``python -m export.smoke``."""
    run_command(lambda: smoke(tyro.cli(SmokeConfig, prog="export.smoke")))


if __name__ == "__main__":
    main()
