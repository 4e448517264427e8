"""The pipeline's stages as cached steps: each looks for its result under the hash of its inputs, and works if there is none.

Data moves by path and sha256. What a step returns is a folder in the store; a killed step leaves none.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rdeploy import __version__, backends, environment, resize, serde, worker
from rdeploy.data import preprocess
from rdeploy.data.calibration import NormalisedImages
from rdeploy.data.images import ImageSet
from rdeploy.errors import Unsupported
from rdeploy.models import Loaded
from rdeploy.store import Store
from rdeploy.types import (
    Cost,
    Engine,
    Float16,
    Limits,
    ModelSpec,
    OnnxModel,
    Quantization,
    QuantOptions,
    QuantScheme,
    Size,
    Target,
    Variant,
    Verification,
    format_size,
)
from rdeploy.worker.jobs import EngineJob, Measured, MeasureJob, VerifyRequest

if TYPE_CHECKING:
    from rdeploy.quantize import mixed

JOB_TIMEOUT_S = 3600.0
PARITY_IMAGES = 8
OVERFLOW_IMAGES = 64
"""How many images the largest activations are looked for on; a margin covers the others."""
_EXPORTERS = ("torch", "onnx", "onnx-ir", "onnxscript", "timm", "torchvision")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A variant's FP32 graph and what it costs."""

    onnx: OnnxModel
    cost: Cost
    parity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A variant's INT8 graph for one scheme."""

    onnx: OnnxModel
    cost: Cost
    quantization: Quantization
    scheme: QuantScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A graph whose float layers are FP16, and what of it is not."""

    onnx: OnnxModel
    cost: Cost
    fp16: Float16


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """A variant's graph that takes uint8 pictures of the native size."""

    onnx: OnnxModel
    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An engine, the folder it lies in, and how it did; `not_run` says why it could not be run here."""

    engine: Engine
    folder: Path
    verification: Verification | None
    not_run: str | None
    outputs: Path | None


@dataclass(slots=True)
class Steps:
    """What every step needs: the target, the cache, a clock for each stage, and where to say what is going on."""

    target: Target
    store: Store
    progress: Callable[[str], None]
    timings: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _running: int = 0
    _outer: str = ""
    _since: float = 0.0

    @contextlib.contextmanager
    def stage(self, name: str, what: str = "") -> Iterator[None]:
        """Say that a stage runs, and count its wall time once: what runs inside it or beside it is part of it."""
        self.progress(f"{name} {what}".rstrip())
        with self._lock:
            if not self._running:
                self._outer, self._since = name, time.perf_counter()
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    spent = time.perf_counter() - self._since
                    self.timings[self._outer] = self.timings.get(self._outer, 0.0) + spent

    def pixels(self, images: ImageSet, resolution: Size, spec: ModelSpec) -> Path:
        """Return a .npy of the images as the network sees them before normalisation, uint8 (N, h, w, C)."""
        shape = [
            images.sha256,
            resolution,
            spec.preprocessing.interpolation,
            spec.preprocessing.crop_pct,
            spec.channels,
        ]

        def write(folder: Path) -> None:
            with self.stage("images", f"{len(images)} at {format_size(resolution)}"):
                array = preprocess.prepare(images, resolution, spec.preprocessing, channels=spec.channels)
                np.save(folder / "pixels.npy", array)

        return self.store.make("pixels", serde.digest([shape, __version__]), write) / "pixels.npy"

    def settled(self, model: LazyModel, variant: Variant, images: ImageSet | None) -> Variant:
        """Return the variant nearest to the one asked for that the model can take, its methods' options searched on images.

        Raises:
            Unsupported: the model cannot be reduced at one of the places.
        """
        native = model.spec.native_resolution
        places = resize.places_of(variant, native)
        if model.onnx is not None:
            if inside := [place.at for place in places if place.at != resize.INPUT]:
                raise Unsupported(f"an ONNX file is reduced at its input only: give the PyTorch model for {inside[0]}")
            return variant
        found: tuple[resize.Place, ...] = ()
        for place in places:
            found += (self._settled(model, found, place, images),)
        return resize.variant_of(variant, found, native)

    def _settled(
        self, model: LazyModel, before: tuple[resize.Place, ...], place: resize.Place, images: ImageSet | None
    ) -> resize.Place:
        spec = model.spec
        for earlier in before:
            spec = resize.after_place(spec, earlier)
        searches = images is not None and hasattr(resize.find(place.method), "fit")
        judged = images if searches else None

        def write(folder: Path) -> None:
            pixels = None if judged is None else self.pixels(judged, spec.native_resolution, spec)
            with self.stage("resize", f"{place.at} {format_size(place.resolution)}"):
                pictures = None if pixels is None else NormalisedImages(pixels, spec)
                answer: dict[str, Any] = {"place": None, "reason": None}
                try:
                    answer["place"] = resize.settle(model.resized(before), spec, place, pictures)
                except Unsupported as error:
                    answer["reason"] = str(error)
            (folder / "place.json").write_text(serde.dumps(answer))

        facts = [model.spec.sha256, model.spec.native_resolution, before, place, _versions()]
        seen = [judged.sha256, spec.preprocessing] if judged is not None else []
        found = json.loads(
            (self.store.make("resolution", serde.digest([*facts, *seen]), write) / "place.json").read_text()
        )
        if found["reason"]:
            raise Unsupported(found["reason"])
        return serde.from_json(resize.Place, found["place"], where="place.json")

    def exported(self, model: LazyModel, variant: Variant, images: ImageSet) -> Exported:
        """Return a variant's FP32 graph, compared with PyTorch on real images; dense outputs have the native size."""
        size = model.spec.native_resolution
        places = resize.places_of(variant, size)
        dense = model.spec.task != "classification"
        native = self.exported(model, Variant(resolution=size), images).onnx if places and dense else None
        pixels = self.pixels(images, variant.resolution, model.spec)

        def write(folder: Path) -> None:
            from rdeploy import export

            export.check_graph(self._export(model, variant, folder / "model.onnx"))
            parity = self._parity(model, places, folder / "model.onnx", pixels)
            if native is not None:
                export.restore_size(folder / "model.onnx", native)
            if native is not None and model.spec.task == "detection":
                export.restore_boxes(folder / "model.onnx", size, variant.resolution)
            self._describe(folder / "model.onnx", "fp32", {"parity": parity})

        dynamic = [self.target.opset, self.dynamic_batch, *(["program"] if self._keeps_program else [])]
        facts = [model.spec.sha256, size, variant.resolution, places, dynamic, images.sha256, _versions()]
        folder = self.store.make("export", serde.digest(facts), write)
        onnx, cost, more = _described(folder / "model.onnx")
        return Exported(onnx=onnx, cost=cost, parity=more["parity"])

    @property
    def _keeps_program(self) -> bool:
        """Whether a backend of the target runs the module itself, as PyTorch exports it."""
        return any(getattr(backends.find(name), "NEEDS_MODULE", False) for name in self.target.backends)

    def _export(self, model: LazyModel, variant: Variant, path: Path) -> OnnxModel:
        from rdeploy import export

        resolution = variant.resolution
        with self.stage("export", variant.id):
            opset, dynamic = self.target.opset, self.dynamic_batch
            if model.onnx is not None:
                return export.prepare(model.onnx, resolution, path, opset=opset, dynamic_batch=dynamic)
            module = model.resized(resize.places_of(variant, model.spec.native_resolution))
            if self._keeps_program:
                export.save_program(module, model.spec, resolution, path.with_suffix(".pt2"), dynamic_batch=dynamic)
            return export.export(module, model.spec, resolution, path, opset=opset, dynamic_batch=dynamic)

    def _parity(self, model: LazyModel, places: tuple[resize.Place, ...], path: Path, pixels: Path) -> float:
        if model.onnx is not None:
            return 0.0
        from rdeploy import export
        from rdeploy.quantize.ranges import activations

        with self.stage("export", "compare with PyTorch"):
            batch = NormalisedImages(pixels, model.spec)[:PARITY_IMAGES]
            exact = export.torch_outputs(model.resized(places), batch)
            names = [value.name for value in export.describe(path, precision="fp32").outputs]
            found = list(activations(path, names, batch))
            rows = (np.concatenate([values[name] for values in found]) for name in names)
            return max(export.check_parity(*pair) for pair in zip(exact, rows, strict=True))

    @property
    def dynamic_batch(self) -> bool:
        """Whether the graph's batch size is left open."""
        return self.target.dynamic_batch or self.target.batch_sizes != (1,)

    def quantized(
        self,
        exported: Exported,
        schemes: Sequence[QuantScheme],
        images: ImageSet,
        spec: ModelSpec,
        options: QuantOptions,
        labelled: ImageSet | None = None,
    ) -> dict[str, Quantized]:
        """Return the INT8 graph for each scheme, by the scheme's name; all from one pass over the images.

        With `options.max_drop` layers fall back to float until it holds, judged on `labelled` or else on `images`.
        """
        pixels = self.pixels(images, _resolution_of(exported.onnx), spec)

        def write(folder: Path) -> None:
            from rdeploy.quantize import mixed, recipe

            every, source = NormalisedImages(pixels, spec), Path(exported.onnx.path)
            with tempfile.TemporaryDirectory(prefix="rdeploy-calibrate-") as work:
                with self.stage("calibrate", f"{len(images)} images"):
                    name = options.recipe
                    seen = recipe.calibrate(source, Path(work), schemes=schemes, images=every, recipe=name)
                weights: recipe.Weights = {}
                done: dict[str, Quantization] = {}
                for scheme in schemes:
                    out, before = folder / f"{scheme.name}.onnx", done.get(scheme.activations)
                    # What suits one runtime's unsigned activations suits the other's.
                    known = replace(options, calibrator=before.calibrator if before else options.calibrator)

                    def requantize(
                        keep_float: tuple[str, ...],
                        out: Path = out,
                        scheme: QuantScheme = scheme,
                        known: QuantOptions = known,
                    ) -> Quantization:
                        more = replace(known, keep_float=(*known.keep_float, *keep_float))
                        with self.stage(
                            "quantize", scheme.name + f", {len(keep_float)} layers in float" * bool(keep_float)
                        ):
                            return recipe.quantize(
                                seen, out, scheme=scheme, images=every, options=more, weights=weights
                            )

                    if options.max_drop is None:
                        made = requantize(())
                    else:
                        made = mixed.control(
                            source,
                            out,
                            scheme=scheme,
                            images=every,
                            requantize=requantize,
                            judge=self._judge(source, images, labelled, spec),
                            max_drop=options.max_drop,
                            first=before.fallbacks.layers if before and before.fallbacks else (),
                        )
                    done[scheme.activations] = made = replace(made, images_sha256=images.sha256)
                    self._describe(out, "int8", {"quantization": serde.to_json(made), "scheme": serde.to_json(scheme)})

        judges = [labelled.sha256, labelled.labels] if labelled and options.max_drop is not None else []
        facts = [exported.onnx.sha256, images.sha256, spec.preprocessing, schemes, options, judges, _versions()]
        folder = self.store.make("quantize", serde.digest(facts), write)
        return {scheme.name: _read_quantized(folder / f"{scheme.name}.onnx") for scheme in schemes}

    def _judge(self, fp32: Path, images: ImageSet, labelled: ImageSet | None, spec: ModelSpec) -> mixed.Judge:
        from rdeploy.quantize import mixed

        judges = labelled or images
        resolution = _resolution_of(_described(fp32)[0])
        batches = NormalisedImages(self.pixels(judges, resolution, spec), spec)
        labels = labelled.labels if labelled else None
        with self.stage("quantize", f"decisions on {len(judges)} images"):
            return mixed.judge_on(fp32, batches, labels=labels, task=spec.task)

    def rounded(self, graph: OnnxModel, exported: Exported, images: ImageSet, spec: ModelSpec) -> Rounded:
        """Return a variant's graph, FP32 or INT8, with its float layers in FP16 where that is safe on these images."""
        pixels = self.pixels(images, _resolution_of(exported.onnx), spec)

        def write(folder: Path) -> None:
            import onnx_ir as ir

            from rdeploy import export
            from rdeploy.graph import fp16
            from rdeploy.quantize.ranges import largest

            with self.stage("fp16", format_size(_resolution_of(exported.onnx))):
                every = NormalisedImages(pixels, spec)
                seen = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, OVERFLOW_IMAGES).astype(int))]
                model = ir.load(graph.path)
                made = fp16.convert(model, largest=largest(Path(exported.onnx.path), seen))
                fp16.check_typed(model)
                ir.save(model, folder / "model.onnx")
                export.check_graph(export.describe(folder / "model.onnx", precision="fp16"))
            facts = serde.to_json(replace(made, samples=len(seen)))
            precision = "fp16" if graph.precision == "fp32" else graph.precision
            self._describe(folder / "model.onnx", precision, {"fp16": facts})

        facts = [graph.sha256, exported.onnx.sha256, images.sha256, spec.preprocessing, _versions()]
        return _read_rounded(self.store.make("fp16", serde.digest(facts), write) / "model.onnx")

    def lowered(self, graph: OnnxModel, operators: Sequence[str]) -> OnnxModel:
        """Return a graph in which these operators are written with others, for a runtime that lacks them."""

        def write(folder: Path) -> None:
            import onnx_ir as ir

            from rdeploy import export
            from rdeploy.graph import lower

            model = ir.load(graph.path)
            lower.lower(model, operators)
            ir.save(model, folder / "model.onnx")
            export.check_graph(export.describe(folder / "model.onnx", precision=graph.precision))
            self._describe(folder / "model.onnx", graph.precision, {})

        folder = self.store.make("lowered", serde.digest([graph.sha256, list(operators), _versions()]), write)
        return _described(folder / "model.onnx")[0]

    def embedded(self, graph: OnnxModel, spec: ModelSpec) -> Embedded:
        """Return a variant's graph with the resize from the native size and the normalisation in front of it."""

        def write(folder: Path) -> None:
            import onnx_ir as ir

            from rdeploy import export
            from rdeploy.graph import embed

            with self.stage("embed", format_size(spec.native_resolution)):
                model = ir.load(graph.path)
                embed.embed(model, spec.native_resolution, spec.preprocessing)
                ir.save(model, folder / "model.onnx")
                export.check_graph(export.describe(folder / "model.onnx", precision=graph.precision))
                self._describe(folder / "model.onnx", graph.precision, {})

        key = serde.digest([graph.sha256, spec.native_resolution, spec.preprocessing, _versions()])
        onnx, cost, _ = _described(self.store.make("embed", key, write) / "model.onnx")
        return Embedded(onnx=onnx, cost=cost)

    def _describe(self, path: Path, precision: str, more: Mapping[str, Any]) -> None:
        from rdeploy import export
        from rdeploy.graph import cost

        facts = {"onnx": replace(export.describe(path, precision=precision), path=""), "cost": cost.summarize(path)}
        path.with_suffix(".json").write_text(serde.dumps({**facts, **more}))

    def built(self, onnx: OnnxModel, backend: str, verify: VerifyRequest | None) -> Built:
        """Build an engine and verify it, in a child process.

        Raises:
            StageError: the child failed, crashed or hung.
        """
        plugin = backends.find(backend)
        facts = [onnx.sha256, backend, plugin.version(), _deciding(self.target), verify, environment.fingerprint()]

        def job(folder: Path) -> EngineJob:
            places = {"directory": str(folder / "engine"), "outputs": str(folder / "outputs.npy")}
            return EngineJob(backend=backend, onnx=onnx.path, target=self.target, verify=verify, **places)

        return _read_built(self._done("engine", facts, job, f"{backend} {Path(onnx.path).parent.name[:6]}"))

    def measured(self, job: MeasureJob, engines: Sequence[str]) -> dict[str, Measured]:
        """Measure engines against each other, interleaved; the same engines on the same machine are measured once."""
        facts = [replace(job, entries=()), engines, environment.fingerprint()]
        folder = self._done("measure", facts, lambda _: job, f"{len(job.entries)} engines, interleaved")
        answer = json.loads((folder / worker.RESULT_FILE).read_text())["ok"]
        found = [serde.from_json(Measured, entry, where="measure") for entry in answer["entries"]]
        return {entry.name: entry for entry in found}

    def _done(self, kind: str, facts: Any, job: Callable[[Path], EngineJob | MeasureJob], what: str) -> Path:
        """Return the folder of a job's result, after running it in a child process if there is none.

        A job that fails leaves its folder under `jobs/`, so that it can be run again as it was.
        """
        key = serde.digest([facts, __version__])

        def write(folder: Path) -> None:
            with self.stage("build" if kind == "engine" else kind, what):
                work = self.store.root / "jobs" / key
                shutil.rmtree(work, ignore_errors=True)
                worker.call(serde.to_json(job(work)), directory=work, timeout_s=JOB_TIMEOUT_S)
                for item in work.iterdir():
                    item.rename(folder / item.name)
                work.rmdir()

        return self.store.make(kind, key, write)


