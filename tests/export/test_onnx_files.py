"""The exported ONNX files themselves: names, operators, sizes, alignment, and that an export can be repeated."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

from bundle.manifest import GraphName, Precision, read_manifest
from export.frame import ExportJob, export_bundle
from export.onnx.writer import ALIGN_BYTES
from tests.export.conftest import CONTEXT, STUDENT, Exported

FILES: dict[Precision, tuple[str, str, str]] = {
    "fp32": ("vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"),
    "fp16": ("vision_encoder_fp16.onnx", "embed_tokens_fp16.onnx", "decoder_model_merged_fp16.onnx"),
    "int8": ("vision_encoder_quantized.onnx", "embed_tokens_quantized.onnx", "decoder_model_merged_quantized.onnx"),
    "int4": ("vision_encoder_q4.onnx", "embed_tokens_q4.onnx", "decoder_model_merged_q4.onnx"),
}
LAYERS = 2


def graph(bundle: Path, name: GraphName) -> onnx.ModelProto:
    return onnx.load(bundle / read_manifest(bundle).graphs[name].path, load_external_data=False)


def operators(bundle: Path, name: GraphName) -> Counter[str]:
    return Counter(node.op_type for node in graph(bundle, name).graph.node)


@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_files_carry_the_names_of_the_onnx_community_layout(exported: Exported, precision: Precision) -> None:
    bundle = exported("onnx", precision)
    found = {path.name for path in (bundle / "onnx").glob("*.onnx")}
    for_genai = FILES[precision][1].replace("embed_tokens", "embed_tokens_genai")
    assert found == {*FILES[precision], for_genai}
    assert {f"{name}_data" for name in FILES[precision]} == {path.name for path in (bundle / "onnx").glob("*_data")}


@pytest.mark.parametrize("precision", ["int4", "fp32"])
@pytest.mark.parametrize("name", ["vision_encoder", "token_embedding", "text_decoder"])
def test_graphs_pass_the_checker_and_the_manifest_describes_them(
    exported: Exported, precision: Precision, name: GraphName
) -> None:
    bundle = exported("onnx", precision)
    described = read_manifest(bundle).graphs[name]
    onnx.checker.check_model(bundle / described.path)
    model = graph(bundle, name).graph
    for declared, values in ((described.inputs, model.input), (described.outputs, model.output)):
        assert [tensor.name for tensor in declared] == [value.name for value in values]
        for tensor, value in zip(declared, values, strict=True):
            sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
            assert list(tensor.shape) == sizes
            assert tensor.dtype == {1: "float32", 7: "int64"}[value.type.tensor_type.elem_type]


def test_the_decoder_is_fused(exported: Exported) -> None:
    found = operators(exported("onnx", "int4"), "text_decoder")
    assert found["GroupQueryAttention"] == LAYERS
    assert found["RMSNormalization"] == 2 * LAYERS + 1
    assert found["MatMulNBits"] == 5 * LAYERS + 1  # qkv, o, gate, up, down, and lm_head
    assert found["MatMul"] == found["Softmax"] == found["Transpose"] == 0


def test_the_decoder_takes_and_gives_a_cache_by_the_names_that_runners_expect(exported: Exported) -> None:
    model = graph(exported("onnx", "int4"), "text_decoder").graph
    pairs = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    past, present = [f"past_key_values.{pair}" for pair in pairs], [f"present.{pair}" for pair in pairs]
    assert [i.name for i in model.input] == ["inputs_embeds", "attention_mask", "position_ids", *past]
    assert [o.name for o in model.output] == ["logits", *present]


def test_the_vision_tower_stops_at_the_selected_layer(exported: Exported) -> None:
    quantized = operators(exported("onnx", "int4"), "vision_encoder")
    assert quantized["MultiHeadAttention"] == 2  # of the three layers; the last is never read
    assert quantized["MatMulIntegerToFloat"] == 2 * 4 + 2
    assert operators(exported("onnx", "fp32"), "vision_encoder")["MatMul"] == 2 * 4 + 2


def test_int4_linears_take_half_a_byte_and_a_scale(exported: Exported) -> None:
    bundle = exported("onnx", "int4")
    sizes: dict[str, int] = {}
    for tensor in graph(bundle, "text_decoder").graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if "layers" in tensor.name and ("_q4" in tensor.name or "_scales" in tensor.name):
            sizes[tensor.name] = int(entries.get("length", len(tensor.raw_data)))
    weights = LAYERS * (4 * 64 * 64 + 3 * 64 * 128)
    assert sum(sizes.values()) == weights // 2 + weights // 32 * 4


def test_external_weights_start_on_pages(exported: Exported) -> None:
    for name in ("vision_encoder", "text_decoder"):
        for tensor in graph(exported("onnx", "int4"), name).graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "offset":
                    assert int(entry.value) % ALIGN_BYTES == 0


def test_the_same_checkpoint_gives_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    first = read_manifest(exported("onnx", "int4"))
    again = export_bundle(ExportJob(STUDENT, "onnx", "int4", tmp_path / "again", CONTEXT), progress=lambda line: None)
    assert again.files == first.files
    assert again.source == first.source
