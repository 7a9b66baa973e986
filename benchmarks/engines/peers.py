"""Name of a peer -> what it is installed from, how the checkpoint becomes its files, and how its driver opens them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]  # the checkout: some conversions import alignkd
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own: pinned, so that a table can be made again.

    Attributes:
        without: packages to remove again, which the requirements bring along.
    """

    name: str
    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Peer:
    """An engine that a user would take instead.

    Attributes:
        label: its row in the table.
        runs_in: where its driver runs.
        converts_in: where ``convert`` runs, the driver's own environment when None.
        convert: command that writes {output}; its words may also hold {python}, {packages}, {checkpoint},
            {llama} (the decoder as a Hugging Face folder) and {vision} (the vision encoder traced).
        text: what the driver opens for text, in {output}; ``vision`` for pictures, where the peer has an encoder.
        options: of the driver; {output} is filled in.
    """

    label: str
    runs_in: Environment
    convert: tuple[str, ...]
    driver: str
    text: str
    vision: str | None = None
    converts_in: Environment | None = None
    options: dict[str, str] = field(default_factory=dict)
    note: str = ""


LLAMA_CPP = Environment("llama-cpp", ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors", "sentencepiece"))
OPENVINO = Environment("openvino", ("openvino-genai==2026.4.1.0",))
OPENVINO_CONVERT = Environment(
    "openvino-convert",
    ("optimum-intel==2.2.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0", TORCH),
    without=("torchvision",),  # one built for another torch than the installed keeps transformers from loading
)
GENAI = Environment("onnxruntime-genai", ("onnxruntime-genai==0.18.0",))
GENAI_CONVERT = Environment(
    "onnxruntime-genai-convert",
    ("onnxruntime-genai==0.18.0", TORCH, "transformers==5.23.0", "onnx", "onnx-ir", "sentencepiece", "protobuf"),
)
MNN = Environment("mnn", ("MNN==3.6.1",))
MNN_CONVERT = Environment("mnn-convert", ("llmexport==0.0.5", "MNN==3.6.1", TORCH, "transformers==5.23.0"))

PEERS: dict[str, Peer] = {
    "llama.cpp": Peer(
        label="llama.cpp Q4_0, f16 tower",
        runs_in=LLAMA_CPP,
        convert=("{python}", f"{HERE}/convert/to_gguf.py", "{llama}", "{checkpoint}", "{output}"),
        driver="llama_cpp_engine.py",
        text="model-q4_0.gguf",
        vision="mmproj-f16.gguf",
        # 0: flash attention off, at 256 rows of context its faster setting on a CPU
        options={"projector": "{output}/mmproj-f16.gguf", "flash_attention": "0"},
        note="built from source for this processor; flash attention off",
    ),
    "openvino": Peer(
        label="OpenVINO int4 g32, int8 tower",
        runs_in=OPENVINO,
        converts_in=OPENVINO_CONVERT,
        convert=("{python}", f"{HERE}/convert/to_openvino.py", "{llama}", "{vision}", "{output}"),
        driver="openvino_engine.py",
        text="text",
        vision="vision.xml",
        options={"vision": "{output}/vision.xml"},
        note="default settings of the CPU plugin; tower by NNCF's post-training quantization",
    ),
    "onnxruntime-genai": Peer(
        label="onnxruntime-genai int4 b32",
        runs_in=GENAI,
        converts_in=GENAI_CONVERT,
        convert=(
            *("{python}", "-m", "onnxruntime_genai.models.builder", "-m", "{llama}", "-o", "{output}", "-p", "int4"),
            *("-e", "cpu", "-c", "{output}.cache", "--extra_options", "int4_block_size=32", "int4_accuracy_level=4"),
        ),
        driver="genai_engine.py",
        text=".",
        note="its own model builder, which has no such vision encoder",
    ),
    "mnn": Peer(
        label="MNN int4 b32",
        runs_in=MNN,
        converts_in=MNN_CONVERT,
        convert=(
            *("{python}", "{packages}/llmexport/llmexport.py", "--path", "{llama}", "--dst_path", "{output}"),
            *("--export", "mnn", "--quant_bit", "4", "--quant_block", "32", "--sym"),
        ),
        driver="mnn_engine.py",
        text=".",
        note="the wheel's kernels; llmexport has no such vision encoder",
    ),
}
