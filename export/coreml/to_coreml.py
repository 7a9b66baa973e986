"""MobileVlm -> three iOS 18 ML programs (.mlpackage), for the GPU or the Neural Engine; the KV cache is state."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from bundle.manifest import Graph, GraphName, GraphQuantization
from export.contract import ExportedGraphs, ExportRequest
from export.coreml.ane_modules import refuse_for_engine
from export.coreml.checks import Budget, check_package
from export.coreml.compress import Packed, pack, stored_codes
from export.coreml.convert import Converted, convert, flat_name, load_coremltools
from export.coreml.fill import MAIN, write_package
from export.coreml.hollow import hollow
from export.coreml.parts import PARTS, Part, Wanted, runner_notes, with_rows
from export.coreml.weights import Held, PackageWeights, check_weights
from export.job.meter import Meter
from export.weights.recipe import Storage

TABLE_ENTRY_BYTES, TABLE_ENTRIES = 2, 16


def export_coreml(request: ExportRequest) -> ExportedGraphs:
    """Write the three packages under ``request.output``, check them, and find their weights in them again.

    Raises:
        UsageError: coremltools is missing, or the Neural Engine would not take the model's sizes.
        VerificationError: a written package is not what was asked for.
    """
    if request.coreml.engine == "ane":
        refuse_for_engine(request.vlm)
    load_coremltools()
    graphs: dict[GraphName, Graph] = {}
    quantization: dict[GraphName, GraphQuantization] = {}
    held: dict[str, tuple[Held, ...]] = {}
    exporter = GraphExporter(request)
    for name in PARTS[request.coreml.engine]:
        graphs[name], quantization[name], found = exporter.export(name)
        held |= found
        request.progress(f"{name.replace('_', ' ')} written: {graphs[name].path}")
    return ExportedGraphs(
        graphs,
        quantization,
        PackageWeights(held, exporter.shapes),
        runner_notes(exporter.wanted, request.coreml.engine),
    )


class GraphExporter:
    """Writes the packages of one request.

    Attributes:
        wanted: the model is hollow: its matrices are placeholders.
        shapes: state-dict name -> shape.
    """

    def __init__(self, request: ExportRequest) -> None:
        self._request = request
        streamed = request.weights
        self._weights: Mapping[str, torch.Tensor] = request.vlm.state_dict() if streamed is None else streamed
        self.shapes = request.shapes
        model, self._placeholders = hollow(request.vlm.config, self._weights)
        self.wanted = Wanted(model, request.precision, request.context_length)
        self._plan = request.plan("coreml")

    def export(self, name: GraphName) -> tuple[Graph, GraphQuantization, dict[str, tuple[Held, ...]]]:
        """Write one package, or take over what a killed run finished; the last value says where its weights lie."""
        request, part = self._request, PARTS[self._request.coreml.engine][name](self.wanted)
        package = request.output / part.graph.path
        storages = {
            parameter: self._plan.storage(source.name, self.shapes[source.name])
            for parameter, source in part.sources.items()
        }
        finished = request.work is not None and request.work.finished(name) is not None
        if finished:
            request.progress(f"{name.replace('_', ' ')} is whole from the run before: {part.graph.path}")
        else:
            self._write(name, part, storages)
        held = check_weights(package, part.sources, storages, self._weights)
        check_package(
            package,
            part.graph,
            {function: one.rows for function, one in part.functions.items()},
            request.context_length,
            self._budget(part, storages),
            request.coreml.engine,
        )
        if request.work is not None and not finished:
            files = [path for path in package.rglob("*") if path.is_file()]
            request.work.finish(name, files, {})
        rules = {source.name: storages[parameter] for parameter, source in part.sources.items()}
        return part.graph, describe(name, rules, {weight: math.prod(self.shapes[weight]) for weight in rules}), held

    def _write(self, name: GraphName, part: Part, storages: Mapping[str, Storage]) -> None:
        request = self._request
        sources = part.sources
        matrices = {
            flat_name(parameter): parameter
            for parameter, source in sources.items()
            if source.name in self._placeholders
        }
        converted: dict[str, Converted] = {}
        for function, one in part.functions.items():
            of_several = "" if function == MAIN else f" function '{function}'"
            request.progress(f"{name.replace('_', ' ')}: converting the graph{of_several}")
            converted[function] = convert(
                one.module,
                one.example,
                with_rows(part.graph, one.rows),
                request.precision,
                request.context_length,
                frozenset(matrices),
                request.output,
            )
        values = sum(math.prod(self.shapes[sources[parameter].name]) for parameter in matrices.values())
        meter = Meter("weights written", values, request.progress)

        def load(constant: str, shape: tuple[int, ...]) -> Packed:
            parameter = matrices[constant]
            source = sources[parameter]
            chosen = request.chosen
            if chosen is not None and source.name in chosen:
                coded = chosen.coded(source.name)
                packed = stored_codes(source.stored(coded.codes), source.stored(coded.scales), shape)
            else:
                packed = pack(source.stored(self._weights[source.name]), shape, storages[parameter])
            meter.advance(math.prod(shape))
            return packed

        write_package(request.output / part.graph.path, converted, frozenset(matrices), load)

    def _budget(self, part: Part, storages: Mapping[str, Storage]) -> Budget:
        sizes = {
            parameter: source.stored(torch.empty(self.shapes[source.name], device="meta")).numel()
            for parameter, source in part.sources.items()
        }
        bits = {parameter: int(storage.bits) for parameter, storage in storages.items()}
        shapes = {parameter: self.shapes[source.name] for parameter, source in part.sources.items()}
        return Budget(bits, sizes, part.table_bytes + _spare(shapes, storages))


def _spare(shapes: Mapping[str, tuple[int, ...]], storages: Mapping[str, Storage]) -> int:
    """Bytes of scales (float16 per group or channel), of tables, and of the zero bias that each linear gets."""
    spare = 0
    for parameter, shape in shapes.items():
        if len(shape) < 2:
            continue
        storage, width = storages[parameter], math.prod(shape[1:])
        spare += 4 * shape[0]
        if storage.palette_rows:
            spare += shape[0] // storage.palette_rows * TABLE_ENTRIES * TABLE_ENTRY_BYTES
        else:
            spare += 2 * shape[0] * (width // (storage.group_size or width))
    return spare


def describe(name: GraphName, rules: Mapping[str, Storage], sizes: Mapping[str, int]) -> GraphQuantization:
    """The manifest's line on one graph: the rule of most quantized weights, then the names under another one.

    Norms, biases, position and patch embeddings stay in float and are not named.
    """
    shares: dict[Storage, int] = {}
    for weight, rule in rules.items():
        shares[rule] = shares.get(rule, 0) + sizes[weight]
    quantized = [rule for rule in shares if rule.bits < 16]
    main = max(quantized or shares, key=lambda rule: shares[rule])
    others = [f"{_names(rules, rule)} {_weights(rule)} per channel" for rule in quantized if rule != main]
    activations = "float32" if main.bits == 32 else "float16"
    if main.bits == 32 and name == "text_decoder":
        activations += ", KV cache float16"
    return GraphQuantization(
        weights=", ".join([_weights(main), *others]), group_size=main.group_size, activations=activations
    )


def _weights(rule: Storage) -> str:
    if rule.palette_rows:
        return f"{rule.bits}-bit tables, one for {rule.palette_rows} rows"
    return f"int{rule.bits} symmetric" if rule.bits < 16 else f"float{rule.bits}"


def _names(rules: Mapping[str, Storage], rule: Storage) -> str:
    return " and ".join(
        sorted({name.removesuffix(".weight").split(".")[-1] for name, found in rules.items() if found == rule})
    )
