"""An activation by its name in configs -> the node that computes it on onnxruntime."""

from __future__ import annotations

from typing import Any

from export.onnx.linear import ModelWriter
from export.onnx.writer import MICROSOFT

# name in configs -> operator, domain, attributes; the names are those of export/supported.py
OPERATORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "quick_gelu": ("QuickGelu", MICROSOFT, {"alpha": 1.702}),
    "gelu": ("Gelu", MICROSOFT, {}),
    "gelu_pytorch_tanh": ("Gelu", "", {"approximate": "tanh"}),
    "relu": ("Relu", "", {}),
    "silu": ("QuickGelu", MICROSOFT, {"alpha": 1.0}),
}


def activation(writer: ModelWriter, name: str, x: str) -> str:
    """Add the node -> the name of its output."""
    operator, domain, attributes = OPERATORS[name]
    return writer.op(operator, [x], None, domain, **attributes)
