"""`rdeploy optimize --workers` on a local Ray cluster of nodes with stores of their own: one of them dies in the middle."""

import json
import os
import subprocess
import sys
import time

import pytest

from .conftest import ROOT, Workplace

ray_utils = pytest.importorskip("ray.cluster_utils", reason="no Ray here: pip install 'rdeploy[scale]'")

SEARCH = """\
import sys
import rdeploy

rdeploy.optimize(
    "digits.pt", arch="digits_model:digits_net", calib="images", calib_samples=40, data="images", target="quick.yaml",
    at="input", resolution=[16], fp32=True, int8=True, backend="onnxruntime", recipe="fast", out="run",
    workers=sys.argv[1], progress=lambda text: print(text, flush=True),
)
"""


@pytest.fixture
def nodes(tmp_path):
    """A cluster of two nodes with stores of their own; only the first is started as a machine like this one."""
    from rdeploy import environment

    def own(name):
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return {"num_cpus": 1, "env_vars": {"RDEPLOY_CACHE": str(tmp_path / name), "PYTHONPATH": paths}}

    like_this = {environment.measuring_resource(): 1}
    head = {**own("first"), "resources": like_this, "include_dashboard": False}
    started = ray_utils.Cluster(initialize_head=True, head_node_args=head)
    second = started.add_node(**own("second"))
    yield started, (started.head_node, second)
    started.shutdown()


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_loses_nothing_and_only_its_like_measures(trained, nodes, tmp_path):
    cluster, (first, second) = nodes
    workplace = Workplace(tmp_path / "w")
    _copy(trained, workplace.folder)
    log = tmp_path / "search.log"
    with log.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, "-c", SEARCH, cluster.address],
            cwd=workplace.folder, env=workplace.environment(), stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        busy = _wait_for(lambda: _works(tmp_path / "second") or child.poll() is not None)
        still_searching = child.poll() is None
        cluster.remove_node(second, allow_graceful=False)
        code = child.wait(600)
    said = log.read_text()

    assert busy, "the node that was to die had begun nothing"
    assert still_searching
    assert code == 0, said[-3000:]
    outcome = json.loads((workplace.folder / "run" / "outcome.json").read_text())
    assert outcome["failures"] == {}
    assert outcome["pick"]
    assert "done here" not in said
    built = [line for line in said.splitlines() if line.startswith("cluster built")]
    measured = [line for line in said.splitlines() if line.startswith("cluster measured")]
    assert built
    assert measured
    assert all(first.node_id[:6] in line for line in measured), measured


def _works(store) -> bool:
    """Whether a node is building or quantizing now: a step that has begun and not ended."""
    jobs = store / "jobs"
    partial = [path for kind in ("export", "quantize", "engine") for path in store.glob(f"{kind}/.partial-*")]
    return bool(partial) or (jobs.is_dir() and any(jobs.iterdir()))


def _wait_for(ready) -> bool:
    """Return whether it was so within five minutes."""
    deadline = time.monotonic() + 300
    while not (found := ready()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(found)


def _copy(source, target) -> None:
    import shutil

    few = [name for index, name in enumerate(sorted(path.name for path in source.rglob("*.png"))) if index % 5]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*few))
