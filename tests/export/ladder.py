"""A tiny model and its exported graphs -> a bundle's verdict, as alignkd-export and alignkd-verify make it.

Graphs are written once. A fault of the exporter is planted by recording the vectors of the model that those graphs
would be a wrong export of; a fault of the files by changing them after the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from bundle.constants import record_constants
from bundle.golden import read_golden
from bundle.manifest import ImageSpec, Manifest, ModelShape, Precision, Source, Target, TokenizerSpec
from bundle.prompt import TEMPLATES
from bundle.runtimes.contract import Runtime
from bundle.runtimes.registry import RuntimeEntry, first_entry
from bundle.tokenizer import open_tokenizer
from bundle.verify import Verdict, verdict_of
from distill.models.mobilevlm import MobileVlm, MobileVlmConfig
from distill.models.processing import Processing
from export.contract import CoreMlOptions, ExportedGraphs, ExportRequest
from export.golden.lockstep import FixedCache
from export.golden.record import QUESTIONS, Probe, probes
from export.golden.recording import record
from export.model.shape import model_shape
from export.model.streamed import LoadedModel
from export.targets import load_exporter
from export.weights.plan import StoragePlan
from tests.export.conftest import STUDENT

CONTEXT, PIXELS, VOCABULARY = 128, 48, 512
TOKENIZER = TokenizerSpec(kind="sentencepiece", path="tokenizer.model", bos_id=1, eos_ids=(2,), pad_id=0)
PROCESSING = Processing(
    ImageSpec(size=PIXELS, strategy="pad", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    TEMPLATES["plain"],
    STUDENT / "tokenizer.model",
    TOKENIZER,
)


def tiny_vlm() -> MobileVlm:
    """One decoder layer with grouped queries, one tower layer that is read, 9 patches, 1 visual token."""
    torch.manual_seed(3)
    text = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        num_hidden_layers=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=48,
        num_attention_heads=3,
        intermediate_size=96,
        num_hidden_layers=2,
        image_size=PIXELS,
        patch_size=16,
    )
    vlm = MobileVlm(MobileVlmConfig(text, vision)).eval()
    for parameter in vlm.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return vlm


def written(
    target: Target,
    precision: Precision,
    folder: Path,
    vlm: MobileVlm | None = None,
    coreml: CoreMlOptions = CoreMlOptions(),  # noqa: B008 (frozen)
) -> ExportedGraphs:
    """The exporter's own graphs in ``folder``, with the tokenizer beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes((STUDENT / "tokenizer.model").read_bytes())
    request = ExportRequest(
        vlm or tiny_vlm(),
        precision,
        CONTEXT,
        folder / "tokenizer.model",
        (2,),
        1,
        folder,
        lambda line: None,
        coreml=coreml,
    )
    return load_exporter(target)(request)


def questions(names: tuple[str, ...] = ("wide", "text_only")) -> list[Probe]:
    """The built-in questions, a picture and text alone."""
    found = probes(PROCESSING, open_tokenizer(TOKENIZER, STUDENT))
    assert set(names) <= set(QUESTIONS)
    return [probe for probe in found if probe.name in names]


def recorded(
    folder: Path,
    target: Target,
    precision: Precision,
    graphs: ExportedGraphs,
    truth: MobileVlm | None = None,
    dequantized: Mapping[str, torch.Tensor] | None = None,
) -> Manifest:
    """Record the vectors of ``truth`` beside the graphs -> the manifest."""
    engine = CoreMlOptions(graphs.coreml.engine if graphs.coreml else "gpu")
    vlm = truth or tiny_vlm()
    stored = graphs.dequantized if dequantized is None else dequantized
    model, plan = (
        LoadedModel(vlm, vlm.state_dict()),
        StoragePlan(target, precision, engine.storages(_shapes(vlm), precision)),
    )
    golden = record(model, stored, questions(), plan, folder, lambda line: None).golden(target, precision)
    shape: ModelShape = model_shape(vlm, CONTEXT)
    manifest = Manifest(
        name="tiny",
        target=target,
        precision=precision,
        source=Source(name="random", architecture="MobileVlm", weights_sha256="0" * 64),
        created="",
        environment={},
        model=shape,
        graphs=graphs.graphs,
        quantization=graphs.quantization,
        image=PROCESSING.image,
        prompt=PROCESSING.prompt,
        tokenizer=TOKENIZER,
        golden=golden,
        coreml=graphs.coreml,
        files={},
    )
    record_constants(folder, manifest)
    return manifest


def _shapes(vlm: MobileVlm) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in vlm.state_dict().items()}


