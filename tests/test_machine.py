"""Whether a machine was fit to measure on, read from made-up machines before and after."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rdeploy import hardware, jetson, machine, nvml

OWN = 100


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return `here(moment, files) -> Snapshot` of a machine with two CPUs that this process may use."""
    monkeypatch.setattr(machine, "_cpus", lambda: frozenset({0, 1}))

    def at(moment, files):
        root = tmp_path / moment
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return machine.snapshot(root)

    at.root = tmp_path / "after"
    return at


def stat(busy, idle, *, steal=0):
    """CPU 0 and 1 share what was given; CPU 2 is another container's."""
    half = f"{busy // 2} 0 0 {idle // 2} 0 0 0 {steal // 2} 0 0"
    return f"cpu  1 1 1 1\ncpu0 {half}\ncpu1 {half}\ncpu2 999999 0 0 0 0 0 0 0 0 0\n"


def process(name, parent, ticks, waited=0):
    return f"1 ({name}) S {parent} 1 1 0 -1 0 0 0 0 0 {ticks} 0 {waited} 0 20 0 1 0 0\n"


IDLE = {
    "proc/loadavg": "3.10 2.00 1.00 1/100 4242\n",
    "proc/stat": stat(1000, 1000),
    f"proc/{OWN}/stat": process("python3", 1, 50),
    "proc/101/stat": process("engine", OWN, 100),
    "proc/200/stat": process("cc1plus (x) y", 1, 500),
}


def test_other_processes_are_named_with_the_load(here):
    before = here("before", IDLE)
    # 2000 ticks of two CPUs went by: 800 were busy, 100 of them ours, a child that has ended since had 100 more.
    later = {
        "proc/stat": stat(1800, 2200),
        f"proc/{OWN}/stat": process("python3", 1, 60, waited=100),
        "proc/101/stat": process("engine", OWN, 190),
        "proc/200/stat": process("cc1plus (x) y", 1, 1000),
    }
    after = here("after", later)

    assert machine.unfit(before, after, own=OWN, root=here.root) == (
        "load 3.1 on 2 cores: other processes kept 0.6 CPUs busy (cc1plus (x) y 200 0.5)",
    )
    facts = dict(machine.describe(before, after, own=OWN, root=here.root))
    assert facts["others_cpus"] == 0.6
    assert facts["others"] == {"cc1plus (x) y 200": 0.5}


def test_what_the_measurement_itself_uses_is_not_held_against_the_machine(here):
    before = here("before", IDLE)
    later = {"proc/stat": stat(2800, 1200), "proc/101/stat": process("engine", OWN, 1850)}
    after = here("after", {**IDLE, **later, "proc/102/stat": process("engine", 101, 40)})

    assert machine.unfit(before, after, own=OWN, root=here.root) == ()


CPU = "sys/devices/system/cpu"


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        (
            {"proc/stat": stat(0, 0)},
            {"proc/stat": stat(0, 1900, steal=100)},
            "the hypervisor gave 5% of the CPUs' time",
        ),
        (
            {
                "sys/fs/cgroup/cpu.max": "150000 100000",
                "sys/fs/cgroup/cpu.stat": "nr_throttled 1\nthrottled_usec 1000\n",
            },
            {
                "sys/fs/cgroup/cpu.max": "150000 100000",
                "sys/fs/cgroup/cpu.stat": "nr_throttled 13\nthrottled_usec 341000\n",
            },
            "the control group's quota of 1.5 CPUs stopped it 12 times, 340 ms in all",
        ),
        (
            {},
            {"sys/fs/cgroup/cpu/cpu.stat": "nr_throttled 2\nthrottled_time 7000000\n"},
            "the control group's quota stopped it 2 times, 7 ms in all",
        ),
        (
            {f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "3400000"},
            {f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "2100000"},
            "the CPU's clock fell from 3400 to 2100 MHz",
        ),
        (
            {f"{CPU}/cpu0/thermal_throttle/core_throttle_count": "1"},
            {f"{CPU}/cpu0/thermal_throttle/core_throttle_count": "4"},
            "the CPU was too hot and slowed down 3 times",
        ),
        (
            {},
            {f"{CPU}/cpu0/cpufreq/scaling_governor": "powersave", f"{CPU}/cpu0/cpufreq/scaling_driver": "acpi-cpufreq"},
            "the governor powersave holds the CPU at its lowest clock",
        ),
        ({"proc/vmstat": "pswpin 5\n"}, {"proc/vmstat": "pswpin 12\n"}, "the machine swapped (7 pages read back)"),
    ],
)
def test_each_reason_is_said(here, first, then, said):
    before, after = here("before", first), here("after", then)

    (reason,) = machine.unfit(before, after, own=OWN, root=here.root)

    assert reason.startswith(said)


def test_a_machine_that_tells_nothing_is_not_accused(here):
    before, after = here("before", {}), here("after", {})

    assert machine.unfit(before, after, own=OWN, root=here.root) == ()
    assert dict(machine.describe(before, after, own=OWN, root=here.root))["others_cpus"] is None


