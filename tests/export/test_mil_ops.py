"""The ML program evaluator: each operation against torch or a known answer, compressed weights against coremltools."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bundle.errors import UsageError
from bundle.runtimes import blas_threads as blas_threads_module
from bundle.runtimes.blas_threads import blas_threads
from bundle.runtimes.mil_graph import OPERATIONS, Node, block_of
from bundle.runtimes.mil_program import Program
from bundle.runtimes.mil_proto import read_spec, weight_path
from bundle.runtimes.mil_states import in_place_updates
from bundle.runtimes.mil_weights import WeightFile, read_value, unpack_bits

RANDOM = np.random.default_rng(5)
X = RANDOM.normal(size=(2, 3, 6, 8)).astype(np.float32)
Y = RANDOM.normal(size=(2, 3, 6, 8)).astype(np.float32)
WEIGHT = RANDOM.normal(size=(5, 8)).astype(np.float32)
BIAS = RANDOM.normal(size=5).astype(np.float32)
KERNEL = RANDOM.normal(size=(6, 3, 3, 2)).astype(np.float32)
GROUPED = RANDOM.normal(size=(6, 1, 3, 3)).astype(np.float32)
MASK = np.where(RANDOM.random((6, 6)) < 0.3, -1e4, 0).astype(np.float32)

Torch = Callable[..., torch.Tensor]
AGAINST_TORCH: list[tuple[str, dict[str, Any], Torch]] = [
    ("add", {"x": X, "y": Y}, lambda x, y: x + y),
    ("real_div", {"x": X, "y": Y}, lambda x, y: x / y),
    ("floor_div", {"x": X, "y": Y}, lambda x, y: torch.floor_divide(x, y)),
    ("mod", {"x": X, "y": Y}, lambda x, y: torch.remainder(x, y)),
    ("maximum", {"x": X, "y": Y}, torch.maximum),
    ("less_equal", {"x": X, "y": Y}, torch.le),
    ("pow", {"x": np.abs(X), "y": 1.5}, lambda x, y: x**y),
    ("erf", {"x": X}, torch.erf),
    ("sigmoid", {"x": X * 30}, torch.sigmoid),
    ("silu", {"x": X}, F.silu),
    ("relu", {"x": X}, F.relu),
    ("tanh", {"x": X}, torch.tanh),
    ("gelu", {"x": X, "mode": "EXACT"}, lambda x, mode: F.gelu(x)),
    ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"}, lambda x, mode: F.gelu(x, approximate="tanh")),
    ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}, lambda x, mode: x * torch.sigmoid(1.702 * x)),
    ("clip", {"x": X, "alpha": -0.5, "beta": 0.25}, lambda x, alpha, beta: x.clamp(alpha, beta)),
    ("rsqrt", {"x": np.abs(X), "epsilon": 0.5}, lambda x, epsilon: (x + epsilon).rsqrt()),
    ("inverse", {"x": np.abs(X), "epsilon": 0.5}, lambda x, epsilon: 1 / (x + epsilon)),
    ("log", {"x": np.abs(X), "epsilon": 0.5}, lambda x, epsilon: (x + epsilon).log()),
    ("softmax", {"x": X * 50, "axis": 1}, lambda x, axis: x.softmax(axis)),
    ("reduce_mean", {"x": X, "axes": [1, -1], "keep_dims": True}, lambda x, axes, keep_dims: x.mean(axes, keep_dims)),
    ("reduce_sum", {"x": X, "axes": [2], "keep_dims": False}, lambda x, axes, keep_dims: x.sum(axes, keep_dims)),
    ("reduce_max", {"x": X, "axes": [0, 2], "keep_dims": False}, lambda x, axes, keep_dims: x.amax(axes)),
    ("transpose", {"x": X, "perm": [0, 2, 3, 1]}, lambda x, perm: x.permute(perm)),
    ("reshape", {"x": X, "shape": [0, -1, 4]}, lambda x, shape: x.reshape(2, -1, 4)),
    ("expand_dims", {"x": X, "axes": [0, 3]}, lambda x, axes: x[None, :, :, None]),
    ("squeeze", {"x": X[:1], "axes": [0]}, lambda x, axes: x[0]),
    ("concat", {"values": [X, Y], "axis": -1}, lambda values, axis: torch.cat(values, axis)),
    (
        "concat",
        {"values": [X[0, 0, 0, 0], Y[0, 0, 0]], "axis": 0},
        lambda values, axis: torch.cat((values[0][None], values[1])),
    ),
    ("stack", {"values": [X, Y], "axis": 1}, lambda values, axis: torch.stack(values, axis)),
    ("tile", {"x": X, "reps": [1, 2, 1, 3]}, lambda x, reps: x.repeat(reps)),
    ("select", {"cond": X > 0, "a": X, "b": Y}, torch.where),
    ("gather", {"x": X, "indices": np.array([[2, 0]]), "axis": 1}, lambda x, indices, axis: x[:, indices]),
    (
        "gather_along_axis",
        {"x": X, "indices": np.argsort(X, 3), "axis": 3},
        lambda x, indices, axis: x.gather(axis, indices),
    ),
    (
        "pad",
        {"x": X, "pad": [1, 2, 0, 3], "constant_val": 9.0},
        lambda x, pad, constant_val: F.pad(x, (0, 3, 1, 2), value=9.0),
    ),
    ("linear", {"x": X, "weight": WEIGHT, "bias": BIAS}, F.linear),
    ("matmul", {"x": X, "y": Y, "transpose_y": True}, lambda x, y, transpose_y: x @ y.mT),
    ("matmul", {"x": X, "y": Y, "transpose_x": True}, lambda x, y, transpose_x: x.mT @ y),
    (
        "layer_norm",
        {"x": X, "axes": [-1], "gamma": WEIGHT[0], "beta": WEIGHT[1], "epsilon": 0.1},
        lambda x, axes, gamma, beta, epsilon: F.layer_norm(x, (8,), gamma, beta, epsilon),
    ),
    (
        "scaled_dot_product_attention",
        {"query": X, "key": Y, "value": X * Y, "attn_mask": MASK},
        lambda query, key, value, attn_mask: F.scaled_dot_product_attention(query, key, value, attn_mask),
    ),
    (
        "scaled_dot_product_attention",
        {"query": X, "key": Y, "value": X * Y, "attn_mask": MASK == 0},
        lambda query, key, value, attn_mask: F.scaled_dot_product_attention(query, key, value, attn_mask),
    ),
    (
        "conv",
        {"x": X, "weight": KERNEL, "strides": [2, 3], "pad_type": "custom", "pad": [1, 0, 2, 1], "dilations": [2, 1]},
        lambda x, weight, *_: F.conv2d(F.pad(x, (2, 1, 1, 0)), weight, stride=(2, 3), dilation=(2, 1)),
    ),
    (
        "conv",
        {"x": X, "weight": GROUPED, "groups": 3, "pad_type": "custom", "pad": [1, 1, 1, 1]},
        lambda x, weight, *_: F.conv2d(x, weight, groups=3, padding=1),
    ),
    (
        "conv",
        {"x": X, "weight": GROUPED[:3], "bias": BIAS[:3], "groups": 3, "pad_type": "valid"},
        lambda x, weight, bias, *_: F.conv2d(x, weight, bias, groups=3),
    ),
    (
        "avg_pool",
        {"x": X, "kernel_sizes": [3, 2], "strides": [1, 2], "pad_type": "valid"},
        lambda x, *_: F.avg_pool2d(x, (3, 2), (1, 2)),
    ),
]


def to_torch(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], np.ndarray | np.generic):
        return [torch.as_tensor(np.asarray(item)) for item in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("name,arguments,reference", AGAINST_TORCH, ids=[row[0] for row in AGAINST_TORCH])
def test_operation_equals_torch(name: str, arguments: dict[str, Any], reference: Torch) -> None:
    wanted = reference(*(to_torch(value) for value in arguments.values())).numpy()
    found = OPERATIONS[name](**arguments)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_slices_follow_their_masks() -> None:
    found = OPERATIONS["slice_by_index"](
        X, [7, 1, -2, 6], [7, 9, 9, 0], [1, 1, 1, -2], begin_mask=[True, False, False, False],
        end_mask=[True, True, True, False], squeeze_mask=[False, True, False, False],
    )  # fmt: skip
    np.testing.assert_array_equal(found, X[:, 1, -2:, 6:0:-2])
    np.testing.assert_array_equal(OPERATIONS["slice_by_size"](X, [0, 1, 2, 0], [1, 2, -1, 3]), X[:1, 1:3, 2:, :3])


def test_slice_update_leaves_its_input_alone() -> None:
    before = X.copy()
    found = OPERATIONS["slice_update"](X, Y[:, :1], [0, 1, 0, 0], [2, 2, 6, 8])
    np.testing.assert_array_equal(found[:, 1], Y[:, 0])
    np.testing.assert_array_equal(X, before)


def test_split_by_sizes_and_by_number() -> None:
    first, second = OPERATIONS["split"](X, axis=-1, split_sizes=[3, 5])
    np.testing.assert_array_equal(first, X[..., :3])
    np.testing.assert_array_equal(second, X[..., 3:])
    assert [part.shape[1] for part in OPERATIONS["split"](X, axis=1, num_splits=3)] == [1, 1, 1]


def test_casts_keep_to_float32_and_int32() -> None:
    assert OPERATIONS["cast"](X, "fp16").dtype == np.float32
    np.testing.assert_array_equal(OPERATIONS["cast"](np.array([2.7, -2.7], np.float32), "int16"), [2, -2])
    assert OPERATIONS["real_div"](np.array([7, -7]), np.array([2, 2])).tolist() == [3, -3]


@pytest.mark.parametrize("bits,signed", [(1, False), (2, False), (3, False), (4, False), (4, True), (6, False)])
def test_packed_integers_unpack(bits: int, signed: bool) -> None:
    values = RANDOM.integers(-(1 << bits - 1) if signed else 0, 1 << (bits - 1 if signed else bits), 37)
    lanes = (values[:, None] >> np.arange(bits)) & 1
    packed = np.packbits(lanes.astype(np.uint8).reshape(-1), bitorder="little")
    np.testing.assert_array_equal(unpack_bits(packed, 37, bits, signed), values)


# --- whole programs, made by coremltools ---


def linear_packages(folder: Path, target: str, compress: Callable[[Any], Any]) -> tuple[Path, Path]:
    """y = x W' in a package with compressed weights, and the same after coremltools itself decompressed them."""
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil import Builder as mb

    from export.coreml.convert import quiet

    weight = np.random.default_rng(2).normal(size=(48, 64)).astype(np.float32)
    opset = getattr(ct.target, target)
    with quiet():

        @mb.program(input_specs=[mb.TensorSpec(shape=(2, 64))], opset_version=opset)
        def program(x: Any) -> Any:
            return mb.linear(x=x, weight=weight, name="y")

        plain = ct.convert(
            program, minimum_deployment_target=opset, compute_precision=ct.precision.FLOAT32, skip_model_load=True
        )
        model = compress(plain)
        model.save(str(folder / "linear.mlpackage"))
        cto.decompress_weights(model).save(str(folder / "plain.mlpackage"))
    return folder / "linear.mlpackage", folder / "plain.mlpackage"


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The two packages of a row of COMPRESSED; read them, never change them."""
    root = tmp_path_factory.mktemp("linear")

    def made(name: str) -> tuple[Path, Path]:
        folder = root / name.replace(" ", "-")
        if not folder.exists():
            folder.mkdir()
            linear_packages(folder, *COMPRESSED[name])
        return folder / "linear.mlpackage", folder / "plain.mlpackage"

    return made


Packages = Callable[[str], tuple[Path, Path]]


def palettize(granularity: str, bits: int) -> Callable[[Any], Any]:
    def compress(model: Any) -> Any:
        import coremltools.optimize.coreml as cto

        config = cto.OpPalettizerConfig(
            mode="uniform", nbits=bits, granularity=granularity, group_size=16, weight_threshold=0
        )
        return cto.palettize_weights(model, cto.OptimizationConfig(global_config=config))

    return compress


def quantize(**options: Any) -> Callable[[Any], Any]:
    def compress(model: Any) -> Any:
        import coremltools.optimize.coreml as cto

        config = cto.OpLinearQuantizerConfig(weight_threshold=0, **options)
        return cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=config))

    return compress


COMPRESSED = {
    "int4 blocks": ("iOS18", quantize(mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32)),
    "uint4 blocks with offset": (
        "iOS18",
        quantize(mode="linear", dtype="uint4", granularity="per_block", block_size=16),
    ),
    "int8 channels": ("iOS18", quantize(mode="linear_symmetric", dtype="int8", granularity="per_channel")),
    "iOS 16 affine": ("iOS16", quantize(mode="linear", dtype="uint8", granularity="per_channel")),
    "iOS 16 table": ("iOS16", palettize("per_tensor", 4)),
    "iOS 18 tables": ("iOS18", palettize("per_grouped_channel", 4)),
    "6-bit table": ("iOS18", palettize("per_tensor", 6)),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_weights_are_what_coremltools_makes_of_them(name: str, packages: Packages) -> None:
    compressed, decompressed = packages(name)
    assert any(operation.type.startswith("constexpr_") for operation in block_of(read_spec(compressed)).operations)
    x = np.random.default_rng(3).normal(size=(2, 64)).astype(np.float32)
    wanted = Program(decompressed)({"x": x})["y"]
    np.testing.assert_allclose(Program(compressed)({"x": x})["y"], wanted, rtol=1e-5, atol=1e-5)


def test_blobs_are_what_coremltools_reads(packages: Packages) -> None:
    package, _ = packages("int4 blocks")
    from coremltools.libmilstoragepython import _BlobStorageReader

    theirs, ours = _BlobStorageReader(str(weight_path(package))), WeightFile(weight_path(package))
    (found,) = (o for o in block_of(read_spec(package)).operations if o.type == "constexpr_blockwise_shift_scale")
    data, scale = (found.inputs[name].arguments[0].value for name in ("data", "scale"))
    np.testing.assert_array_equal(read_value(data, ours).reshape(-1), theirs.read_int4_data(data.blobFileValue.offset))
    np.testing.assert_array_equal(
        read_value(scale, ours).reshape(-1), theirs.read_float_data(scale.blobFileValue.offset)
    )


@pytest.fixture
def copy(packages: Packages, tmp_path: Path) -> Path:
    """An int8 package to damage."""
    return Path(shutil.copytree(packages("int8 channels")[0], tmp_path / "linear.mlpackage"))


MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"


def test_an_unknown_operation_is_named(copy: Path) -> None:
    spec = read_spec(copy)
    (linear,) = (operation for operation in block_of(spec).operations if operation.type == "linear")
    linear.type = "quantum_linear"
    (copy / MODEL).write_bytes(spec.SerializeToString())
    with pytest.raises(
        UsageError, match="linear.mlpackage: .* does not know the ML program operation 'quantum_linear'"
    ):
        Program(copy)


def test_an_unknown_variant_of_an_operation_is_named(copy: Path) -> None:
    program = Program(copy)
    program._steps = [replace(program._steps[0], call=partial(OPERATIONS["concat"], [X], 0, True), singles=())]
    with pytest.raises(UsageError, match="linear.mlpackage: the evaluator does not compute concat with interleave"):
        program({"x": X[0, 0]})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda p: (p / "Manifest.json").unlink(), "has no Manifest.json"),
    "half a manifest": (lambda p: (p / "Manifest.json").write_text("{"), "Manifest.json is damaged"),
    "empty manifest": (
        lambda p: (p / "Manifest.json").write_text('{"itemInfoEntries": {}}'),
        "has no com.apple.CoreML/model.mlmodel",
    ),
    "broken model": (lambda p: (p / MODEL).write_bytes(b"\xff\xff\xff"), "model.mlmodel is damaged"),
    "empty model": (lambda p: (p / MODEL).write_bytes(b""), "not an ML program"),
    "zeroed weights": (
        lambda p: (p / WEIGHTS).write_bytes(b"\0" * 500),
        r"weight.bin: no whole blob at byte \d+; the file is damaged or missing",
    ),
    "cut weights": (
        lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:500]),
        r"weight.bin: no whole blob at byte \d+; the file is damaged or missing",
    ),
    "no weights": (
        lambda p: (p / WEIGHTS).unlink(),
        r"weight.bin: no whole blob at byte \d+; the file is damaged or missing",
    ),
}


@pytest.mark.parametrize("damage,message", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_package_is_one_line(damage: Callable[[Path], object], message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(UsageError, match=message) as failed:
        Program(copy)
    assert "\n" not in str(failed.value)


# --- states ---


def cache_nodes(*after: Node) -> list[Node]:
    update = {"x": "old", "update": "k", "begin": "b", "end": "e"}
    return [
        Node("read_state", {"input": "cache"}, ("old",), True),
        Node("slice_by_index", {"x": "old", "begin": "b", "end": "e"}, ("view",), True),
        Node("relu", {"x": "view"}, ("k",), True),
        Node("slice_update", update, ("new",), True),
        Node("write_state", {"input": "cache", "data": "new"}, (), False),
        *after,
    ]


def test_a_cache_is_updated_in_place_only_when_its_old_rows_are_spent() -> None:
    read_again = Node("read_state", {"input": "cache"}, ("seen",), True)
    assert in_place_updates(cache_nodes(read_again, Node("relu", {"x": "seen"}, ("y",), True))) == {3}
    assert in_place_updates(cache_nodes(Node("relu", {"x": "view"}, ("y",), True))) == set()
    assert in_place_updates(cache_nodes(Node("relu", {"x": "old"}, ("y",), True))) == set()
    assert in_place_updates(cache_nodes(Node("relu", {"x": "new"}, ("y",), True))) == set()


# --- threads ---


def test_threads_are_given_back() -> None:
    library = blas_threads_module.openblas()
    assert library is not None, "numpy's wheels for Linux carry OpenBLAS"
    before = library[blas_threads_module.GET]()
    with blas_threads(3):
        assert library[blas_threads_module.GET]() == 3
        with blas_threads(None):
            assert library[blas_threads_module.GET]() == 3
    with pytest.raises(ZeroDivisionError), blas_threads(2):
        _ = 1 / 0
    assert library[blas_threads_module.GET]() == before
