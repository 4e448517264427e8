"""Joules of a run, from made-up meters and a clock that only runs and sleeping move."""

import pytest

from rdeploy import energy


class World:
    """A machine that draws 4 W idle and 10 W while it runs; a run takes 0.1 s."""

    def __init__(self):
        self.now, self.joules = 0.0, 0.0

    def run(self):
        self.now += 0.1
        self.joules += 1.0

    def sleep(self, seconds):
        self.now += seconds
        self.joules += 4.0 * seconds

    def clock(self):
        return self.now

    def per_run(self, *sources):
        return energy.per_run(self.run, sources, seconds=2.0, clock=self.clock, sleep=self.sleep)


def test_joules_of_a_run_beside_those_of_doing_nothing():
    world = World()
    source = energy.Source(method="RAPL", read=lambda: {"package-0": world.joules, "dram": world.joules / 10})

    found = world.per_run(source)

    assert found.joules_per_run == pytest.approx(1.1)
    assert found.watts == pytest.approx(11.0)
    assert found.idle_watts == pytest.approx(4.4)
    assert dict(found.domains) == pytest.approx({"package-0": 1.0, "dram": 0.1})
    assert found.runs == pytest.approx(20, abs=1)
    assert found.method == "RAPL"


def test_a_counter_that_starts_again_is_followed():
    world = World()
    source = energy.Source(method="RAPL", read=lambda: {"package-0": world.joules % 7.0}, wraps={"package-0": 7.0})
    world.run = lambda: (setattr(world, "now", world.now + 1.0), setattr(world, "joules", world.joules + 0.6))

    found = world.per_run(source)

    assert found.runs == 10
    assert found.joules_per_run == pytest.approx(0.6)


def test_a_whole_rail_is_not_counted_twice():
    world = World()
    read = {"VDD_IN": 5.0, "VDD_CPU_GPU_CV": 2.0}
    source = energy.Source(method="INA", read=lambda: {n: v * world.joules for n, v in read.items()}, whole=("VDD_IN",))

    assert world.per_run(source).joules_per_run == pytest.approx(5.0)


def test_what_only_tells_watts_is_summed_up(monkeypatch):
    times = iter(range(100))
    monkeypatch.setattr(energy.time, "perf_counter", lambda: float(next(times)))
    watts = iter([2.0, 2.0, 4.0, 6.0])
    meter = energy._Meter(energy.Source(method="x", read=lambda: {"gpu": next(watts)}, cumulative=False))

    # One second apart each: the mean of two readings holds in between.
    assert meter.joules() == {"gpu": 3.0}
    assert meter.joules() == {"gpu": 8.0}


def test_a_sampling_thread_ends_with_its_meter():
    with energy._Meter(energy.Source(method="x", read=lambda: {"gpu": 1.0}, cumulative=False)) as meter:
        assert meter._thread.is_alive()

    assert not meter._thread.is_alive()


@pytest.fixture
def put(tmp_path):
    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


RAPL = "sys/class/powercap"


def test_rapl_counts_packages_and_memory_and_no_part_twice(put):
    root = put(
        {
            f"{RAPL}/intel-rapl:0/name": "package-0\n",
            f"{RAPL}/intel-rapl:0/energy_uj": "2500000\n",
            f"{RAPL}/intel-rapl:0/max_energy_range_uj": "262143328850\n",
            f"{RAPL}/intel-rapl:0:0/name": "core\n",
            f"{RAPL}/intel-rapl:0:0/energy_uj": "1\n",
            f"{RAPL}/intel-rapl:0:1/name": "dram\n",
            f"{RAPL}/intel-rapl:0:1/energy_uj": "500000\n",
            f"{RAPL}/intel-rapl-mmio:0/name": "package-0\n",
        }
    )

    (source,), why = energy.find(root)

    assert why == ""
    assert source.read() == {"package-0": 2.5, "dram": 0.5}
    assert source.wraps["package-0"] == pytest.approx(262143.32885)


def test_rapl_that_only_root_may_read_says_what_to_do(put):
    sources, why = energy.find(put({f"{RAPL}/intel-rapl:0/name": "package-0\n"}))

    assert sources == ()
    assert why == (
        "RAPL is here, but only root may read it (sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj)"
    )


def test_a_jetsons_rails_in_watts(put):
    rails = {1: ("VDD_IN", 5000, 2000), 2: ("VDD_CPU_GPU_CV", 5000, 800)}
    files = {"sys/class/hwmon/hwmon3/name": "ina3221\n", "sys/class/hwmon/hwmon0/name": "coretemp\n"}
    for number, (label, millivolt, milliampere) in rails.items():
        files[f"sys/class/hwmon/hwmon3/in{number}_label"] = label + "\n"
        files[f"sys/class/hwmon/hwmon3/in{number}_input"] = f"{millivolt}\n"
        files[f"sys/class/hwmon/hwmon3/curr{number}_input"] = f"{milliampere}\n"

    (source,), _ = energy.find(put(files))

    assert source.read() == {"VDD_IN": 10.0, "VDD_CPU_GPU_CV": 4.0}
    assert (source.cumulative, source.whole) == (False, ("VDD_IN",))


class Gpu:
    def __init__(self, joules, watts):
        self.energy_j, self.power_w = lambda: joules, lambda: watts


def test_a_gpu_has_a_counter_or_tells_its_power(tmp_path):
    (counter,), _ = energy.find(tmp_path, gpu=Gpu(3.0, 70.0))
    (power,), _ = energy.find(tmp_path, gpu=Gpu(None, 70.0))
    none, why = energy.find(tmp_path, gpu=Gpu(None, None))

    assert (counter.read(), counter.cumulative) == ({"gpu": 3.0}, True)
    assert (power.read(), power.cumulative) == ({"gpu": 70.0}, False)
    assert none == ()
    assert why == "no meter: neither RAPL (/sys/class/powercap) nor NVML nor an INA3221 is here"
