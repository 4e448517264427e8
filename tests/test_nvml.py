"""NVML through a made-up driver library."""

import ctypes

import pytest

from rdeploy import hardware, machine, nvml

NOT_SUPPORTED = 3


class Library:
    """Answers like libnvidia-ml; what is not in `numbers` is not supported."""

    def __init__(self, **numbers):
        self.numbers, self.asked = numbers, []

    def nvmlInit_v2(self):
        return self.numbers.get("init", 0)

    def nvmlDeviceGetHandleByPciBusId_v2(self, name, handle):
        self.asked.append(name)
        handle._obj.value = 11
        return 0 if name == b"0000:3b:00.0" else 6

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = 22
        return self.numbers.get("index", 0)

    def _fill(self, name, value):
        if name not in self.numbers:
            return NOT_SUPPORTED
        value._obj.value = self.numbers[name]
        return 0

    def nvmlDeviceGetClockInfo(self, handle, kind, value):
        return self._fill({1: "sm", 2: "memory_clock"}[kind], value)

    def nvmlDeviceGetMaxClockInfo(self, handle, kind, value):
        return self._fill("sm_max", value)

    def nvmlDeviceGetTemperature(self, handle, sensor, value):
        return self._fill("temperature", value)

    def nvmlDeviceGetPowerUsage(self, handle, value):
        return self._fill("power_mw", value)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
        return self._fill("energy_mj", value)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle, value):
        return self._fill("reasons", value)

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        if "used" not in self.numbers:
            return NOT_SUPPORTED
        memory._obj.total, memory._obj.used = 24 << 30, self.numbers["used"]
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle, count, processes):
        for index, (pid, used) in enumerate(self.numbers.get("processes", ())):
            processes._obj[index].pid, processes._obj[index].used = pid, used
        count._obj.value = len(self.numbers.get("processes", ()))
        return 0


def test_the_state_of_a_gpu_in_its_units():
    library = Library(
        sm=1410,
        sm_max=1980,
        memory_clock=2619,
        temperature=41,
        power_mw=70250,
        energy_mj=5_000,
        reasons=0x01 | 0x04 | 0x40,
        used=3 << 30,
        processes=((7, 1 << 30), (8, (1 << 64) - 1)),
    )

    gpu = nvml.find("0000:3b:00.0", library=library)

    assert gpu.state() == nvml.GpuState(
        sm_clock_mhz=1410,
        sm_clock_max_mhz=1980,
        memory_clock_mhz=2619,
        temperature_c=41,
        power_w=70.25,
        throttled=("its power cap", "its temperature (hardware)"),
        memory_used_bytes=3 << 30,
        memory_total_bytes=24 << 30,
        processes=((7, 1 << 30), (8, None)),
    )
    assert gpu.energy_j() == 5.0
    assert gpu.power_w() == 70.25
    assert (gpu.used_by_bytes(7), gpu.used_by_bytes(8), gpu.used_by_bytes(9)) == (1 << 30, None, None)


def test_what_a_driver_does_not_tell_is_none():
    gpu = nvml.find(library=Library())

    assert gpu.state() == nvml.GpuState()
    assert (gpu.energy_j(), gpu.power_w()) == (None, None)


def test_an_old_driver_without_a_function_is_no_trouble():
    class Old(Library):
        nvmlDeviceGetTotalEnergyConsumption = None

    assert nvml.find(library=Old()).energy_j() is None


def test_the_newer_name_of_the_throttle_reasons_is_asked_first():
    class New(Library):
        nvmlDeviceGetCurrentClocksThrottleReasons = None

        def nvmlDeviceGetCurrentClocksEventReasons(self, handle, value):
            value._obj.value = 0x20
            return 0

    assert nvml.find(library=New()).state().throttled == ("its temperature (driver)",)


def test_the_gpu_is_found_by_its_bus_else_it_is_the_first():
    library = Library()

    assert nvml.find("0000:3b:00.0", library=library)._handle.value == 11
    assert nvml.find("other", library=library)._handle.value == 22
    assert library.asked == [b"0000:3b:00.0", b"other"]


def test_without_a_driver_there_is_none(monkeypatch):
    def absent(name):
        raise OSError(name)

    assert nvml.find(library=Library(init=9)) is None
    assert nvml.find(library=Library(index=6)) is None
    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert nvml.find() is None


@pytest.mark.gpu
@pytest.mark.skipif(not hardware.gpus() or hardware.jetson_model() is not None, reason="needs an NVIDIA GPU and NVML")
def test_the_gpu_that_is_here_answers():
    gpu = machine.gpu()

    state = gpu.state()
    assert 0 < state.sm_clock_mhz <= state.sm_clock_max_mhz
    assert 0 < state.memory_used_bytes <= state.memory_total_bytes
    assert 0 < state.temperature_c < 120
    assert gpu.power_w() > 0