def judged(folder: Path, manifest: Manifest, spoil: Callable[[Runtime], None] | None = None) -> Verdict:
    """The verdict of the target's runtime here; ``spoil`` changes the opened runtime first."""
    entry = first_entry(manifest.target)
    if spoil is None:
        return verdict_of(entry, folder, manifest, read_golden(folder, manifest))
    module = entry.load()

    class Spoilt:
        def available(self) -> str | None:
            return None

        def open_runtime(self, bundle: Path, manifest: Manifest, threads: int | None) -> Runtime:
            runtime = module.open_runtime(bundle, manifest, threads)
            spoil(runtime)
            return runtime

    spoilt = RuntimeEntry(entry.name, Spoilt, entry.family)
    return verdict_of(spoilt, folder, manifest, read_golden(folder, manifest))


def found(verdict: Verdict) -> tuple[str, str] | None:
    """Stage and kind of the first fault."""
    return None if verdict.diagnosis is None else (verdict.diagnosis.stage, verdict.diagnosis.kind)


# --- models that healthy graphs are a wrong export of, and runtimes that drive them wrongly


def other_rotary_base(vlm: MobileVlm) -> MobileVlm:
    """The graphs rotate by base 10000, this model by 500."""
    rotary = vlm.language_model.rotary_emb
    rotary.inv_freq = rotary.inv_freq ** (torch.log(torch.tensor(500.0)) / torch.log(torch.tensor(10000.0)))
    return vlm


def window_of_four(vlm: MobileVlm) -> MobileVlm:
    """The graphs see every earlier row, this model only the last four: a wrong mask."""

    def windowed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def layer(x: torch.Tensor, past_key_values: FixedCache | None = None, **more: object) -> torch.Tensor:
            past = 0 if past_key_values is None else past_key_values.length
            rows = torch.arange(past, past + x.shape[1])[:, None]
            columns = torch.arange(past + x.shape[1])[None]
            seen = (columns <= rows) & (columns > rows - 4)
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[
                None, None
            ]  # [1, 1, T, E]
            return forward(x, past_key_values=past_key_values, attention_mask=mask, **more)

        return layer

    for layer in vlm.language_model.layers:
        layer.forward = windowed(layer.forward)
    return vlm


def other_activation(vlm: MobileVlm) -> MobileVlm:
    """The graphs' tower has the quick GELU, x sigmoid(1.702 x), this model's the SiLU."""
    for layer in vlm.vision_tower.encoder.layers:
        layer.mlp.activation_fn = torch.nn.SiLU()
    return vlm


def ids_one_further(runtime: Runtime) -> None:
    """Every id reads the row behind its own."""
    embed = runtime.embed
    runtime.embed = lambda ids: embed((ids + 1) % VOCABULARY)  # type: ignore[method-assign]


def a_gap_after_the_prompt(runtime: Runtime) -> None:
    """Answer tokens stand one position too far, so one row of the cache was never written."""
    decode = runtime.decode

    def skipping(rows: object) -> object:
        fresh = runtime.position == 0
        logits = decode(rows)  # type: ignore[arg-type]
        if fresh:
            runtime._position += 1  # type: ignore[attr-defined]
        return logits

    runtime.decode = skipping  # type: ignore[method-assign,assignment]


def forgotten_cache(runtime: Runtime) -> None:
    """Every answer token starts a sequence of its own."""
    decode = runtime.decode

    def forgetful(rows: object) -> object:
        runtime.reset()
        return decode(rows)  # type: ignore[arg-type]

    runtime.decode = forgetful  # type: ignore[method-assign,assignment]


MODELS: dict[str, tuple[Callable[[MobileVlm], MobileVlm], str]] = {
    "rotary base": (other_rotary_base, "first_logits"),
    "mask": (window_of_four, "first_logits"),
    "activation": (other_activation, "visual_tokens"),
}
DRIVERS: dict[str, tuple[Callable[[Runtime], None], str]] = {
    "shifted ids": (ids_one_further, "embeddings"),
    "off-by-one position": (a_gap_after_the_prompt, "greedy_tokens"),
    "forgotten cache": (forgotten_cache, "greedy_tokens"),
}
WEIGHTS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "embedding rows shifted": ("language_model.embed_tokens.weight", lambda w: w.roll(1, 0), "embeddings"),
    "projector transposed": ("projector.linear_2.weight", lambda w: w.T.contiguous(), "visual_tokens"),
    "one group scaled": ("language_model.layers.0.mlp.up_proj.weight", lambda w: _one_group(w), "first_logits"),
}


def _one_group(weight: torch.Tensor) -> torch.Tensor:
    """One scale of one row is 1.5 times what it should be."""
    changed = weight.clone()
    changed[5, 32:64] *= 1.5
    return changed
