"""Memory as the kernel tells it, against known allocations and made-up control groups."""

import subprocess
import sys
from pathlib import Path

import pytest

from rdeploy import memory, nvml

ROOT = Path(__file__).resolve().parents[1]
MB = 1_000_000
linux = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")

ALLOCATE = """
import numpy as np
from rdeploy import memory
before = memory.rss_bytes()
reset = memory.reset_peak()
private = memory.private_bytes()
block = np.ones(200_000_000, np.uint8)
during, peak, private = memory.rss_bytes(), memory.peak_bytes(), memory.private_bytes() - private
del block
after, kept = memory.rss_bytes(), memory.peak_bytes()
again = memory.reset_peak()
print(before, during, peak, after, kept, memory.peak_bytes(), int(reset and again), private)
"""


@linux
def test_a_known_allocation_is_seen_while_it_lives_and_in_the_peak():
    done = subprocess.run([sys.executable, "-c", ALLOCATE], cwd=ROOT, capture_output=True, text=True, check=True)
    before, during, peak, after, kept, cleared, reset, private = (int(word) for word in done.stdout.split())

    assert during - before == pytest.approx(200 * MB, rel=0.03)
    assert peak - before == pytest.approx(200 * MB, rel=0.03)
    assert private == pytest.approx(200 * MB, rel=0.03)
    assert after - before == pytest.approx(0, abs=6 * MB)
    assert kept == pytest.approx(peak, rel=0.01)
    if reset:
        assert cleared - before == pytest.approx(0, abs=6 * MB)
    else:
        assert cleared == pytest.approx(kept, rel=0.01)


