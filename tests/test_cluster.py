"""What a search says of clusters, and what a node does with an order; the cluster itself runs in tests/e2e/test_scale_out.py."""

import builtins
import hashlib
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from rdeploy import cluster, environment, node
from rdeploy.build_request import BuildRequest, LoadOptions
from rdeploy.data.images import ImageSet
from rdeploy.errors import ConfigError, MissingDependency, StageError
from rdeploy.intake import Build
from rdeploy.search_request import search_request
from rdeploy.steps import Steps
from rdeploy.store import Store
from rdeploy.transfer import Parcel
from rdeploy.types import Target


@pytest.mark.parametrize("workers", [1, 4, "2", "auto", "ray://head:10001", "10.0.0.7:6379"])
def test_workers_are_a_number_or_an_address(workers, tmp_path):
    request = search_request("timm:resnet18", {"workers": workers, "out": str(tmp_path), "fp32": True})

    assert request.workers == str(workers)


@pytest.mark.parametrize("workers", [0, -1, 5000, "http://head", "ray://", "four"])
def test_other_workers_are_refused_with_what_can_be_given(workers, tmp_path):
    with pytest.raises(
        ConfigError, match=r"workers .*: give how many to start here \(1 to 1024\), or .* ray://HOST:10001"
    ):
        search_request("timm:resnet18", {"workers": workers, "out": str(tmp_path), "fp32": True})


def test_without_ray_the_command_that_installs_it_is_said(monkeypatch):
    original = builtins.__import__

    def refuse(name, *rest, **more):
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)

    with pytest.raises(MissingDependency, match=r"--workers needs Ray.*pip install 'rdeploy\[scale\]'"):
        cluster._ray()


def test_a_node_that_is_another_machine_measures_nothing():
    with pytest.raises(StageError, match="this node says that it is a machine like the target, and it is not"):
        node.measure({"job": "measure"}, "/store", "another", Parcel(), 1.0)


def test_the_resource_of_a_machine_has_its_fingerprint():
    assert environment.measuring_resource() == f"rdeploy-measure-{environment.fingerprint()}"


def test_paths_into_the_searching_machines_store_become_paths_into_the_nodes():
    job = {"entries": [{"path": "/a/cache/engine/k/m.onnx", "backend": "openvino"}], "seed": 3, "root": "/a/cachet"}

    moved = node._moved(job, "/a/cache", "/b")

    assert moved == {"entries": [{"path": "/b/engine/k/m.onnx", "backend": "openvino"}], "seed": 3, "root": "/a/cachet"}


def test_alone_nothing_is_begun():
    with cluster.join(None, None, None, None) as crew:
        crew.judge([], 48)
        crew.begin([])

        assert crew.size == 0


class FakeRay:
    """A cluster of nodes without the resource to measure; it notes what is waited for."""

    def __init__(self, *hosts):
        self.hosts, self.waited = hosts, []

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 2}, "NodeManagerHostname": host} for host in self.hosts]

    def wait(self, references, timeout):
        self.waited += references
        return references, []


@pytest.mark.parametrize(("hosts", "waited"), [(("head", socket.gethostname()), ["a"]), (("head", "other"), [])])
def test_a_searching_machine_that_is_a_node_measures_when_nothing_is_built(hosts, waited, tmp_path, monkeypatch):
    ray, steps = FakeRay(*hosts), Steps(target=Target(name="cpu"), store=Store(tmp_path), progress=lambda said: None)
    crew = cluster.RayCrew(ray=ray, this=SimpleNamespace(steps=steps), order=None)
    crew.begun = {"begun": ("said", "a"), "brought": (None, None)}
    monkeypatch.setattr(cluster.worker, "call", lambda job, **_: {"done": job, "after": list(ray.waited)})

    crew.take_measuring()

    assert steps.run_measuring("job", directory=tmp_path, timeout_s=1.0) == {"done": "job", "after": waited}


def test_an_order_names_the_users_files_by_absolute_paths_and_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("net.pt", "a.png", "made_up_factory.py"):
        (tmp_path / name).write_text(name)
    images = ImageSet(paths=("a.png",), labels=None, class_names=(), sha256="s")
    request = BuildRequest(model="net.pt", load=LoadOptions(arch="made_up_factory:net"))
    this = Build(
        request=request, steps=Steps(target=Target(name="cpu"), store=Store(tmp_path / "cache"), progress=print), model=None,
        calib=images, judged=images,
    )  # fmt: skip

    order = node.order_of(this, "mark")

    assert order.request.model == str(tmp_path / "net.pt")
    assert order.judged.paths == (str(tmp_path / "a.png"),)
    assert dict(order.inputs) == {
        str(tmp_path / name): hashlib.sha256(name.encode()).hexdigest()
        for name in ("net.pt", "a.png", "made_up_factory.py")
    }


def test_files_that_a_node_does_not_see_are_brought_by_hash_and_others_are_used_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("RDEPLOY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here.png").write_bytes(b"here")
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("here", "away")}
    paths = str(tmp_path / "here.png"), "/not/on/this/machine/away.png"
    images = ImageSet(paths=paths, labels=None, class_names=(), sha256="s")
    order = node.Order(
        request=BuildRequest(model="timm:x"), target=Target(name="cpu"), calib=images, judged=images, graphs_for=(),
        inputs=tuple(zip(paths, digests.values())), root="", mark="",
    )  # fmt: skip

    places = node._places(node._Known(order, lambda: {digests["away"]: b"away"}))

    assert places[paths[0]] == paths[0]
    assert Path(places[paths[1]]).read_bytes() == b"away"
