"""Bundle of target executorch -> Runtime on the engine that phones run: ExecuTorch's portable and XNNPACK kernels."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from bundle.errors import UsageError, missing_extra
from bundle.manifest import GraphName, Manifest
from bundle.runtimes.contract import Floats, Ids, Runtime
from bundle.staging import inside

if TYPE_CHECKING:
    from types import ModuleType

# The python bindings know the llama and quantized kernels only once these two have been imported.
KERNELS = ("executorch.extension.llm.custom_ops.custom_ops", "executorch.kernels.quantized")
ENGINE = "executorch.extension.pybindings.portable_lib"
_OPEN: WeakSet[ExecuTorchRuntime] = WeakSet()  # runtimes of this process that hold on to its thread pool


def available() -> str | None:
    """None when this host can run ExecuTorch bundles, else why not."""
    missing = [name for name in ("torch", "executorch") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{missing[0]} is not installed; run: pip install 'alignkd[executorch]'"
    return None


def open_runtime(bundle: Path, manifest: Manifest, threads: int | None) -> Runtime:
    """Load the three methods of the .pte; ``threads`` None leaves the number to ExecuTorch.

    Raises:
        UsageError: executorch is missing or refuses the file, or another bundle is open with another number of threads.
    """
    engine = _engine()
    _set_threads(engine, threads)
    runtime = ExecuTorchRuntime(engine, bundle, manifest)
    _OPEN.add(runtime)
    return runtime


def _engine() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "this API is experimental", once per import
            engine = importlib.import_module(ENGINE)
            for kernels in KERNELS:
                importlib.import_module(kernels)
    except ModuleNotFoundError as error:
        raise missing_extra((error.name or "executorch").split(".")[0], "executorch") from error
    return engine


def _set_threads(engine: ModuleType, threads: int | None) -> None:
    """The process has one pool, and a new pool would leave the opened methods with a dead pointer to the old one."""
    now = engine._threadpool_get_thread_count()
    if threads is None or threads == now:
        return
    if threads < 1:
        raise UsageError(f"threads is {threads}; it must be at least 1")
    if _OPEN:
        raise UsageError(
            f"threads is {threads}, but an executorch bundle is open in this process with {now}; close it first, "
            f"or ask for {now} threads"
        )
    engine._unsafe_reset_threadpool(threads)


class ExecuTorchRuntime:
    """The Runtime of ExecuTorch's python bindings."""

    covers = "CPU (XNNPACK)"

    def __init__(self, engine: ModuleType, bundle: Path, manifest: Manifest) -> None:
        self.name = f"executorch {importlib.metadata.version('executorch')}"
        self._context_length = manifest.model.context_length
        self._position = 0
        self._methods = {
            name: _load(engine, inside(bundle, graph.path, "graph path"), graph.method or name)
            for name, graph in manifest.graphs.items()
        }

    @property
    def position(self) -> int:
        return self._position

    def encode_image(self, pixel_values: Floats) -> Floats:
        return self._run("vision_encoder", pixel_values.astype(np.float32))

    def embed(self, input_ids: Ids) -> Floats:
        return self._run("token_embedding", input_ids.astype(np.int64))

    def decode(self, inputs_embeds: Floats) -> Floats:
        rows = inputs_embeds.astype(np.float32)  # [1, T, D]
        end = self._position + rows.shape[1]
        if end > self._context_length:
            raise UsageError(
                f"{end} tokens do not fit the context of {self._context_length}; ask for fewer new tokens, or "
                f"run: alignkd-export --context-length {end}"
            )
        longest = self._context_length - 1  # rows that one call takes
        for start in range(0, rows.shape[1], longest):
            segment = np.ascontiguousarray(rows[:, start : start + longest])
            logits = self._run("text_decoder", segment, np.array([self._position + start], np.int64))  # [1, V]
        self._position = end
        return logits[0]

    def reset(self, prefix_rows: int = 0) -> None:
        assert prefix_rows == 0  # these bundles have no prefix cache
        # attention reads rows 0 .. position only, and every row is written before it is read
        self._position = 0

    def close(self) -> None:
        self._methods.clear()
        _OPEN.discard(self)

    def _run(self, name: GraphName, *inputs: NDArray[Any]) -> Floats:
        import torch

        return self._methods[name].call([torch.from_numpy(values) for values in inputs])[0].numpy()


def _load(engine: ModuleType, path: Path, method: str) -> Any:
    """A method in a program of its own.

    Methods of one program share their memory: an embedding between two decoder calls was seen to overwrite K and V.
    """
    try:
        # the stronger verification is not compiled into the wheel, and says so on stderr
        return engine._load_program(str(path), program_verification=engine.Verification.Minimal).load_method(method)
    except RuntimeError as error:
        raise UsageError(f"executorch refuses {path}: {error}; export the bundle again") from error
