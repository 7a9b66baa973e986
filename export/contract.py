"""What the frame hands to each target's exporter, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bundle.manifest import Graph, GraphName, GraphQuantization, Precision
from distill.models.mobilevlm import MobileVlm


@dataclass(frozen=True)
class ExportRequest:
    """One model to be written at one precision into the bundle directory under construction."""

    vlm: MobileVlm  # float32, evaluation mode; exporters must not change it
    precision: Precision
    context_length: int  # KV cache rows
    tokenizer_path: Path  # tokenizer.model of the checkpoint
    eos_ids: tuple[int, ...]
    bos_id: int
    output: Path  # write graph files here and nowhere else
    progress: Callable[[str], None]  # one short line per finished step


@dataclass(frozen=True)
class ExportedGraphs:
    """The written graphs, how they are quantized, and the weights that the files really hold.

    Attributes:
        dequantized: MobileVlm state-dict name -> float32 tensor, read back from the quantized artefact, for every
            weight that quantization or rounding changed. The golden vectors are recorded with these weights, so that
            the verifier separates an error of the graph from the error of quantization. A lazy mapping may read each
            weight from the files when asked: a full copy of a large model need not fit into memory.
    """

    graphs: dict[GraphName, Graph]
    quantization: dict[GraphName, GraphQuantization]
    dequantized: Mapping[str, torch.Tensor]