def test_powersave_of_a_modern_driver_is_a_dynamic_governor(here):
    files = {f"{CPU}/cpu0/cpufreq/scaling_governor": "powersave", f"{CPU}/cpu0/cpufreq/scaling_driver": "intel_pstate"}

    assert machine.unfit(here("before", files), here("after", files), own=OWN, root=here.root) == ()


def test_how_the_cpu_is_set_up(here):
    files = {f"{CPU}/smt/control": "on\n", f"{CPU}/intel_pstate/no_turbo": "1\n"}
    here("after", files)

    assert machine.settings(here.root) == {"governor": None, "governor_driver": None, "smt": "on", "turbo": "off"}


def test_the_hottest_zone_of_the_cpu_counts_first(here):
    zones = {"0": ("acpitz", "90000"), "1": ("x86_pkg_temp", "61000"), "2": ("CPU-therm", "65500")}
    files = {f"sys/class/thermal/thermal_zone{n}/type": kind for n, (kind, _) in zones.items()}
    files |= {f"sys/class/thermal/thermal_zone{n}/temp": value for n, (_, value) in zones.items()}

    assert here("after", files).temperature_c == 65.5


def test_the_clock_is_read_from_cpufreq_then_cpuinfo(here):
    cpuinfo = "cpu MHz\t\t: 2000.0\nmodel name : x\ncpu MHz\t\t: 3000.0\n"

    assert here("none", {}).clock_mhz is None
    assert here("after", {"proc/cpuinfo": cpuinfo}).clock_mhz == 2500.0
    assert here("after", {f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "1800000\n"}).clock_mhz == 1800.0


def gpu(**fields):
    class Fake:
        def state(self):
            return nvml.GpuState(**fields)

    return Fake()


def test_a_slowed_or_shared_gpu_is_named(tmp_path):
    before = machine.snapshot(tmp_path, gpu=gpu(processes=((7, 100),)))
    after = machine.snapshot(
        tmp_path, gpu=gpu(processes=((7, 100), (OWN, 5)), throttled=("its power cap",), power_w=70.0)
    )

    assert machine.unfit(before, after, own=OWN, root=tmp_path) == (
        "the GPU was slowed down by its power cap",
        "1 other processes were on the GPU (7)",
    )
    assert dict(machine.describe(before, after, own=OWN, root=tmp_path))["gpu"]["power_w"] == 70.0


def test_a_jetsons_gpu_is_read_from_the_kernel(tmp_path):
    files = {
        "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/max_freq": "1300500000\n",
        "sys/class/devfreq/15480000.nvdec/cur_freq": "1\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "60000\n",
        "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "48700\n",
        "var/lib/nvpmodel/status": "pmode:0002\nfmode:quiet\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    board = jetson.Gpu(tmp_path)

    assert board.state() == nvml.GpuState(sm_clock_mhz=306, sm_clock_max_mhz=1300, temperature_c=49)
    assert (board.energy_j(), board.power_w(), board.used_by_bytes(1)) == (None, None, None)
    assert jetson.power_mode(tmp_path) == "pmode:0002"
    assert jetson.Gpu(tmp_path / "none").state() == nvml.GpuState()
    assert jetson.power_mode(tmp_path / "none") is None


@pytest.mark.parametrize(("board", "kind"), [("NVIDIA Jetson Orin Nano", jetson.Gpu), (None, str), ("", None)])
def test_the_gpu_is_asked_where_it_answers(monkeypatch, board, kind):
    there = (hardware.Gpu("x", "sm_87", 1, "0000:01:00.0"),)
    monkeypatch.setattr(hardware, "gpus", lambda: () if board == "" else there)
    monkeypatch.setattr(hardware, "jetson_model", lambda: board)
    monkeypatch.setattr(nvml, "find", lambda bus: f"the one at {bus}")

    found = machine.gpu()

    assert found is None if kind is None else isinstance(found, kind)
    assert kind is not str or found == "the one at 0000:01:00.0"


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="needs Linux's /proc")
def test_a_busy_neighbour_on_this_machine_is_seen():
    before = machine.snapshot()
    if not before.total_ticks:
        pytest.skip("this kernel does not count its CPUs' time")
    spin = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    neighbour = subprocess.Popen([sys.executable, "-c", spin])
    while time.process_time() and neighbour.poll() is None and _ticks(neighbour.pid) < 25:
        time.sleep(0.02)
    after = machine.snapshot()
    neighbour.wait()

    # Seen from a process that is not its parent: process 1 has many children, the parent of this test has none of it.
    used = {pid: machine._used(pid, before, after) for pid in after.processes}
    assert used[neighbour.pid] >= 20
    assert neighbour.pid in machine._tree(after.processes, os.getpid())
    assert dict(machine.describe(before, after, own=os.getpid()))["others_cpus"] >= 0.0


def _ticks(pid):
    found = machine.snapshot().processes.get(pid)
    return found.ticks if found else 99
