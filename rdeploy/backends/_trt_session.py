"""Run an engine of either TensorRT: host arrays in, host arrays out, on streams with pinned buffers and CUDA graphs."""

from __future__ import annotations

import collections
import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from rdeploy import environment, hardware, store
from rdeploy.backends import _cuda, _engine, _trt, _trt_lane, _trt_opening, _trt_weights
from rdeploy.errors import ConfigError, MissingDependency, StageError
from rdeploy.types import Engine, TensorInfo

_LANES = 2


def cannot_run(
    engine: Engine, *, title: str, version: str, lean: Callable[[str], bool] = lambda version: False
) -> str | None:
    """Return why an engine of a TensorRT of this version does not run on this machine, or None.

    `lean` tells whether the lean runtime of another version is here and loads.
    """
    gpus = hardware.gpus()
    if not gpus:
        return _no_gpu(f"a {title} engine for {', '.join(engine.built_for)}")
    gpu, facts = gpus[0].compute_capability, dict(engine.fingerprint)
    machine = facts.get("machine", environment.machine())
    if not (_runs_on(engine, gpu) and machine == environment.machine() and _loads(engine, version, lean)):
        built = f"{', '.join(engine.built_for) or 'another GPU'} / {title} {engine.backend_version}"
        here = f"{gpu} / {version}"
        if machine != environment.machine():
            built, here = f"{built} / {machine}", f"{here} / {environment.machine()}"
        return _engine.Misfit(f"built for {built}, this is {here}: build it again on this machine")
    return _cuda.missing()


def _runs_on(engine: Engine, gpu: str) -> bool:
    """Whether the GPU is one that it was built for; `sm_80+` is every desktop and server GPU from there on."""
    if not engine.built_for or gpu in engine.built_for:
        return True
    least = [int(m[1]) for name in engine.built_for if (m := re.fullmatch(r"sm_(\d+)\+", name))]
    return bool(least) and int(gpu.removeprefix("sm_")) >= min(least) and hardware.jetson_model() is None


