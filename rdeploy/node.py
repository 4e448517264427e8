"""What a node of a cluster does: an order goes in, the store's entries that doing it made come out, as a parcel.

A node works in a store of its own with the very steps that a search alone would take. What it cannot do is left out: the search
does it itself, and meets the reason then.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rdeploy import __version__, environment, intake, judging, pipeline, serde, transfer, worker
from rdeploy.build_request import BuildRequest
from rdeploy.data.images import ImageSet
from rdeploy.errors import RdeployError, StageError
from rdeploy.intake import Build
from rdeploy.pipeline import engines
from rdeploy.results import Failure
from rdeploy.steps import Steps
from rdeploy.store import Store, atomic_folder, default_root
from rdeploy.transfer import Parcel, RecordingStore
from rdeploy.types import Target, Variant

log = logging.getLogger(__name__)

Fetch = Callable[[], Mapping[str, bytes]]
"""Gets the contents of the inputs, by hash, from where the search runs."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Order:
    """What all jobs of a search have in common; `inputs` are the user's files by path, with the hash of each.

    `root` is the searching machine's store, and `mark` a file in it: a node that sees the file works in that very store.
    """

    request: BuildRequest
    target: Target
    calib: ImageSet
    judged: ImageSet
    graphs_for: tuple[str, ...]
    inputs: tuple[tuple[str, str], ...]
    root: str
    mark: str
    version: str = __version__

    @property
    def key(self) -> str:
        return serde.digest([replace(self.request, command=""), self.target, self.inputs, self.mark])


def order_of(this: Build, mark: str) -> Order:
    """Return what a node has to know of a build; its paths are absolute, since a node works in another folder."""
    model = this.request.model
    return Order(
        request=replace(this.request, model=_absolute(model) if Path(model).is_file() else model),
        target=this.target,
        calib=_with_paths(this.calib, _absolute),
        judged=_with_paths(this.judged, _absolute),
        graphs_for=this.graphs_for,
        inputs=tuple((str(path), serde.file_sha256(path)) for path in _files(this)),
        root=str(this.steps.store.root),
        mark=mark,
    )


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _with_paths(images: ImageSet, change: Callable[[str], str]) -> ImageSet:
    return replace(
        images,
        paths=tuple(map(change, images.paths)) if images.array is None else images.paths,
        masks=images.masks and tuple(map(change, images.masks)),
        boxes=images.boxes and tuple(map(change, images.boxes)),
    )


def _files(this: Build) -> list[Path]:
    """Return the user's files that a build reads: the model, the code of its factory, the images, masks and boxes."""
    request = this.request
    found = [Path(request.model)] if Path(request.model).is_file() else []
    found += [file for name in (request.model, request.load.arch or "") for file in _code_of(name)]
    for images in (this.calib, this.judged):
        found += [Path(path) for path in images.paths if images.array is None]
        found += [Path(path) for path in (*(images.masks or ()), *(images.boxes or ()))]
    return list(dict.fromkeys(path.absolute() for path in found))


def _code_of(factory: str) -> list[Path]:
    """Return the source of a `package.module:factory` that is not installed; named architectures have none."""
    module = factory.partition(":")[0]
    if not _is_factory(factory):
        return []
    from rdeploy.models.factory import importable_here

    with importable_here():
        spec = importlib.util.find_spec(module.partition(".")[0])
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    if origin is None or "site-packages" in origin.parts:
        return []
    return sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]


def _is_factory(name: str) -> bool:
    module, colon, _ = name.partition(":")
    return bool(colon) and module not in ("timm", "torchvision", "hf") and not Path(name).exists()


def judge(order: Order, variant: Variant, count: int, fetch: Fetch, parcels: Iterable[Parcel]) -> tuple[str, Parcel]:
    """Judge a variant's FP32 graph on `count` images; return why not, if so, and what was made."""
    return _done(order, fetch, parcels, lambda this: judging.judge(this, judging.native_row(this), variant, count))


def prepare(order: Order, variant: Variant, fetch: Fetch, parcels: Iterable[Parcel]) -> tuple[str, Parcel]:
    """Export, quantize, build and verify a variant; return why not, if so, and what was made."""

    def work(this: Build) -> None:
        native = engines.native_outputs(this, judging.native_row(this))
        made = pipeline.contained(this, variant, native)
        if isinstance(made, Failure):
            raise StageError(made.stage, made.message)

    return _done(order, fetch, parcels, work)


