"""--backend: what each method of a .pte is lowered to, and that nobody takes such a bundle for a verified one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from bundle.errors import BackendMissingError, UsageError
from bundle.manifest import Backend, Manifest, file_records, write_manifest
from bundle.pte import open_pte
from bundle.runtimes.registry import open_runtime
from bundle.verify import verify_bundle
from export.contract import ExecutorchOptions, ExportedGraphs, ExportRequest
from export.executorch.lower import load_operators, partitioners_of
from export.executorch.to_executorch import FILE, export_executorch, write_part
from export.model.graph_weights import graph_of
from tests.export import ladder
from tests.export.conftest import STUDENT, Command


def request_of(folder: Path, options: ExecutorchOptions) -> ExportRequest:
    tokenizer = STUDENT / "tokenizer.model"
    folder.mkdir(parents=True, exist_ok=True)
    return ExportRequest(
        ladder.tiny_vlm(), "int4", ladder.CONTEXT, tokenizer, (2,), 1, folder, lambda line: None, executorch=options
    )


@pytest.fixture(scope="module")
def coreml(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportedGraphs]:
    folder = tmp_path_factory.mktemp("coreml")
    return folder, export_executorch(request_of(folder, ExecutorchOptions("coreml")))


@pytest.fixture(scope="module")
def manifest(coreml: tuple[Path, ExportedGraphs]) -> Manifest:
    """The bundle, whole and recorded."""
    folder, graphs = coreml
    (folder / "tokenizer.model").write_bytes((STUDENT / "tokenizer.model").read_bytes())
    recorded = ladder.recorded(folder, "executorch", "int4", graphs)
    manifest = recorded.model_copy(update={"files": file_records(folder)})
    write_manifest(folder, manifest)
    return manifest


def test_each_method_is_lowered_to_what_the_manifest_says(coreml: tuple[Path, ExportedGraphs]) -> None:
    folder, graphs = coreml
    opened = open_pte(folder / FILE)
    delegates = opened.delegates()
    assert delegates["vision_encoder"] == ("CoreMLBackend",)
    assert delegates["text_decoder"] == ("XnnpackBackend",)
    assert delegates["token_embedding"] == ()
    assert [graphs.graphs[name].backend for name in ("vision_encoder", "text_decoder", "token_embedding")] == [
        "coreml",
        "xnnpack",
        None,
    ]
    vision = next(plan for plan in opened.program.execution_plan if plan.name == "vision_encoder")
    assert vision.operators == [], "nothing of it is left to the CPU"
    assert graphs.quantization["vision_encoder"].activations == "float16"


def test_int8_weights_go_into_core_ml_as_such(coreml: tuple[Path, ExportedGraphs]) -> None:
    """The package inside the delegate holds the levels that the golden vectors are recorded with."""
    folder, graphs = coreml
    vlm = ladder.tiny_vlm()
    content = (folder / FILE).read_bytes()
    name = "projector.linear_1.weight"
    stored, original = graphs.dequantized[name], vlm.state_dict()[name]
    assert not torch.equal(stored, original)
    scales = (stored / (stored / (original.abs().amax(1, keepdim=True) / 127.5)).round()).nanmedian(1).values
    levels = (stored / scales[:, None]).round().to(torch.int8)
    assert levels[3].numpy().tobytes() in content, "a row of levels"


def test_vulkan_takes_the_whole_vision_encoder(tmp_path: Path) -> None:
    load_operators()
    request = request_of(tmp_path, ExecutorchOptions("vulkan"))
    stored = write_part(request, "vision_encoder")
    opened = open_pte(tmp_path / "vision_encoder.part.pte")
    assert opened.delegates() == {"vision_encoder": ("VulkanBackend",)}
    assert opened.program.execution_plan[0].operators == []
    assert {record.kind for record in stored.values()} == {"halves"}
    shapes = {name: w.shape for name, w in request.vlm.state_dict().items()}
    values = sum(shape.numel() for name, shape in shapes.items() if graph_of(name, request.vlm) == "vision_encoder")
    assert 2 * values < (tmp_path / "vision_encoder.part.pte").stat().st_size < 3 * values, "not float32"


def test_a_bundle_for_devices_alone_is_not_called_verified(
    coreml: tuple[Path, ExportedGraphs], manifest: Manifest
) -> None:
    folder = coreml[0]
    with pytest.raises(
        BackendMissingError, match="files are whole, but nothing was verified: 'vision_encoder' is lower"
    ):
        verify_bundle(folder)
    with pytest.raises(BackendMissingError, match="cannot be run here: .* Core ML, which iOS and macOS have"):
        open_runtime(folder, manifest)


@pytest.mark.parametrize(
    "flags,said",
    [
        (("--target", "onnx", "--backend", "coreml"), "--backend is for --target executorch, not --target onnx"),
        (
            ("--target", "executorch", "--backend", "qnn"),
            "--backend 'qnn' is unknown; allowed: xnnpack, coreml, vulkan",
        ),
        (("--target", "onnx", "--float-vision"), "--float-vision is for --target executorch --int4 or --int8"),
        (("--target", "executorch", "--fp16", "--float-vision"), "not --target executorch --fp16; leave it out"),
        (("--target", "executorch", "--backend", "vulkan", "--float-vision"), "--int4 --backend vulkan; leave it out"),
    ],
)
def test_options_that_do_not_fit(flags: tuple[str, ...], said: str, run_export: Command, tmp_path: Path) -> None:
    ran = run_export(STUDENT, *flags, "--output", tmp_path / "out")
    assert ran.code == 2 and said in ran.error and list(tmp_path.iterdir()) == []


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(UsageError, match=r"'coremltools' is not installed; run: pip install 'alignkd\[coreml\]'"):
        partitioners_of("coreml", "int4")


@pytest.mark.parametrize(
    "backend,float_vision,kept", [("xnnpack", False, 0), ("xnnpack", True, 32), ("vulkan", False, 16)]
)
def test_vision_weights_by_option(backend: Backend, float_vision: bool, kept: int) -> None:
    shapes = {name: tuple(w.shape) for name, w in ladder.tiny_vlm().state_dict().items()}
    storages = ExecutorchOptions(backend, float_vision).storages(shapes, "int4")
    assert {storage.bits for storage in storages.values()} == ({kept} if kept else set())
    assert all(name.startswith(("vision_tower.", "projector.linear")) for name in storages)
    assert ExecutorchOptions(backend, float_vision).storages(shapes, "fp16") == {}
