"""The Python interface behind the command line: `rdeploy.build`, `rdeploy.optimize`, `rdeploy.profile`, and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from rdeploy import backends, bundle, profiling, runs, runtime, targets
from rdeploy.data import boxes, images, pairs
from rdeploy.errors import ConfigError, MissingDependency
from rdeploy.metrics import coco
from rdeploy.metrics.outputs import Outputs
from rdeploy.profiling import ProfileOptions
from rdeploy.request import BuildOptions, build_request, void_values
from rdeploy.results import BuildResult, EngineResult, Verification
from rdeploy.search_request import SearchOptions, search_request
from rdeploy.types import REPORTS, Size
from rdeploy.verify import accuracy, agreement, collapse
from rdeploy.verify.accuracy import Truth
from rdeploy.worker.jobs import VerifyRequest
from rdeploy.worker.recorder import Recorder

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Unpack

    from rdeploy.optimization import OptimizeResult
    from rdeploy.standing import Watch

Progress = Callable[[str], None]

_BUILD_TIMEOUT_S = 1800.0
_MEASURE_TIMEOUT_S = 600.0
_CHUNK = 16


def build(
    model: str, *, command: str = "", progress: Progress | None = None, **options: Unpack[BuildOptions]
) -> BuildResult:
    """Build the variants of a model beside its native FP32 baseline, measure them, and write their bundles.

    The options are `BuildOptions`, those of `rdeploy build` with underscores: `build("timm:resnet18", scale=0.75, int8=True,
    calib="photos/")`. A variant that fails is a row of the result with its failure; it raises nothing.

    Raises:
        ConfigError: an option or a file is wrong; nothing was written.
        MissingDependency: something that the build needs is not on this machine.
    """
    request = build_request(model, options, command=command)
    from rdeploy import pipeline

    result: BuildResult = pipeline.build(request, progress=progress)
    return result


def optimize(
    model: str,
    *,
    command: str = "",
    progress: Progress | None = None,
    watch: Watch | None = None,
    **options: Unpack[SearchOptions],
) -> OptimizeResult:
    """Search resolutions, places, precisions and backends for the best point under a budget, and write the front's bundles.

    The options are `BuildOptions` and those below, which are those of `rdeploy optimize` with underscores and the time in
    seconds: `optimize("timm:resnet18", calib="photos/", max_drop=1.0, time_budget=1200)`. Without a precision, a size or a
    place all are searched.

    Args:
        watch: called after each round with what was measured, the best of it, and how many points may be left.

    Keyword Args:
        max_drop (float): the most points that may be lost against the native model.
        max_latency_ms (float): the longest that a run may take, of a whole batch.
        max_memory_mb (float): the highest peak of a process.
        max_size_mb (float): the largest engine.
        objective (str): latency, throughput, memory or size.
        time_budget (float): seconds after which no new point is measured.
        resume (bool): go on with the run that is in `out`.
        workers (int | str): how many processes judge and build here, or a Ray cluster's address.
        samples (int): how many points to draw from what cannot be enumerated.

    Raises:
        ConfigError: an option or a file is wrong, or `out` holds another run.
        MissingDependency: something that the search needs is not on this machine.
    """
    request = search_request(model, options, command=command)
    from rdeploy import optimization

    found: OptimizeResult = optimization.optimize(request, progress=progress, watch=watch)
    return found


def profile(path: str | Path, **options: Unpack[ProfileOptions]) -> tuple[EngineResult, ...]:
    """Measure the engines of a bundle, or build engines of an ONNX file and measure those; all interleaved.

    The options are those of `rdeploy profile`, with underscores: `profile("bundle", batch=(1, 2, 4), layers=True)`. An
    engine that cannot run here is in the result with the reason as its failure.

    Raises:
        ConfigError: neither a bundle nor an ONNX file, no such backend in it, or an option that cannot be.
    """
    return profiling.profile(path, options)


def evaluate(
    path: str | Path,
    data: str | Path,
    *,
    against: str | Path | None = None,
    backend: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    void: Sequence[int] = (),
) -> Verification:
    """Score a bundle on labelled images (top-1, mIoU), and on whether it answers as another bundle does.

    Args:
        data: class folders, a CSV of path,label, arrays with labels, or images/ and masks/; labels may be missing with
            `against`.
        void: values of the masks that are no class, besides 255.
        against: the bundle to agree with, usually the native FP32 one; its labelled score becomes the reference.
        limit: at most so many images, a seeded sample.

    Raises:
        ConfigError: the data holds no labels and there is nothing to agree with, or the bundle is damaged.
    """
    with runtime.load(path, backend=backend) as model:
        pictures = _pictures(model, data, limit=limit, seed=seed, labelled=against is None)
        outputs = _outputs(model, pictures, void)
        name = f"{model.backend} {backends.find(model.backend).version()}"
    native = None
    if against is not None:
        with runtime.load(against) as other:
            native = _outputs(other, pictures, void)
    truth = _truth(model, pictures)
    scored = accuracy.score(outputs, task=model.task, native=native, labels=pictures.labels, truth=truth)
    agreed = agreement.agree(outputs, native, model.task) if native is not None else None
    reasons = collapse.reasons(outputs, None, targets.load("cpu").limits, task=model.task)
    return Verification(passed=not reasons, reasons=reasons, executed_by=name, accuracy=scored, agreement=agreed)


def _pictures(
    model: runtime.Model, data: str | Path, *, limit: int | None, seed: int, labelled: bool
) -> images.ImageSet:
    """Return the images to score on, with labels or masks where the task has any; `labelled` refuses images without."""
    if model.task == "segmentation":
        return pairs.collect_pairs(str(data), limit=limit, seed=seed)
    if model.task == "detection":
        return boxes.collect_boxed(str(data), limit=limit, seed=seed)
    if model.task == "embedding":
        if labelled:
            raise ConfigError("an embedding has no labels to be scored on: give the native bundle with --against")
        return images.collect(data, limit=limit, seed=seed)
    found = images.collect(data, limit=limit, seed=seed, labelled=labelled, class_names=model.labels)
    if found.labels is not None and not labelled:
        return images.collect(data, limit=limit, seed=seed, labelled=True, class_names=model.labels)
    return found


def report(path: str | Path, *, out: str | Path | None = None, kind: str = "html") -> tuple[Path, ...]:
    """Write the report of a run (a folder of bundles, or one bundle) and return the files.

    Args:
        out: the file, or for plots the folder. Where it is not given, inside of a folder of bundles; beside one bundle, as
            `NAME-report.html`: what is in it stays what was built.
        kind: html, markdown, csv, svg or png.

    Raises:
        ConfigError: there is no bundle, no such kind, or the place cannot be written to.
        MissingDependency: the page and the plots need the `report` extra.
    """
    from rdeploy.report import charts, html, points, searched

    if kind not in REPORTS:
        raise ConfigError(f"there is no report of kind {kind!r}; choose one of {', '.join(REPORTS)}")
    bundles, outcome = runs.read(path), runs.outcome(path)
    found = searched.points(bundles, outcome)
    metric = points.metric(bundles)
    if kind in ("svg", "png"):
        specs = charts.charts(bundles, found, judged=searched.judged(bundles, outcome), metric=metric)
        folder = Path(out or _place(path, ""))
        return tuple(_write(folder / f"{name}.{kind}", html.image(specs, name, kind)) for name in specs)
    if kind == "html":
        content = html.render(bundles, outcome)
    elif kind == "markdown":
        content = points.to_markdown(found, metric=metric, reason=outcome.reason if outcome else "")
    else:
        content = points.to_csv(found)
    suffix = "md" if kind == "markdown" else kind
    return (_write(Path(out or _place(path, f"report.{suffix}")), content.encode()),)


def _place(path: str | Path, name: str) -> Path:
    """Return where a report goes unless it is told: into a folder of bundles, but beside one bundle, under its name."""
    if not bundle.is_bundle(path):
        return Path(path) / name
    folder = bundle.folder_of(path).resolve()
    return folder.with_name(f"{folder.name}-{name or 'report'}")


def _write(file: Path, content: bytes) -> Path:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}; choose another --out") from error
    return file


def _frame(model: runtime.Model) -> Size:
    height, width = model.manifest["model"]["native_resolution"]
    return int(height), int(width)


def _truth(model: runtime.Model, pictures: images.ImageSet) -> Truth | None:
    if pictures.boxes is None:
        return None
    if reason := coco.unavailable():
        raise MissingDependency(reason)
    return Truth(boxes=tuple(map(boxes.read_boxes, pictures.boxes)), frame=_frame(model))


def _outputs(model: runtime.Model, pictures: images.ImageSet, void: Sequence[int]) -> Outputs:
    """Run a bundle over images; for segmentation only the decisions and counts are kept, not the scores."""
    request = VerifyRequest(
        pixels="",
        preprocessing=model.preprocessing,
        task=model.task,
        masks=pictures.masks,
        void=void_values(void),
        frame=_frame(model),
    )
    recorder = Recorder(len(pictures), model.seen_resolution, request, None)
    with ThreadPoolExecutor() as pool:
        start = 0
        for named in model.stream(_read(pool, pictures)):
            recorder.names = tuple(named) if len(named) > 1 else ("output",)
            rows = list(named.values())
            recorder.add(start, rows)
            start += len(rows[0])
    return recorder.finish()


def _read(pool: ThreadPoolExecutor, pictures: images.ImageSet) -> Iterator[Image]:
    """Yield the pictures in order, read a few at a time."""
    for start in range(0, len(pictures), _CHUNK):
        yield from pool.map(pictures.read, range(start, min(start + _CHUNK, len(pictures))))