class LazyModel:
    """A model whose facts are known and whose module is loaded when a step has to work with it."""

    def __init__(self, spec: ModelSpec, onnx: Path | None, load: Callable[[], Loaded]) -> None:
        self.spec, self.onnx = spec, onnx
        self._load = load
        self._module: Any = None
        self._resized: dict[tuple[resize.Place, ...], Any] = {}

    @property
    def module(self) -> Any:
        """The PyTorch module, loaded once; None where the model is an ONNX file."""
        if self._module is None and self.onnx is None:
            self._module = self._load().module
        return self._module

    def resized(self, places: tuple[resize.Place, ...]) -> Any:
        """Return the module reduced at these places; the last one is kept, since several steps need it."""
        if places not in self._resized:
            self._resized = {places: resize.apply(self.module, self.spec, places)}
        return self._resized[places]


def _versions() -> list[Any]:
    """Return what a graph depends on besides the model: rdeploy itself and the packages that export it."""
    found: list[Any] = [__version__]
    for name in _EXPORTERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append([name, metadata.version(name)])
    return found


def _deciding(target: Target) -> Target:
    """Return the target with only what decides an engine."""
    return replace(
        target, name="", description="", backends=(), sources=(), limits=Limits(), timing=Target(name="").timing
    )


def _resolution_of(onnx: OnnxModel) -> Size:
    return onnx.inputs[0].shape[2], onnx.inputs[0].shape[3]


