"""What this machine is: its CPU, memory, quotas and NVIDIA GPUs, read from the kernel and the driver, never guessed.

Every reader takes the root of the file system, so that a test can put another machine there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

FLAGS_THAT_MATTER = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""CPU features that decide how fast INT8 and BF16 run: x86 first, then ARM."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU as the driver names it; `compute_capability` is written `sm_89`."""

    name: str
    compute_capability: str
    memory_bytes: int
    pci_bus_id: str = ""


def cpu_model(root: Path = ROOT) -> str:
    """Return the CPU's name, or the machine type where the kernel does not tell one."""
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def cpu_flags(root: Path = ROOT) -> frozenset[str]:
    """Return the first core's feature flags (`flags` on x86, `Features` on ARM)."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def is_x86() -> bool:
    """Whether this is a 64-bit x86 machine."""
    return platform.machine().lower() in ("x86_64", "amd64")


def multiplies_int8_without_saturating(root: Path = ROOT) -> bool:
    """Whether INT8 products are summed in 32 bits: VNNI, AMX, ARM. Older x86 (vpmaddubsw) sums pairs in 16 bits."""
    return not is_x86() or bool(cpu_flags(root) & {"avx512_vnni", "avx_vnni", "amx_int8"})


def cores() -> int:
    """Return how many logical CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes(root: Path = ROOT) -> int | None:
    """Return the physical memory, in bytes."""
    match = re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return how many CPUs' worth of time this process's control group may use, None without a limit."""
    for folder in control_groups(root, ""):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if quota.isdigit() and period.isdigit():
            return int(quota) / int(period)
    for folder in control_groups(root, "cpu"):
        quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            return int(quota) / int(period)
    return None


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """Return the memory limit of this process's control group, None without one."""
    limits = [_read(folder / "memory.max").strip() for folder in control_groups(root, "")]
    limits += [_read(folder / "memory.limit_in_bytes").strip() for folder in control_groups(root, "memory")]
    numbers = [int(limit) for limit in limits if limit.isdigit()]
    # Version 1 writes "no limit" as a number near 2**63.
    return min((number for number in numbers if number < 1 << 60), default=None)


def control_groups(root: Path, controller: str) -> tuple[Path, ...]:
    """Return this process's own group and the top one, of version 2 (empty controller) or of a version 1 controller."""
    base = root / "sys/fs/cgroup" / controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, group = line.split(":", 2)
        if controller in names.split(","):
            return (base / group.lstrip("/"), base)
    return (base,)


def jetson_model(root: Path = ROOT) -> str | None:
    """Return the board's name where this is an NVIDIA Jetson, else None."""
    model = _read(root / "proc/device-tree/model").rstrip("\0\n")
    return model if re.search("jetson|orin|thor", model, re.IGNORECASE) else None


_JETPACK_OF_L4T = {35: 5, 36: 6, 38: 7, 39: 7}
_JETPACK_OF_KERNEL = {"5.10": 5, "5.15": 6, "6.8": 7}
"""NVIDIA's Jetson Linux release notes: the kernels of R35, R36 and R38."""


def jetpack(root: Path = ROOT) -> int | None:
    """Return the major version of JetPack on this Jetson, by its L4T release, in a container by its kernel; None elsewhere."""
    release = re.search(r"# R(\d+)", _read(root / "etc/nv_tegra_release"))
    if release:
        return _JETPACK_OF_L4T.get(int(release.group(1)))
    kernel = re.search(r"version (\d+\.\d+)\.\S*tegra", _read(root / "proc/version"))
    return _JETPACK_OF_KERNEL.get(kernel.group(1)) if kernel else None


def driver_version(root: Path = ROOT) -> str | None:
    """Return the NVIDIA driver's version; on Jetson the L4T release."""
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _read(root / "proc/driver/nvidia/version"))
    if match:
        return match.group(1)
    release = re.search(r"# (R\d+).*?REVISION: ([\d.]+)", _read(root / "etc/nv_tegra_release"))
    return f"L4T {release.group(1)}.{release.group(2)}" if release else None


def gpus() -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs that a CUDA program would see here; empty without a GPU or a working driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu(driver, index) for index in range(count.value))


_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the CUDA driver API."""


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    device, number, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(128)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    digits = ""
    for attribute in (_MAJOR, _MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        digits += str(number.value)
    bus = ctypes.create_string_buffer(32)
    driver.cuDeviceGetPCIBusId(bus, len(bus), device)
    return Gpu(name.value.decode(errors="replace"), f"sm_{digits}", size.value, bus.value.decode(errors="replace"))


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""
