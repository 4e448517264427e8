import pytest

from rdeploy import backends, hardware, plugins, targets
from rdeploy.errors import ConfigError
from rdeploy.types import Limits, Timing


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refused(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        targets.load(path)
    message = str(caught.value)
    assert message.startswith(path) or path in message
    assert "\n" not in message
    return message.replace(path, "mine.yaml")


def test_the_profiles_of_the_issue_are_there():
    assert set(targets.names()) == {
        "cpu", "a100", "h100", "h200", "l4", "t4", "rtx-30", "rtx-40", "rtx-50", "jetson-xavier-jp5", "jetson-orin-jp5",
        "jetson-orin-nano-jp6", "jetson-orin-nano-jp7", "jetson-agx-orin-jp6", "jetson-agx-orin-jp7", "jetson-thor",
    }  # fmt: skip


def test_a_profile_that_was_renamed_is_found_by_its_old_name():
    assert targets.load("jetson-orin-jp6") == targets.load("jetson-agx-orin-jp6")


@pytest.mark.parametrize("name", targets.names())
def test_every_backends_options_of_a_profile_are_its_plugins(name):
    target = targets.load(name)

    for backend, options in target.backend_options:
        plugins.make_options(backends.find(backend).Options, dict(options), where=name)


def test_lists_of_lists_are_hashable(tmp_path):
    path = write(tmp_path, "backend_options: {tensorrt: {batch_ranges: [[1, 1, 4], [5, 8, 32]]}}")

    target = targets.load(path)

    assert hash(target)
    assert dict(target.options_of("tensorrt"))["batch_ranges"] == ((1, 1, 4), (5, 8, 32))


@pytest.mark.parametrize("name", targets.names())
def test_every_profile_loads_names_real_backends_and_its_sources(name):
    target = targets.load(name)

    assert target.name == name
    assert target.description
    assert target.sources
    assert set(target.backends) <= set(backends.names())


@pytest.mark.parametrize("name", targets.names())
def test_a_profile_for_the_rtx_family_proves_itself_on_a_laptop(name):
    target = targets.load(name)

    if name.startswith("rtx"):
        assert target.backends == ("tensorrt_rtx", "openvino", "onnxruntime")
        assert len(target.compute_capabilities) == 1
    elif name != "cpu":
        assert target.backends[0] == "tensorrt"


def test_a_file_says_everything_that_a_target_holds(tmp_path):
    path = write(
        tmp_path,
        """
description: mine
backends: [onnxruntime]
backend_options: {tensorrt_rtx: {workspace_mb: 64}}
compute_capabilities: [sm_89]
batch_sizes: [1, 4]
dynamic_batch: true
opset: 17
threads: 2
precisions: [fp32]
timing: {min_samples: 10, max_time_s: 2}
limits: {min_cosine: 0.95}
sources: [me]
""",
    )

    target = targets.load(path)

    assert (target.name, target.backends, target.batch_sizes, target.threads) == ("mine", ("onnxruntime",), (1, 4), 2)
    assert target.options_of("tensorrt_rtx") == (("workspace_mb", 64),)
    assert target.options_of("openvino") == ()
    assert target.timing == Timing(min_samples=10, max_time_s=2)
    assert target.limits == Limits(min_cosine=0.95)
    assert hash(target) == hash(targets.load(path))


def test_an_unknown_name_lists_the_profiles_and_the_closest():
    with pytest.raises(ConfigError) as caught:
        targets.load("rtx-4")

    assert str(caught.value).startswith("unknown target 'rtx-4', did you mean 'rtx-40'?; there are: a100, cpu, ")
    assert str(caught.value).endswith("auto, or the path of a YAML file")


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the target .*none.yaml: No such file or directory"):
        targets.load(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bakends: [cpu]", "mine.yaml: unknown key 'bakends', did you mean 'backends'? (allowed: "),
        ("timing: {min_sample: 3}", "mine.yaml: timing: unknown key 'min_sample', did you mean 'min_samples'?"),
        ("opset: high", "mine.yaml: opset must be int, not 'high'"),
        ("opset: 21", "mine.yaml: opset must be 17 to 20, not 21"),
        ("batch_sizes: 1", "mine.yaml: batch_sizes must be tuple"),
        ("batch_sizes: [0]", "mine.yaml: batch_sizes must be 1 or more"),
        ("batch_sizes: []", "mine.yaml: batch_sizes must be 1 or more"),
        ("int8_rest: int8", "mine.yaml: int8_rest must be fp16 or fp32, not 'int8'"),
        ("tensorrt: '10'", "mine.yaml: tensorrt is a version like '10.3', not '10'"),
        ("tensorrt: 10.3", "mine.yaml: tensorrt must be str, not 10.3"),
        ("memory_mb: 0", "mine.yaml: memory_mb must be 1 or more, not 0"),
        ("threads: 0", "mine.yaml: threads must be 1 or more, not 0"),
        ("backends: []", "mine.yaml: backends must name at least one runtime"),
        (
            "backends: [tensort]",
            "mine.yaml: unknown backend 'tensort', did you mean 'tensorrt'?; there are: onnxruntime",
        ),
        ("backend_options: {openvin: {}}", "mine.yaml: unknown backend 'openvin', did you mean 'openvino'?"),
        (
            "backend_options: {openvino: {inference_precison: f32}}",
            "mine.yaml: backend_options.openvino: unknown key 'inference_precison', did you mean 'inference_precision'?",
        ),
        (
            "backend_options: {openvino: {inference_precision: f8}}",
            "mine.yaml: backend_options.openvino: inference_precision 'f8': there are auto, f32, bf16, f16",
        ),
        ("backend_options: {openvino: 3}", "mine.yaml: backend_options.openvino: expected a mapping"),
        ("precisions: []", "mine.yaml: precisions must name at least one"),
        ("precisions: [int4]", "mine.yaml: unknown precision 'int4', did you mean 'int8'?"),
        ("compute_capabilities: ['8.9']", "mine.yaml: compute_capabilities are written like sm_89, not '8.9'"),
        ("timing: {min_samples: 0}", "mine.yaml: timing.min_samples must be 1 or more"),
        ("timing: {max_samples: 5}", "mine.yaml: timing.max_samples is below min_samples"),
        ("timing: {max_time_s: 0.5}", "mine.yaml: timing.max_time_s is below min_time_s"),
        ("- a list", "mine.yaml: expected a mapping of names to values, found list"),
        ("1: 2", "mine.yaml: expected a mapping of names to values"),
        ("", "mine.yaml: expected a mapping of names to values, found NoneType"),
        ("opset: [1", "mine.yaml: line 1: not valid YAML: "),
        ("opset: 17\nopset: 18", "mine.yaml: line 2: not valid YAML: key 'opset' comes twice"),
        ("a: &a [1]\nsources: *a", "mine.yaml: line 2: not valid YAML: aliases are not allowed"),
        ("a: !!python/object/apply:os.system [true]", "mine.yaml: line 1: not valid YAML: could not determine a"),
        (b"opset: \x80", "mine.yaml: not valid YAML: not UTF-8"),
        ("sources: " + "[" * 20_000, "mine.yaml: not valid YAML: nested too deeply"),
        ("# " + "x" * 70_000, "mine.yaml: larger than 64 KiB, so not a target profile"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_reason(tmp_path, text, message):
    assert message in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("gpu", "capability", "name"),
    [
        (None, "", "cpu"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", "a100"),
        ("NVIDIA H100 80GB HBM3", "sm_90", "h100"),
        ("NVIDIA H200", "sm_90", "h200"),
        ("NVIDIA GH200 480GB", "sm_90", "h200"),
        ("NVIDIA L4", "sm_89", "l4"),
        ("NVIDIA L40S", "sm_89", "rtx-40"),
        ("Tesla T4", "sm_75", "t4"),
        ("NVIDIA GeForce RTX 2080 Ti", "sm_75", "t4"),
        ("NVIDIA GeForce RTX 4070", "sm_89", "rtx-40"),
        ("NVIDIA GeForce RTX 5090", "sm_120", "rtx-50"),
        ("NVIDIA GeForce RTX 3090", "sm_86", "rtx-30"),
        ("NVIDIA A10", "sm_86", "rtx-30"),
        ("NVIDIA GeForce GTX 1080", "sm_61", "cpu"),
    ],
)
def test_auto_recognises_the_gpu(monkeypatch, gpu, capability, name):
    monkeypatch.setattr(hardware, "jetson_model", lambda: None)
    monkeypatch.setattr(hardware, "gpus", lambda: (hardware.Gpu(gpu, capability, 1 << 30),) if gpu else ())

    assert targets.auto() == name
    assert targets.load("auto").name == name


def test_what_no_profile_fits_is_told(monkeypatch, caplog):
    monkeypatch.setattr(hardware, "jetson_model", lambda: None)
    monkeypatch.setattr(hardware, "gpus", lambda: (hardware.Gpu("NVIDIA B200", "sm_100", 1 << 30),))

    assert targets.auto() == "cpu"
    assert "no profile fits NVIDIA B200 (sm_100)" in caplog.text


@pytest.mark.parametrize(
    ("kernel", "jetpack"),
    [
        ("5.10.216-tegra", 5),
        ("5.15.148-tegra", 6),
        ("6.8.12-tegra", 7),
        ("6.1.0-18-arm64", None),
        ("7.0.1-tegra", None),
    ],
)
def test_in_a_container_the_kernel_tells_the_jetpack(tmp_path, kernel, jetpack):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/version").write_text(f"Linux version {kernel} (buildbrain@mobile-u64) (gcc 9.3.0) #1 SMP PREEMPT")

    assert hardware.jetpack(tmp_path) == jetpack


@pytest.mark.parametrize(
    ("board", "l4t", "name"),
    [
        ("Jetson-AGX", "# R35 (release), REVISION: 4.1", "jetson-xavier-jp5"),
        ("NVIDIA Jetson Xavier NX Developer Kit", "# R35 (release), REVISION: 4.1", "jetson-xavier-jp5"),
        ("NVIDIA Jetson Orin Nano Developer Kit", "# R36 (release), REVISION: 4.0", "jetson-orin-nano-jp6"),
        ("NVIDIA Jetson Orin NX Engineering Reference", "# R36 (release), REVISION: 3.0", "jetson-orin-nano-jp6"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "# R36 (release), REVISION: 4.0", "jetson-agx-orin-jp6"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "# R39 (release), REVISION: 2.0", "jetson-agx-orin-jp7"),
        ("NVIDIA Jetson Orin Nano Developer Kit", "# R39 (release), REVISION: 2.0", "jetson-orin-nano-jp7"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "# R35 (release), REVISION: 4.1", "jetson-orin-jp5"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "# R38 (release), REVISION: 2.0", "jetson-thor"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "", "jetson-agx-orin-jp6"),
    ],
)
def test_auto_recognises_the_board_and_its_jetpack(monkeypatch, tmp_path, board, l4t, name):
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "proc/device-tree/model").write_text(board + "\0")
    (tmp_path / "etc/nv_tegra_release").write_text(l4t)
    for reader in ("jetson_model", "jetpack"):
        read = getattr(hardware, reader)
        monkeypatch.setattr(hardware, reader, lambda read=read: read(tmp_path))

    assert targets.auto() == name
    assert targets.load("auto").compute_capabilities == targets.load(name).compute_capabilities
