"""A search hands its jobs to Ray: variants are judged and built on any node, and measured on one like this machine, alone there.

Nothing is scheduled here: Ray places the tasks, and gives those of a node that dies to another. What comes back are entries of
the store, so that the search goes on as if it had made them; what no node could make, it makes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rdeploy import environment, node, serde, transfer, worker
from rdeploy.compare import Row
from rdeploy.errors import ConfigError, MissingDependency
from rdeploy.intake import Build
from rdeploy.transfer import Parcel
from rdeploy.types import Variant

INSTALL = "pip install 'rdeploy[scale]'"
RETRIES = 3
_LOOK_S = 5.0
"""How often to look whether a node is left."""


class Crew(Protocol):
    """Who works ahead for a search."""

    @property
    def size(self) -> int:
        """Return how many variants are worth to be begun ahead."""
        ...

    def judge(self, variants: Sequence[Variant], count: int) -> None:
        """Have the variants' FP32 graphs judged on `count` images."""

    def begin(self, variants: Iterable[Variant]) -> None:
        """Begin to build variants; those that were begun before are left alone."""

    def bring(self, variant: Variant) -> None:
        """Wait until a variant's entries are in the store."""


class Alone:
    """Nobody works ahead: the search does everything itself."""

    @property
    def size(self) -> int:
        """Return 0: nothing is begun ahead."""
        return 0

    def judge(self, variants: Sequence[Variant], count: int) -> None:
        """Leave it to the search."""

    def begin(self, variants: Iterable[Variant]) -> None:
        """Leave it to the search."""

    def bring(self, variant: Variant) -> None:
        """Leave it to the search."""


def require(workers: str | None) -> None:
    """Find out early whether there could be a crew.

    Raises:
        MissingDependency: Ray is not installed.
    """
    if workers is not None:
        _ray()


@contextlib.contextmanager
def join(workers: str | None, this: Build, native: Row, outputs: Path | None) -> Iterator[Crew]:
    """Yield the nodes of a Ray cluster as a crew: "4" starts so many workers here, an address joins what runs there.

    Args:
        native: the native model's row; its graph and its `outputs` go to the nodes.

    Raises:
        MissingDependency: Ray is not installed.
        ConfigError: there is no cluster at the address.
    """
    if workers is None:
        yield Alone()
        return
    ray = _ray()
    had_begun = ray.is_initialized()
    if not had_begun:
        _start(ray, workers)
    mark = this.steps.store.root / f".search-{os.getpid()}"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        shared = workers.isdigit() and not had_begun
        crew = RayCrew(ray=ray, this=this, order=node.order_of(this, str(mark)), shared=shared)
        made: list[str | Path] = [native.exported.onnx.path, *([outputs] if outputs else [])]
        crew.common = ray.put(Parcel() if shared else crew.packed(made))
        crew.inputs = [ray.put({} if shared else _contents(crew.order))]
        crew.take_measuring()
        yield crew
    finally:
        mark.unlink(missing_ok=True)
        if not had_begun:
            ray.shutdown()