def _described(path: Path) -> tuple[OnnxModel, Cost, dict[str, Any]]:
    facts = json.loads(path.with_suffix(".json").read_text())
    onnx = replace(serde.from_json(OnnxModel, facts.pop("onnx"), where=str(path)), path=str(path))
    return onnx, serde.from_json(Cost, facts.pop("cost"), where=str(path)), facts


def _read_quantized(path: Path) -> Quantized:
    onnx, cost, more = _described(path)
    quantization = serde.from_json(Quantization, more["quantization"], where=str(path))
    scheme = serde.from_json(QuantScheme, more["scheme"], where=str(path))
    return Quantized(onnx=onnx, cost=cost, quantization=quantization, scheme=scheme)


def _read_rounded(path: Path) -> Rounded:
    onnx, cost, more = _described(path)
    return Rounded(onnx=onnx, cost=cost, fp16=serde.from_json(Float16, more["fp16"], where=str(path)))


def _read_built(folder: Path) -> Built:
    answer = json.loads((folder / worker.RESULT_FILE).read_text())["ok"]
    verification, outputs = answer["verification"], folder / "outputs.npy"
    return Built(
        engine=serde.from_json(Engine, answer["engine"], where=str(folder)),
        folder=folder / "engine",
        verification=None if verification is None else serde.from_json(Verification, verification, where=str(folder)),
        not_run=answer["not_run"],
        outputs=outputs if outputs.is_file() else None,
    )
