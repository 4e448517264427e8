"""A bundle goes in, a callable comes out: images to predictions, on whichever of its engines runs on this machine.

Needs NumPy, Pillow and the engine's own runtime; neither torch nor onnx.
"""

from __future__ import annotations

import collections
import itertools
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from numpy.typing import NDArray

from rdeploy import backends, bundle, hardware, rebuild
from rdeploy.data import images as image_files
from rdeploy.data import preprocess
from rdeploy.errors import ConfigError, MissingDependency, RdeployError, Unsupported
from rdeploy.metrics import detection, segmentation
from rdeploy.types import Size

if TYPE_CHECKING:
    from PIL.Image import Image

ImageLike = Union[str, Path, "Image", NDArray[Any]]

_DYNAMIC_BATCH = 16


def load(path: str | Path, *, backend: str | None = None, threads: int | None = None) -> Model:
    """Open a bundle with the first of its engines that runs here; the manifest lists the best one first.

    A TensorRT engine that was built for another GPU or version is built again from the bundle's graph where the builder is
    here, once; any other engine that cannot run here is passed over. Both are told in a warning. Naming a `backend` takes
    that one or fails.

    Raises:
        ConfigError: not a bundle, a damaged one, or it has no engine of that backend.
        MissingDependency: no engine of the bundle can run on this machine; says why for each.
    """
    folder = bundle.folder_of(path)
    manifest = bundle.read(folder)
    entries = _candidates(manifest, folder, backend)
    reasons: list[str] = []
    for entry in entries:
        name = entry["backend"]
        try:
            file, said = usable(folder, manifest, entry)
            if file is None:
                reasons.append(f"{name}: {said}")
                continue
            session = backends.find(name).open_session(file, threads=threads).__enter__()
        except RdeployError as error:
            if isinstance(error, ConfigError) and bundle.CHANGED in str(error):
                raise  # a damaged bundle is not to be used at all
            reasons.append(f"{name}: {error}")
            continue
        if said or reasons:
            told = [f"using {name}{f' ({said})' if said else ''}"]
            told += [f"passed over {'; '.join(reasons)}"] if reasons else []
            warnings.warn(f"{folder}: {'; '.join(told)}", stacklevel=2)
        return Model(folder, manifest, entry, session)
    raise MissingDependency(f"{folder}: no engine of this bundle runs on this machine ({'; '.join(reasons)})")