def test_what_the_system_does_not_tell_is_none(tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t    1024 kB\n")

    assert memory.rss_bytes(tmp_path / "status") == 1024 * 1024
    assert memory.peak_bytes(tmp_path / "status") is None
    assert memory.rss_bytes(tmp_path / "none") is None
    assert memory.reset_peak(tmp_path / "none" / "clear_refs") is False


def usage(**given):
    values = {"before_open": 40, "after_open": 100, "peak_open": 180, "peak_run": 150, "peak_was_reset": True}
    return memory.Usage(**{**values, **given})


def test_the_parts_add_up_to_the_peak_of_the_runs():
    found = memory.split(usage(), weights=50, activations=20)

    assert (found.weights, found.activations, found.workspace) == (50, 20, 150 - 40 - 50 - 20)
    assert found.process_peak == 180
    assert dict(found.method)["workspace"].startswith("residual: peak of the runs - ")


def test_a_negative_residual_is_zero_and_says_so():
    found = memory.split(usage(peak_run=90), weights=50, activations=20)

    assert found.workspace == 0
    assert dict(found.method)["workspace"].endswith("negative, shown as 0")


def test_a_peak_that_was_not_reset_says_so():
    found = memory.split(usage(peak_was_reset=False), weights=1, activations=1)

    assert "peak since the start (the kernel does not reset it)" in dict(found.method)["workspace"]


@pytest.mark.parametrize("gap", [{"weights": None}, {"activations": None}])
def test_a_missing_term_leaves_the_residual_unknown(gap):
    found = memory.split(usage(), **{"weights": 1, "activations": 1, **gap})

    assert found.workspace is None
    assert dict(found.method)["workspace"] == "unknown: a term of the residual is missing"


def test_without_any_reading_nothing_is_claimed():
    found = memory.split(usage(before_open=None, peak_open=None, peak_run=None), weights=1, activations=1)

    assert (found.workspace, found.process_peak) == (None, None)


def test_the_runtime_is_an_account_of_its_own():
    found = memory.split(usage(runtime=55), weights=50, activations=20, build_peak=300)

    assert (found.context, found.workspace, found.build_peak) == (15, 150 - 40 - 50 - 20 - 15, 300)
    assert dict(found.method)["workspace"].endswith(" - context")
    assert dict(found.method)["build_peak"] == "VmHWM of the process that built the engine"
    assert set(dict(found.method)) == set(memory.Memory.__slots__) - {"method"}


@pytest.mark.parametrize(
    ("peak", "limit", "said"),
    [
        (1_900_000_000, 2_000_000_000, "its peak of 1900 MB is near the control group's limit of 2000 MB"),
        (1_700_000_000, 2_000_000_000, None),
        (1_700_000_000, None, None),
        (None, 2_000_000_000, None),
    ],
)
def test_a_process_near_its_limit_is_said(peak, limit, said):
    account = memory.Memory(weights=None, activations=None, workspace=None, process_peak=peak, limit=limit)

    assert memory.near_limit(account) == said


def test_private_pages_are_summed(tmp_path):
    (tmp_path / "smaps").write_text("Rss: 90 kB\nPrivate_Clean:  3 kB\nPrivate_Dirty:  4 kB\nPrivate_Hugetlb: 9 kB\n")

    assert memory.private_bytes(tmp_path / "smaps") == 7 * 1024
    assert memory.private_bytes(tmp_path / "none") is None


def test_the_highest_of_what_was_seen_is_kept():
    readings = iter([5, None, 9, 7])

    with memory.Peak(lambda: next(readings), every_s=60.0) as peak:
        for _ in range(3):
            peak.look()

    assert peak.bytes == 9


class Gpu:
    def __init__(self, used, own=None):
        self.used, self.own = used, own

    def state(self):
        return nvml.GpuState(memory_used_bytes=self.used)

    def used_by_bytes(self, pid):
        return self.own


def test_gpu_memory_is_the_processs_own_or_the_growth(tmp_path):
    gpu = Gpu(used=100)
    device = memory.DeviceMemory(gpu, root=tmp_path)

    gpu.used = 140
    assert device.read() == 40
    gpu.own = 33
    assert device.read() == 33
    assert device.method.startswith("NVML: this process")


def test_without_a_gpu_there_is_no_gpu_memory_and_why_is_said(tmp_path):
    device = memory.DeviceMemory(None, root=tmp_path)

    assert device.read() is None
    assert device.method == "no GPU, or no NVML to ask"


def test_without_nvml_the_free_memory_tells(tmp_path):
    free = iter([1000, 700, 800])
    device = memory.DeviceMemory(None, free=lambda: next(free), root=tmp_path)

    assert [device.read() for _ in range(3)] == [0, 300, 200]
    assert device.method == "cudaMemGetInfo: what became less free since the context was made"


def test_a_jetsons_gpu_takes_from_the_hosts_memory(tmp_path):
    model, clients = tmp_path / "proc/device-tree/model", tmp_path / "sys/kernel/debug/nvmap/iovmm/clients"
    model.parent.mkdir(parents=True)
    model.write_text("NVIDIA Jetson Orin Nano\0")
    assert memory.DeviceMemory(None, root=tmp_path, pid=7).read() is None
    assert memory.DeviceMemory(None, root=tmp_path, pid=7).method == f"only root may read {clients}"

    clients.parent.mkdir(parents=True)
    clients.write_text(
        "CLIENT PROCESS PID SIZE\nuser python3 7 2048K\nuser Xorg 8 100K\nuser python3 7 1K\ntotal 2149K\n"
    )
    device = memory.DeviceMemory(None, root=tmp_path, pid=7)

    assert device.read() == 2049 * 1024
    assert device.method == "nvmap: the GPU's share of the host's memory"


def groups(tmp_path, own, files):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(own)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return memory.limit_bytes(proc=tmp_path / "proc", cgroups=tmp_path / "cgroup")


def test_the_tightest_limit_of_the_groups_above_counts(tmp_path):
    files = {"memory.max": "9000\n", "a/memory.max": "5000\n", "a/b/memory.max": "max\n"}

    assert groups(tmp_path, "0::/a/b\n", files) == (5000, str(tmp_path / "cgroup/a/memory.max"))


def test_in_a_container_the_root_holds_the_limit(tmp_path):
    found = groups(tmp_path, "0::/system.slice/docker-1.scope\n", {"memory.max": "7000\n"})

    assert found == (7000, str(tmp_path / "cgroup/memory.max"))


def test_cgroup_v1_has_its_own_file(tmp_path):
    files = {"memory/x/memory.limit_in_bytes": "4096\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"}

    found = groups(tmp_path, "5:cpu:/\n4:memory,hugetlb:/x\n0::/\n", files)

    assert found == (4096, str(tmp_path / "cgroup/memory/x/memory.limit_in_bytes"))


def test_no_limit_is_none(tmp_path):
    assert groups(tmp_path, "4:memory:/\n0::/\n", {"memory.max": "max\n"}) is None
    assert memory.limit_bytes(proc=tmp_path / "none") is None
