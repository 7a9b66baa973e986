"""Bundle of target onnx -> Runtime on plain onnxruntime (CPU), one KV cache buffer shared by past and present."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import mmap
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bundle.errors import UsageError, missing_extra
from bundle.manifest import GraphName, Manifest
from bundle.prefix import read_rows
from bundle.runtimes.contract import CacheRows, Floats, Ids, Runtime
from bundle.staging import inside

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CPUExecutionProvider"


def available() -> str | None:
    """None when this host can run ONNX bundles, else why not."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed; run: pip install 'alignkd[onnx]'"
    return None


def open_runtime(bundle: Path, manifest: Manifest, threads: int | None) -> Runtime:
    """Load the three graphs; ``threads`` None leaves the number to onnxruntime.

    Raises:
        UsageError: onnxruntime is missing, or refuses a file.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise missing_extra("onnxruntime", "onnx") from error
    return OnnxRuntime(onnxruntime, bundle, manifest, threads)


def _cache_type(manifest: Manifest) -> str:
    """float32, or float16 where the decoder was exported so."""
    return next(i.dtype for i in manifest.graphs["text_decoder"].inputs if i.name.startswith("past_key_values."))


def _untouched(shape: tuple[int, ...], kind: np.dtype[Any]) -> CacheRows:
    """Zeros that take memory only where they are written, page by page.

    numpy asks for huge pages: of those, the first rows of every head touch the whole cache, 403 MB of a 1.7B model's.
    """
    memory = mmap.mmap(-1, math.prod(shape) * kind.itemsize)
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, kind).reshape(shape)


class OnnxRuntime:
    """The Runtime of onnxruntime, of those graphs that the manifest names."""

    covers = "CPU"

    def __init__(self, engine: onnxruntime, bundle: Path, manifest: Manifest, threads: int | None) -> None:
        self.name = f"onnxruntime {importlib.metadata.version('onnxruntime')}"
        self._engine = engine
        self._shape = manifest.model
        options = engine.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # errors only; they are raised as well
        # threads that spin while they wait take the cores from everything else: 2 to 5 times slower on a busy host
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")

        state = engine.capi.onnxruntime_pybind11_state
        refusals = (state.Fail, state.InvalidGraph, state.InvalidProtobuf, state.InvalidArgument, state.NoSuchFile)

        def session(name: GraphName) -> onnxruntime.InferenceSession:
            path = inside(bundle, manifest.graphs[name].path, "graph path")
            try:
                return engine.InferenceSession(str(path), options, providers=[PROVIDER])
            except refusals as error:
                raise UsageError(f"onnxruntime refuses {path}: {error}; export the bundle again") from error

        self._sessions = {name: session(name) for name in manifest.graphs}
        self._position = 0
        self._prefix: dict[str, CacheRows] = {}
        self._cache: dict[str, CacheRows] = {}
        self._binding: Any = None  # of the decoder, where it is open
        self._logits: Any = None
        if "text_decoder" in self._sessions:
            self._binding = self._sessions["text_decoder"].io_binding()
            self._bind_cache(np.dtype(_cache_type(manifest)))
            self._prefix = read_rows(bundle, manifest)

    def _bind_cache(self, kind: np.dtype[Any]) -> None:
        shape = self._shape
        for layer in range(shape.num_layers):
            for part in ("key", "value"):
                name = f"past_key_values.{layer}.{part}"
                self._cache[name] = _untouched((1, shape.num_kv_heads, shape.context_length, shape.head_dim), kind)
                cache = self._engine.OrtValue.ortvalue_from_numpy(self._cache[name])
                self._binding.bind_ortvalue_input(name, cache)
                self._binding.bind_ortvalue_output(f"present.{layer}.{part}", cache)  # same buffer: nothing is copied
        self._logits = self._engine.OrtValue.ortvalue_from_numpy(np.zeros((1, 1, shape.vocab_size), np.float32))
        self._binding.bind_ortvalue_output("logits", self._logits)

    @property
    def position(self) -> int:
        return self._position

    def encode_image(self, pixel_values: Floats) -> Floats:
        return self._sessions["vision_encoder"].run(None, {"pixel_values": pixel_values})[0]

    def embed(self, input_ids: Ids) -> Floats:
        return self._sessions["token_embedding"].run(None, {"input_ids": input_ids})[0]

    def decode(self, inputs_embeds: Floats) -> Floats:
        end = self._position + inputs_embeds.shape[1]
        if end > self._shape.context_length:
            raise UsageError(
                f"{end} tokens do not fit the context of {self._shape.context_length}; ask for fewer new tokens, or "
                f"run: alignkd-export --context-length {end}"
            )
        inputs = {
            "inputs_embeds": np.ascontiguousarray(inputs_embeds, np.float32),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self._position, end, dtype=np.int64)[None],
        }
        for name, values in inputs.items():  # bound by address: ``inputs`` keeps them alive during the run
            self._binding.bind_cpu_input(name, values)
        self._sessions["text_decoder"].run_with_iobinding(self._binding)
        self._position = end
        return self._logits.numpy()[0, 0].copy()

    def reset(self, prefix_rows: int = 0) -> None:
        for name, rows in self._prefix.items() if prefix_rows else ():
            self._cache[name][:, :, :prefix_rows] = rows[:, :, :prefix_rows]
        self._position = prefix_rows

    def prefill(self, token_ids: tuple[int, ...]) -> dict[str, CacheRows]:
        """Text from an empty cache on -> keys and values of its rows, by the names of the decoder's inputs."""
        self.reset()
        self.decode(self.embed(np.array([token_ids], np.int64)))
        return {name: cache[:, :, : self._position].copy() for name, cache in self._cache.items()}

    def close(self) -> None:
        self._binding = self._logits = None  # first, for they point into the others' memory
        self._sessions.clear()
        self._cache.clear()
