import pytest

from rdeploy import hardware


@pytest.fixture
def root(tmp_path):
    """`root(path=content)` puts files into another machine's file system."""

    def put(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return put


def test_an_x86_cpu(root):
    machine = root(
        {"proc/cpuinfo": "model name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512_vnni\n\nflags\t: other\n"}
    )

    assert hardware.cpu_model(machine) == "Some CPU @ 2 GHz"
    assert hardware.cpu_flags(machine) == {"fpu", "avx2", "avx512_vnni"}


def test_an_arm_cpu(root):
    machine = root({"proc/cpuinfo": "processor : 0\nFeatures : fp asimd asimddp\n"})

    assert "asimddp" in hardware.cpu_flags(machine)


def test_memory(root):
    assert hardware.memory_bytes(root({"proc/meminfo": "MemTotal:       2048 kB\nMemFree: 1 kB\n"})) == 2 << 20


@pytest.mark.parametrize(
    ("files", "quota", "limit"),
    [
        ({}, None, None),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n", "sys/fs/cgroup/memory.max": "max\n"}, None, None),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n", "sys/fs/cgroup/memory.max": "1048576\n"}, 1.5, 1 << 20),
        (
            {
                "proc/self/cgroup": "0::/box\n",
                "sys/fs/cgroup/box/cpu.max": "50000 100000\n",
                "sys/fs/cgroup/box/memory.max": "4096\n",
                "sys/fs/cgroup/memory.max": "8192\n",
            },
            0.5,
            4096,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "4096\n",
            },
            2.0,
            4096,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            None,
            None,
        ),
    ],
)
def test_the_limits_of_either_version_of_control_groups(root, files, quota, limit):
    machine = root(files)

    assert hardware.cpu_quota(machine) == quota
    assert hardware.memory_limit_bytes(machine) == limit


def test_a_jetson_is_known_by_its_board(root):
    assert hardware.jetson_model(root({})) is None
    machine = root({"proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0"})
    assert hardware.jetson_model(machine) == "NVIDIA Jetson AGX Orin Developer Kit"


def test_another_board_with_a_device_tree_is_no_jetson(root):
    assert hardware.jetson_model(root({"proc/device-tree/model": "Raspberry Pi 5 Model B\0"})) is None


@pytest.mark.parametrize(
    ("name", "content", "version"),
    [
        ("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu\n", "570.86.15"),
        (
            "proc/driver/nvidia/version",
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.1.2  x\n",
            "580.1.2",
        ),
        ("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 1\n", "L4T R36.4.3"),
        ("etc/other", "", None),
    ],
)
def test_the_drivers_version(root, name, content, version):
    assert hardware.driver_version(root({name: content})) == version


def test_without_a_driver_there_is_no_gpu(monkeypatch):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(hardware.ctypes, "CDLL", absent)

    assert hardware.gpus() == ()


def test_gpus_are_read_from_the_driver(monkeypatch):
    class Driver:
        def cuInit(self, flags):
            return 0

        def cuDeviceGetCount(self, count):
            count._obj.value = 1
            return 0

        def cuDeviceGet(self, device, index):
            device._obj.value = index

        def cuDeviceGetName(self, name, size, device):
            name.value = b"NVIDIA L4"

        def cuDeviceTotalMem_v2(self, size, device):
            size._obj.value = 24 << 30

        def cuDeviceGetAttribute(self, number, attribute, device):
            number._obj.value = {75: 8, 76: 9}[attribute]

        def cuDeviceGetPCIBusId(self, bus, size, device):
            bus.value = b"0000:3b:00.0"

    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: Driver())

    assert hardware.gpus() == (hardware.Gpu("NVIDIA L4", "sm_89", 24 << 30, "0000:3b:00.0"),)


def test_the_cores_are_those_that_this_process_may_use():
    assert hardware.cores() >= 1