@dataclass(slots=True, kw_only=True)
class RayCrew:
    """The nodes of a cluster, and what was begun on them."""

    ray: Any
    this: Build
    order: node.Order
    common: Any = None
    inputs: list[Any] = field(default_factory=list)
    shared: bool = False
    """Whether all nodes work in the store of this machine."""
    judged: dict[Variant, Any] = field(default_factory=dict)
    """An FP32 variant -> the parcel of its latest judgement: building starts from its graph."""
    begun: dict[Variant, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Return how many CPUs the cluster has."""
        return int(self.ray.cluster_resources().get("CPU", 1))

    def judge(self, variants: Sequence[Variant], count: int) -> None:
        """Have the variants' FP32 graphs judged on `count` images, all at once."""
        sent = {}
        for variant in variants:
            sent[variant] = self._send("judge", [variant, count], variant)
        for variant, (said, parcel) in sent.items():
            if self._received(f"judged {variant.id} on {count} images", said, parcel):
                self.judged[variant] = parcel

    def begin(self, variants: Iterable[Variant]) -> None:
        """Begin to build variants; those that were begun before are left alone."""
        for variant in variants:
            if variant not in self.begun:
                exact = replace(variant, precision="fp32", quant=None, sample="")
                self.begun[variant] = self._send("prepare", [variant], exact)

    def bring(self, variant: Variant) -> None:
        """Wait until a variant's entries are in the store."""
        self.begin([variant])
        said, parcel = self.begun[variant]
        if said is not None and self._received(f"built {variant.id}", said, parcel):
            self.begun[variant] = (None, None)

    def take_measuring(self) -> None:
        """Have engines measured on the nodes like this machine; where there is none, they are measured here."""
        alive = [one for one in self.ray.nodes() if one["Alive"]]
        same = [one for one in alive if one["Resources"].get(environment.measuring_resource())]
        cpus = min((one["Resources"].get("CPU", 0) for one in same), default=0)
        there = functools.partial(self._measure, cpus=cpus)
        self.this.steps.run_measuring = there if same else self._measure_here
        others = f"{len(same)} of {len(alive)} nodes are machines like this one"
        self.this.steps.progress(f"cluster {others}" + ("" if same else "; measuring is done here"))

    def packed(self, paths: Iterable[str | Path]) -> Parcel:
        """Return the entries that the paths lie in."""
        store = self.this.steps.store
        return transfer.pack(store, {name for path in paths if (name := transfer.name_of(path, store)) is not None})

    def _send(self, what: str, arguments: list[Any], exact: Variant) -> tuple[Any, Any]:
        parcels = [self.judged[exact]] if exact in self.judged else []
        if exact.weights and not self.shared:
            parcels.append(transfer.pack(self.this.steps.store, [("adapt", exact.weights)]))
        task = self.ray.remote(_on_node).options(
            num_returns=2, num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD"
        )
        said, parcel = task.remote(what, self.order, arguments, self.inputs, self.common, *parcels)
        return said, parcel

    def _received(self, what: str, said: Any, parcel: Any) -> bool:
        """Put what a node made into the store; False where it could not be had, and is left to the search."""
        errors = self.ray.exceptions.RayError
        try:
            if not self._wait(parcel, "CPU"):
                raise ConfigError("no node is left")
            reason, where = self.ray.get(said)
            made: Parcel = self.ray.get(parcel)
        except (errors, ConfigError) as error:
            self.this.steps.progress(f"cluster not {what}: {str(error).splitlines()[0]}; done here")
            return False
        transfer.unpack(made, self.this.steps.store)
        self.this.steps.progress(f"cluster {what if not reason else f'not {what}: {reason}'} ({where})")
        return True

    def _wait(self, reference: Any, resource: str) -> bool:
        """Wait for an answer; False once no node that has the resource is alive."""
        while not self.ray.wait([reference], timeout=_LOOK_S)[0]:
            if not any(one["Alive"] and one["Resources"].get(resource) for one in self.ray.nodes()):
                return False
        return True

    def _measure_here(self, job: Mapping[str, Any], *, directory: Path, timeout_s: float) -> Mapping[str, Any]:
        """Run a measuring job on this machine; where it is a node itself, after all that was begun is done.

        Raises:
            JobFailed: as `worker.call`.
        """
        names = [one["NodeManagerHostname"] for one in self.ray.nodes() if one["Alive"]]
        begun = [parcel for _, parcel in self.begun.values() if parcel is not None]
        for parcel in begun if socket.gethostname() in names else ():
            self._wait(parcel, "CPU")
        return worker.call(job, directory=directory, timeout_s=timeout_s)

    def _measure(self, job: Mapping[str, Any], *, cpus: float, directory: Path, timeout_s: float) -> Mapping[str, Any]:
        """Run a measuring job on a node like this machine that does nothing else meanwhile; what it leaves goes here.

        Raises:
            JobFailed: as `worker.call`.
        """
        name = environment.measuring_resource()
        task = self.ray.remote(_measure_on_node).options(num_cpus=cpus, resources={name: 1}, max_retries=RETRIES)
        parcel = Parcel() if self.shared else self.packed(_strings(job))
        answer = task.remote(job, self.order.root, environment.fingerprint(), parcel, timeout_s)
        try:
            if not self._wait(answer, name):
                return self._measure_here(job, directory=directory, timeout_s=timeout_s)
            files, failed, where = self.ray.get(answer)
        except self.ray.exceptions.RayError as error:
            raise worker.JobFailed("measure", str(error).strip().splitlines()[-1], error="crash") from error
        self.this.steps.progress(f"cluster measured {len(job['entries'])} engines ({where})")
        for file, content in files.items():
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            (directory / file).write_bytes(content)
        if failed is not None:
            stage, message, kind, log = failed
            raise worker.JobFailed(stage, message, error=kind, log=log, reproduce=worker.reproduce_command(directory))
        return dict(serde.loads((directory / worker.RESULT_FILE).read_text())["ok"])


def _on_node(
    what: str, order: node.Order, arguments: list[Any], inputs: list[Any], *parcels: Parcel
) -> tuple[tuple[str, str], Parcel]:
    """Run on a node: do a job, and say where."""
    ray = _ray()
    work: Mapping[str, Callable[..., tuple[str, Parcel]]] = {"judge": node.judge, "prepare": node.prepare}
    said, parcel = work[what](order, *arguments, lambda: ray.get(inputs[0]), parcels)
    return (said, _where(ray)), parcel


def _measure_on_node(*job: Any) -> tuple[Mapping[str, bytes], tuple[Any, ...] | None, str]:
    """Run on a node: measure, and say where."""
    files, failed = node.measure(*job)
    return files, failed, _where(_ray())


def _where(ray: Any) -> str:
    return f"node {ray.get_runtime_context().get_node_id()[:6]}"


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in a job: its paths are among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _contents(order: node.Order) -> dict[str, bytes]:
    """Return the user's files by hash, for nodes that do not see them."""
    return {digest: Path(path).read_bytes() for path, digest in order.inputs}


def _start(ray: Any, workers: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if workers.isdigit():
        own = {"num_cpus": int(workers), "resources": {environment.measuring_resource(): 1}, "include_dashboard": False}
        ray.init(address="local", **own, **quiet)
        return
    try:
        ray.init(address=workers, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"workers {workers}: no Ray cluster could be joined there ({reason}); start one with `ray start --head`"
        ) from error


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingDependency("--workers needs Ray, which is not installed", install=INSTALL) from error
    return ray