def _loads(engine: Engine, version: str, lean: Callable[[str], bool]) -> bool:
    """Whether this version loads it: the same, or a later one of the same major where it was built to allow that.

    A later one runs it with the lean runtime of the version that built it, which it brings along, or which is here.
    """
    if engine.backend_version == version:
        return True
    built, here = (_numbers(text) for text in (engine.backend_version, version))
    facts = dict(engine.fingerprint)
    if not facts.get("version_compatible") or built[:1] != here[:1] or here < built:
        return False
    return bool(facts.get("lean_runtime")) or lean(engine.backend_version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _no_gpu(what: str) -> str:
    return f"running {what} needs an NVIDIA GPU and its driver, and there is none here"


class Session:
    """An engine with one lane for `run` and two for `stream`. `flavour` and `runtime` are loaded when it is entered."""

    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    device_clock = ""

    def __init__(
        self,
        path: Path,
        *,
        flavour: Callable[[], _trt.Flavour],
        runtime: Callable[[], Any] = _cuda.load,
        use_graphs: bool = True,
    ) -> None:
        self._path, self._load_flavour, self._load_runtime = path, flavour, runtime
        self._use_graphs = use_graphs
        self._stack = contextlib.ExitStack()
        self._lanes: list[_trt_lane.Lane] = []
        self._runtimes: tuple[Any, ...] = ()

    def __enter__(self) -> Session:
        with contextlib.ExitStack() as stack:
            self._flavour = self._load_flavour()
            self._logger = _trt.logger_of(self._flavour)
            self._logger.recent.clear()
            self.engine = self._deserialize()
            _trt_weights.put_back(self._flavour.trt, self._logger, self.engine, self._path)
            stack.callback(self._forget)
            self._kernels = _KernelCache(self._flavour, self.engine, self._path)
            self._cuda = _cuda.Cuda(self._load_runtime())
            stack.callback(self._lanes.clear)
            self._tensor_infos = self._tensors()
            self._open_lane(stack)
            self._stack = stack.pop_all()
        self.inputs, self.outputs = self._tensor_infos
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inputs = self.outputs = ()
        self._kernels.save()
        # The order matters to TensorRT: what was made last goes first.
        self._stack.close()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        _engine.check_inputs(self.inputs, inputs)
        self._lanes[0].submit(inputs)
        return self._lanes[0].collect()

    def time_device(self) -> None:
        """Have the GPU's clock run along with `run`: `device_ms` is what the last one took there."""
        self._lanes[0].time_device()
        self.device_clock = "CUDA events on the stream, around the copies in, the network and the copies out"

    @property
    def device_ms(self) -> float:
        return self._lanes[0].device_ms

    def transfers_ms(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """Return what copying a batch in and its outputs out takes: {"upload": ..., "download": ...}."""
        return self._lanes[0].transfers_ms(inputs)

    @property
    def title(self) -> str:
        """Which TensorRT this is."""
        return self._flavour.title

    def profile_layers(self) -> dict[str, float]:
        """Have TensorRT's profiler on from now on, and return what it fills: layer -> milliseconds of all runs."""
        spent: dict[str, float] = {}

        class Profiler(self._flavour.trt.IProfiler):  # type: ignore[name-defined, misc]
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                spent[layer_name] = spent.get(layer_name, 0.0) + ms

        self._lanes[0].attach(Profiler())
        return spent

    def stream(self, batches: Iterable[Mapping[str, NDArray[Any]]]) -> Iterator[dict[str, NDArray[Any]]]:
        """Run many batches, outputs in the order of the batches: while one computes, the next is copied in.

        Each lane has a stream, buffers and activation memory of its own, so this takes twice the memory of `run`; where that is
        not there, or where an engine of TensorRT 8.x was not built to share a profile, there is one lane.
        """
        most = _LANES if self._can_share() else 1
        busy: collections.deque[_trt_lane.Lane] = collections.deque()
        free = collections.deque(self._lanes)
        try:
            for batch in batches:
                _engine.check_inputs(self.inputs, batch)
                if not free and len(self._lanes) < most:  # a stream of one batch needs no second lane
                    free += self._further_lane()
                    most = len(self._lanes)
                if not free:
                    free.append(busy.popleft())
                    yield free[-1].collect()
                free[0].submit(batch)
                busy.append(free.popleft())
            while busy:
                yield busy.popleft().collect()
        finally:
            for lane in busy:  # the caller stopped in between
                lane.collect()

    def _open_lane(self, stack: contextlib.ExitStack) -> None:
        context = self._kernels.context()
        if context is None:
            reason = _trt.last_error(self._logger.recent)
            raise StageError("run", f"no memory or no kernel for {self._path}: {reason}")
        where = f"{self._flavour.title}, {self._path}"
        lane = _trt_lane.Lane(context, self._cuda, where=where, logger=self._logger, use_graphs=self._use_graphs)
        self._lanes.append(stack.enter_context(lane.open(*self._tensor_infos)))

    def _further_lane(self) -> list[_trt_lane.Lane]:
        """Return another lane, or none where there is no memory for it."""
        try:
            self._open_lane(self._stack)
        except StageError:
            return []
        return self._lanes[-1:]

    def _can_share(self) -> bool:
        """Whether two contexts can run at once: before TensorRT 10 a profile of a dynamic shape is for one of them alone."""
        is_static = all(-1 not in info.shape for info in self.inputs)
        return is_static or not _trt.is_weakly_typed(self._flavour.trt) or self._opening.shares_profiles

    def _forget(self) -> None:
        self.engine = None
        self._runtimes = ()

    def _deserialize(self) -> Any:
        """Return the engine; say apart whether the file, the version or the missing driver is to blame."""
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read the engine {self._path}: {error.strerror}") from error
        title = self._flavour.title
        if content:
            self._runtimes = self._make_runtimes(content)
            engine = self._runtimes[-1].deserialize_cuda_engine(content)
            if engine is not None:
                return engine
        lines = self._logger.recent
        errors = [message for severity, message in lines if severity <= 1]
        if not content or any("Serialization" in message for message in errors):
            raise ConfigError(f"{self._path} is damaged, or no engine of this {title}: build it again")
        if any("engine_host_code_allowed" in message or "HostCode" in message for message in errors):
            raise ConfigError(
                f"{self._path} brings host code that runs when it is opened; {_trt_opening.TRUST}=1 allows it"
            )
        if not hardware.gpus():
            raise MissingDependency(_no_gpu(f"a {title} engine"))
        raise ConfigError(f"{title} cannot load {self._path}: {_trt.last_error(lines)}")

    def _make_runtimes(self, content: bytes) -> tuple[Any, ...]:
        if _trt.is_weakly_typed(self._flavour.trt) and not hardware.gpus():
            raise MissingDependency(_no_gpu(f"a {self._flavour.title} engine"))  # 8.x crashes without a driver
        opening = self._opening = _trt_opening.of(self._path)
        trusted = _trt_opening.is_trusted(opening, content)
        made = _trt_opening.runtimes(self._flavour.trt, self._logger, opening, trusted=trusted)
        if made[-1] is None:
            what = f"the lean runtime of {self._flavour.title} {opening.lean_version}"
            raise ConfigError(f"{self._path}: {what}, which opens it, is not here or does not load: build it again")
        return made

    def _tensors(self) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        found: tuple[list[TensorInfo], list[TensorInfo]] = ([], [])
        for index in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(index)
            dtype, shape = self.engine.get_tensor_dtype(name), self.engine.get_tensor_shape(name)
            is_output = self.engine.get_tensor_mode(name) == self._flavour.trt.TensorIOMode.OUTPUT
            found[is_output].append(_trt.tensor_info(self._flavour, name, dtype, shape))
        return tuple(found[0]), tuple(found[1])


class _KernelCache:
    """TensorRT-RTX compiles kernels for the GPU when an engine is first opened there; this keeps them for the next time."""

    def __init__(self, flavour: _trt.Flavour, engine: Any, path: Path) -> None:
        self._engine = engine
        self._config = self._cache = None
        if not hasattr(flavour.trt, "IRuntimeCache"):
            return
        gpu = "".join(gpu.compute_capability for gpu in hardware.gpus()[:1])
        name = f"{_engine.engine_sha256(path)[:32]}-{flavour.trt.__version__}-{gpu}.cache"
        self._file = store.default_root() / "kernels" / name
        self._config = engine.create_runtime_config()
        self._cache = self._config.create_runtime_cache()
        if self._file.is_file():
            self._cache.deserialize(self._file.read_bytes())
        self._config.set_runtime_cache(self._cache)

    def context(self) -> Any:
        """Return a new execution context that compiles into the cache, or None."""
        if self._config is None:
            return self._engine.create_execution_context()
        return self._engine.create_execution_context(self._config)

    def save(self) -> None:
        """Write what was compiled since; a place that cannot be written to costs time the next time, nothing else."""
        if self._cache is None:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_name(f".partial-{os.getpid()}-{self._file.name}")
            partial.write_bytes(bytes(self._cache.serialize()))
            partial.replace(self._file)