def usable(folder: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[Path | None, str | None]:
    """Return the engine file to open for a manifest entry, and what is to be said of it.

    It is the bundle's own, checked; or one built here, with why; or none, with why.

    Raises:
        ConfigError: a file of the bundle was truncated or changed.
        RdeployError: it has to be built again, and the builder refuses.
    """
    reason = cannot_run(entry) if "path" in entry else "not built yet"
    if reason is None:
        return bundle.verified_engine(folder, entry), _other_machine(entry)
    if "path" in entry and not isinstance(reason, backends.Misfit):
        return None, reason  # something is missing here: an engine that is built again would miss it too
    if (why_not := rebuild.why_not(manifest, entry["backend"])) is not None:
        return None, f"{reason} ({why_not})" if hardware.gpus() else reason
    return rebuild.built_here(folder, manifest, entry["backend"]), f"built again on this machine, since: {reason}"


def _other_machine(entry: Mapping[str, Any]) -> str | None:
    """Return in what this machine falls behind the one that an engine was built and measured on, though the engine runs here."""
    built = bundle.engine(entry)
    facts = dict(built.fingerprint)
    if built.built_for:
        driver, here = facts.get("driver"), hardware.driver_version()
        if driver and here and driver != here:
            return f"built with driver {driver}, this is {here}: it may not be as fast as measured"
        return None
    lacking = sorted(set(facts.get("cpu_flags") or ()) - hardware.cpu_flags())
    if not lacking:
        return None
    return f"built on a CPU with {', '.join(lacking)}, which this one lacks: it computes the same, and not as fast as measured"


def cannot_run(entry: Mapping[str, Any]) -> str | None:
    """Return why an engine of a manifest cannot run here (runtime not installed, other hardware), or None."""
    try:
        reason: str | None = backends.find(entry["backend"]).cannot_run(bundle.engine(entry))
    except RdeployError as error:
        return str(error)
    return reason


def _candidates(manifest: Mapping[str, Any], folder: Path, backend: str | None) -> list[Mapping[str, Any]]:
    entries = [*to_be_built(manifest, [backend] if backend else ()), *manifest["engines"]]
    entries = [entry for entry in entries if backend in (None, entry["backend"])]
    if not entries:
        there = ", ".join(entry["backend"] for entry in manifest["engines"]) or "none"
        raise ConfigError(f"{folder}: this bundle has no {backend or 'engine'}; its engines: {there}")
    # An engine that failed verification is used only by whoever asks for it by name.
    good = [entry for entry in entries if backend or (entry.get("verification") or {}).get("passed", True)]
    if not good:
        raise ConfigError(
            f"{folder}: every engine of this bundle failed verification; name a --backend to use it anyway"
        )
    return good


def to_be_built(manifest: Mapping[str, Any], wanted: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return the backends whose engine the bundle leaves to the device; without a GPU, only those asked for by name."""
    built = {entry["backend"] for entry in manifest["engines"]}
    left = [graph["backend"] for graph in manifest.get("graphs") or () if graph["backend"] not in built]
    asked = [name for name in left if name in wanted or (not wanted and hardware.gpus())]
    return [{"backend": name} for name in asked if name in rebuild.BUILDERS]


class Model:
    """An open engine with its preprocessing. Calls may come from several threads; they run one at a time.

    A context manager; `close` (or leaving the block) frees the engine.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any], session: Any) -> None:
        self.folder = folder
        self.manifest = manifest
        self.backend: str = entry["backend"]
        self.labels = bundle.labels(folder)
        self.resolution: Size = (manifest["variant"]["resolution"][0], manifest["variant"]["resolution"][1])
        self.preprocessing = bundle.preprocessing(manifest)
        self.task: str = manifest["model"]["task"]
        self.seen_resolution: Size = bundle.input_size(manifest)
        """The size (h, w) of what goes into the engine: the native one where the engine itself resizes."""
        self._channels = int(manifest["model"].get("channels", 3))
        self._session: Any | None = session
        self._lock = threading.RLock()

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Any:
        """Run images through the network.

        Args:
            images: a path, a PIL image, an array (H, W, C) or (N, H, W, C), uint8 or float in 0..1, or a list of these.

        Returns:
            the output array with N first (N is 1 for a single image), or name -> array where there are several outputs.

        Raises:
            ConfigError: an image cannot be read, or an array is not an image.
        """
        singles = _singles(images)
        if len(singles) <= self._piece():
            pieces = [self.run(batch) for batch in self._prepared(singles)]
        else:
            pieces = list(self.stream(singles))
        outputs = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))

    def stream(self, images: Iterable[ImageLike]) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield the outputs of many images by name, batch by batch, in order; the images are taken as they are needed.

        On TensorRT a batch is prepared and copied in while the one before it computes. Until the last is taken the model is
        busy: call it for nothing else meanwhile.
        """
        pieces = self._prepared(images)
        stream = getattr(self._open(), "stream", None)
        if stream is None:
            yield from map(self.run, pieces)
            return
        counts: collections.deque[int] = collections.deque()

        def fed() -> Iterator[dict[str, NDArray[Any]]]:
            for batch in pieces:
                counts.append(len(batch))
                yield self._feed(batch)

        with self._lock:
            for outputs in stream(fed()):
                yield _first_rows(outputs, counts.popleft())

    def top(self, image: ImageLike, k: int = 5) -> list[tuple[int, str, float]]:
        """Return the `k` most probable classes of one image: (index, label, probability), best first.

        Raises:
            Unsupported: the network is not a classifier.
        """
        logits = self(image)
        if self.task != "classification" or not isinstance(logits, np.ndarray) or logits.ndim != 2:
            raise Unsupported(f"{self.folder}: top-k needs a classifier's output (N, classes); call the model instead")
        probabilities = softmax(logits)[0]
        best = np.argsort(-probabilities, kind="stable")[: max(k, 0)]
        return [(int(i), self.label(int(i)), float(probabilities[i])) for i in best]

    def segment(self, image: ImageLike) -> NDArray[np.int16]:
        """Return the class of each pixel of one image at its own size, (H, W); -1 for what a centre crop cut off.

        Raises:
            Unsupported: the network does not segment.
        """
        picture = read_image(image) if isinstance(image, (str, Path)) else image
        scores = self.first(self(picture))
        if self.task != "segmentation" or scores.ndim != 4:
            raise Unsupported(f"{self.folder}: the network is for {self.task}: it has no class for each pixel")
        size = _size_of(picture)
        found, seen = segmentation.on_mask(
            scores[0], size, preprocess.view(size, self.seen_resolution, self.preprocessing)
        )
        classes = np.full(size, -1, np.int16)
        classes[seen] = found
        return classes

    def detect(self, image: ImageLike, *, least: float = detection.SHOWN_FROM) -> NDArray[np.float32]:
        """Return the detections of one image, (M, 6): left, top, right, bottom in its own pixels, score, class.

        Raises:
            Unsupported: the network is no detector.
        """
        if self.task != "detection":
            raise Unsupported(f"{self.folder}: the network is for {self.task}: it finds no boxes")
        picture = read_image(image) if isinstance(image, (str, Path)) else image
        outputs = self(picture)
        named = outputs if isinstance(outputs, dict) else {"output": outputs}
        native = self.manifest["model"]["native_resolution"]
        frame, size = (int(native[0]), int(native[1])), _size_of(picture)
        (found,) = detection.decode(list(named.values()), tuple(named), frame)
        view = preprocess.view(size, self.seen_resolution, self.preprocessing)
        return detection.to_image(found[found[:, 4] >= least], frame, view)

    @staticmethod
    def first(outputs: Any) -> NDArray[Any]:
        """Return the first output of what a call returned."""
        found: NDArray[Any] = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs
        return found

    def batches(self, images: ImageLike | Sequence[ImageLike]) -> Iterator[NDArray[Any]]:
        """Yield the engine's input in pieces of at most its batch size: float32 (N, C, H, W), or uint8 (N, H, W, C)."""
        return self._prepared(_singles(images))

    def _prepared(self, singles: Iterable[ImageLike]) -> Iterator[NDArray[Any]]:
        takes_pixels, size = self._open().inputs[0].takes_pixels, self._piece()
        left = iter(singles)
        while pixels := [self._pixels(image) for image in itertools.islice(left, size)]:
            stacked = np.stack(pixels)
            yield stacked if takes_pixels else preprocess.normalise(stacked, self.preprocessing)

    def run(self, batch: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Run one batch, as `batches` yields them; one shorter than the engine's is padded and cut again."""
        with self._lock:
            outputs = self._open().run(self._feed(batch))
        return _first_rows(outputs, len(batch))

    def _feed(self, batch: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return what the session takes for a batch, which is filled up to the engine's own size."""
        missing = (self._batch_size() or len(batch)) - len(batch)
        if missing > 0:
            batch = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
        return {self._open().inputs[0].name: batch}

    def close(self) -> None:
        """Free the engine; the model cannot be called afterwards. Closing twice does nothing."""
        with self._lock:
            session, self._session = self._session, None
            if session is not None:
                session.__exit__(None, None, None)

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Any:
        if self._session is None:
            raise ConfigError(f"{self.folder}: this model was closed; load the bundle again")
        return self._session

    def _batch_size(self) -> int | None:
        """Return the engine's batch size, or None where it is dynamic."""
        size: int = self._open().inputs[0].shape[0]
        return size if size > 0 else None

    def _piece(self) -> int:
        """Return how many images go into one batch; TensorRT takes no more of a dynamic one than it was built for."""
        if (size := self._batch_size()) is not None:
            return size
        built_for = (self.manifest.get("build") or {}).get("batch_sizes") or [_DYNAMIC_BATCH]
        return min(_DYNAMIC_BATCH, max(built_for)) if self.backend in rebuild.BUILDERS else _DYNAMIC_BATCH

    def _pixels(self, image: ImageLike) -> NDArray[np.uint8]:
        opened = read_image(image) if isinstance(image, (str, Path)) else image
        return preprocess.to_pixels(opened, self.seen_resolution, self.preprocessing, channels=self._channels)

    def label(self, index: int) -> str:
        """Return the name of a class, its number where the bundle has no names."""
        return self.labels[index] if index < len(self.labels) else str(index)


def _first_rows(outputs: Mapping[str, Any], count: int) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(array)[:count] for name, array in outputs.items()}


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return probabilities along the last axis; an output that already is a distribution is left as it is."""
    values = np.asarray(logits, dtype=np.float64)
    if values.size and values.min() >= 0 and np.allclose(values.sum(axis=-1), 1.0, atol=1e-3):
        return values
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def read_image(path: str | Path) -> Image:
    """Decode one image file, as the evaluation of a whole folder does.

    Raises:
        ConfigError: it is not there, not an image, damaged, or too large to be opened safely.
    """
    single = image_files.ImageSet(paths=(str(path),), labels=None, class_names=(), sha256="")
    opened: Image = single.read(0)
    return opened


def _size_of(image: Any) -> Size:
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
    return int(height), int(width)


def _singles(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    if isinstance(images, np.ndarray):
        if images.ndim not in (2, 3, 4):
            raise ConfigError(f"an array of images has the shape (H, W, C) or (N, H, W, C), not {images.shape}")
        found: list[ImageLike] = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        found = [single for image in images for single in _singles(image)]
    else:
        found = [images]
    if not found:
        raise ConfigError("no images: give at least one path, PIL image or array")
    return found