def measure(
    job: Mapping[str, Any], root: str, fingerprint: str, parcel: Parcel, timeout_s: float
) -> tuple[Mapping[str, bytes], tuple[Any, ...] | None]:
    """Run a measuring job here; return the files that it left and, where it failed, what `JobFailed` is made of.

    Raises:
        StageError: this machine is not the one that the node was started as.
    """
    if environment.fingerprint() != fingerprint:
        raise StageError(
            "measure", "this node says that it is a machine like the target, and it is not: nothing was measured"
        )
    store = Store(default_root())
    transfer.unpack(parcel, store)
    folder = Path(tempfile.mkdtemp(prefix="measure-", dir=_below(store.root / "jobs")))
    try:
        failed = None
        try:
            worker.call(_moved(job, root, str(store.root)), directory=folder, timeout_s=timeout_s)
        except worker.JobFailed as error:
            failed = (error.stage, str(error).removeprefix(f"{error.stage}: "), error.error, error.log)
        files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        return files, failed
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _below(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _moved(value: Any, root: str, here: str) -> Any:
    """Return a job whose paths into one store are paths into another."""
    if isinstance(value, Mapping):
        return {key: _moved(item, root, here) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_moved(item, root, here) for item in value]
    inside = isinstance(value, str) and value.startswith(f"{root}/")
    return here + value[len(root) :] if inside else value


def _done(order: Order, fetch: Fetch, parcels: Iterable[Parcel], work: Callable[[Build], object]) -> tuple[str, Parcel]:
    if order.version != __version__:
        return f"this node has rdeploy {__version__}, the search runs {order.version}", Parcel()
    said, store = "", RecordingStore(default_root())
    brought = {name for parcel in parcels for name in (*transfer.unpack(parcel, store), *parcel.entries)}
    store.used.clear()
    try:
        known = _Known(order, fetch)
        with _importable(known):
            this = _build_of(known)
            this.steps.store = store
            work(this)
    except RdeployError as error:
        said = str(error)
    shared = Path(order.mark).is_file() and Path(order.root) == store.root
    names = () if shared else [name for name in store.used - brought if name[0] != "model"]
    return said, transfer.pack(store, names)


@dataclass(frozen=True, eq=False)
class _Known:
    """An order, told from others by its key: what was found out for it is kept for its other jobs."""

    order: Order
    fetch: Fetch

    def __hash__(self) -> int:
        return hash(self.order.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Known) and self.order.key == other.order.key


@functools.lru_cache(maxsize=1)
def _build_of(known: _Known) -> Build:
    order, places = known.order, _places(known)

    def here(path: str) -> str:
        return places.get(path, path)

    request = replace(order.request, model=here(order.request.model))
    steps = Steps(target=order.target, store=Store(default_root()), progress=log.info)
    return Build(
        request=request,
        steps=steps,
        model=intake.model_of(request, steps.store),
        calib=_with_paths(order.calib, here),
        judged=_with_paths(order.judged, here),
        graphs_for=order.graphs_for,
    )


@functools.lru_cache(maxsize=1)
def _places(known: _Known) -> Mapping[str, str]:
    """Return where each of the user's files lies here: where it always did if that is the same content, else brought by hash."""
    found = {path: path for path, digest in known.order.inputs if _is_here(path, digest)}
    away = [(path, digest) for path, digest in known.order.inputs if path not in found]
    if not away:
        return found
    folder = default_root() / "inputs" / serde.digest(known.order.inputs)
    if not folder.is_dir():
        contents = known.fetch()
        with atomic_folder(folder) as new:
            for path, digest in away:
                place = new / path.lstrip("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(contents[digest])
    return found | {path: str(folder / path.lstrip("/")) for path, _ in away}


def _is_here(path: str, digest: str) -> bool:
    with contextlib.suppress(OSError):
        return serde.file_sha256(path) == digest
    return False


@contextlib.contextmanager
def _importable(known: _Known) -> Iterator[None]:
    """Let a factory be imported from where its source lies here."""
    order, places, added = known.order, _places(known), []
    for name in filter(_is_factory, (order.request.model, order.request.load.arch or "")):
        top = name.partition(":")[0].partition(".")[0]
        for file in (Path(places.get(path, path)) for path, _ in order.inputs):
            if file.name == f"{top}.py":
                added.append(str(file.parent))
            elif file.name == "__init__.py" and file.parent.name == top:
                added.append(str(file.parents[1]))
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)
