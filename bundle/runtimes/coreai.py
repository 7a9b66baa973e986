"""Bundle of target coreai -> Runtime on Core AI itself, on macOS 27 or later; not run on a Mac so far."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import sys
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bundle.manifest import GraphName, Manifest
from bundle.runtimes.contract import Floats, Ids
from bundle.runtimes.coreai_asset import ENTRY, installed, open_asset
from bundle.runtimes.coreml_inputs import gather_ids, next_position
from bundle.staging import inside

FIRST_MACOS = 27
DECODER: GraphName = "text_decoder"
Result = TypeVar("Result")


def available() -> str | None:
    """None when Core AI itself can run here, else why not; imports nothing."""
    if sys.platform != "darwin":
        return f"needs macOS {FIRST_MACOS}"
    version = platform.mac_ver()[0]
    if int(version.split(".")[0] or 0) < FIRST_MACOS:
        return f"needs macOS {FIRST_MACOS} or later, this is {version}"
    return installed()


def open_runtime(bundle: Path, manifest: Manifest, threads: int | None) -> CoreAiRuntime:
    """Compile and load the three assets; Core AI decides the threads, whatever ``threads`` says.

    Raises:
        UsageError: coreai-core is missing.
        VerificationError: an asset was changed.
    """
    assets = {name: open_asset(inside(bundle, graph.path, "graph path")) for name, graph in manifest.graphs.items()}
    version = importlib.metadata.version("coreai-core")
    return CoreAiRuntime(manifest, assets, f"Core AI, coreai-core {version}", "Core AI on this Mac")


class CoreAiRuntime:
    """The Runtime of three opened assets.

    Args:
        assets: AIModelAsset of each graph; what they compute in may differ from what the manifest says.
    """

    def __init__(self, manifest: Manifest, assets: Mapping[GraphName, Any], name: str, covers: str) -> None:
        self.name, self.covers = name, covers
        self._graphs, self._shape = manifest.graphs, manifest.model
        self._array: Any = import_module("coreai.runtime").NDArray
        self._loop = asyncio.new_event_loop()
        # a thread of its own: the caller may be inside an event loop, as every notebook is
        self._thread = ThreadPoolExecutor(1, "coreai")
        self._open = AsyncExitStack()
        self._functions: dict[GraphName, Any] = self._wait(self._compile(assets))
        self._state: dict[str, Any] = {}
        self._position = 0
        self.reset()

    @property
    def position(self) -> int:
        return self._position

    def encode_image(self, pixel_values: Floats) -> Floats:
        return self._call("vision_encoder", {"pixel_values": pixel_values})

    def embed(self, input_ids: Ids) -> Floats:
        return self._call("token_embedding", {"input_ids": gather_ids(input_ids, self._shape)})

    def decode(self, inputs_embeds: Floats) -> Floats:
        end = next_position(self._position, inputs_embeds, self._shape)
        positions = np.arange(end, dtype=np.int32)[None]  # [1, E]: of the cache and the new rows
        logits = self._call(DECODER, {"inputs_embeds": inputs_embeds, "position_ids": positions})  # [1, 1, V]
        self._position = end
        return logits[0, 0]

    def reset(self, prefix_rows: int = 0) -> None:
        assert prefix_rows == 0  # these bundles have no prefix cache
        self._position = 0
        description = self._functions[DECODER].desc
        for name in description.state_names:
            cache = description.state_descriptor(name)
            self._state[name] = self._array(np.zeros(cache.shape, cache.dtype))

    def close(self) -> None:
        self._functions.clear()
        self._state.clear()
        self._wait(self._open.aclose())
        self._thread.submit(self._loop.close).result()
        self._thread.shutdown()

    def _call(self, name: GraphName, values: Mapping[str, np.ndarray[Any, Any]]) -> Floats:
        function = self._functions[name]
        inputs = {
            key: self._array(np.ascontiguousarray(value, function.desc.input_descriptor(key).dtype))
            for key, value in values.items()
        }
        outputs = self._wait(_run(function, inputs, self._state if name == DECODER else {}))
        return np.array(outputs[self._graphs[name].outputs[0].name].numpy(), np.float32)  # a copy: theirs is reused

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self._thread.submit(self._loop.run_until_complete, work).result()

    async def _compile(self, assets: Mapping[GraphName, Any]) -> dict[GraphName, Any]:
        functions: dict[GraphName, Any] = {}
        for name, asset in assets.items():
            model = await self._open.enter_async_context(asset.executable())
            with _quiet_stderr():
                functions[name] = model.load_function(ENTRY)
        return functions


async def _run(function: Any, inputs: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    return await function(inputs, state)  # changes the arrays of ``state`` in place


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The engine announces every function on the process's own stderr."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(null)
        os.close(kept)
