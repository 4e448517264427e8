"""What every backend must do; a new file in rdeploy/backends/ is picked up by itself."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rdeploy import backends
from rdeploy.errors import ConfigError, InvariantError, RdeployError
from rdeploy.types import Engine, QuantScheme, Target

pytest.importorskip("onnx", reason="the tiny networks are written with onnx: pip install 'rdeploy[torch]'")
TINY = runpy.run_path(str(Path(__file__).parent.parent / "tiny_onnx.py"))
TARGET = Target(name="contract", compute_capabilities=("sm_89",), batch_sizes=(2, 1, 4))


@pytest.fixture(params=backends.names())
def backend(request):
    module = backends.find(request.param)
    reason = module.unavailable()
    if reason is not None:
        pytest.skip(reason)
    if getattr(module, "NEEDS_MODULE", False):
        pytest.skip("it runs the module, not an ONNX graph: tests/backends/test_torch.py")
    return module


def build(backend, tmp_path, **how):
    onnx = TINY["write"](tmp_path / "tiny.onnx", **how)
    return backend.build_engine(onnx, tmp_path / "engine", target=TARGET, options=backend.Options())


def runs_here(backend, engine):
    reason = backend.cannot_run(engine)
    if reason is not None:
        pytest.skip(reason)


def outputs(backend, engine, tmp_path, pixels, threads=1):
    with backend.open_session(tmp_path / "engine" / engine.path, threads=threads) as session:
        return session.run({"x": pixels})["y"]


def expected(tmp_path, pixels):
    reference = backends.find("reference")
    folder = tmp_path / "expected"
    engine = reference.build_engine(tmp_path / "tiny.onnx", folder, target=TARGET, options=reference.Options())
    with reference.open_session(folder / engine.path) as session:
        return session.run({"x": pixels})["y"]


def assert_close(engine, values, wanted):
    # "FP32" in bf16 or TF32, and an integer more or less at a rounding: 2 % of the largest output. Else float rounding.
    exact = set(dict(engine.executed_precision)) <= {"fp32", "other"} and "tensorrt" not in engine.backend
    np.testing.assert_allclose(values, wanted, rtol=0, atol=(1e-4 if exact else 0.02) * np.abs(wanted).max())


@pytest.mark.parametrize("name", backends.names())
def test_every_backend_defines_what_the_protocol_lists(name):
    module = backends.find(name)

    functions = ("unavailable", "version", "scheme", "build_engine", "cannot_run", "load_runtime", "open_session")
    for attribute in ("Options", *functions):
        assert callable(getattr(module, attribute)), attribute
    assert isinstance(module.scheme(TARGET), QuantScheme)
    assert "fp32" in module.FLOATS
    assert set(module.FLOATS) <= {"fp32", "fp16"}
    reason = module.unavailable()
    assert reason is None or ("\n" not in reason and len(reason) > 20)


@pytest.mark.parametrize("name", [name for name in backends.names() if name != "reference"])
def test_every_runtime_has_a_profiler_of_its_own(name):
    assert callable(backends.find(name).layer_times)


def test_importing_every_backend_imports_no_vendor_package():
    code = (
        "import sys; before = set(sys.modules); from rdeploy import backends; [backends.find(n) for n in backends.names()];"
        "heavy = {'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx_bindings', 'tensorrt_rtx'};"
        "heavy |= {'onnx', 'torch', 'cuda'};"
        "print(sorted(heavy & (set(sys.modules) - before)))"  # a .pth of old cuda-bindings imports cuda at the start
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_the_record_of_a_build_describes_the_file(backend, tmp_path):
    engine = build(backend, tmp_path)

    path = tmp_path / "engine" / engine.path
    assert isinstance(engine, Engine)
    assert engine.backend_version == backend.version() != ""
    assert engine.sha256 == backends.engine_sha256(path)
    assert engine.size_bytes == sum(file.stat().st_size for file in backends.engine_files(path))
    assert engine.build_s > 0
    assert engine.build_peak_bytes > 1 << 20


def test_fp32_gives_what_the_reference_gives(backend, tmp_path):
    engine = build(backend, tmp_path)
    runs_here(backend, engine)
    pixels = TINY["image"]()

    values = outputs(backend, engine, tmp_path, pixels)

    assert values.shape == (1, 10)
    assert_close(engine, values, expected(tmp_path, pixels))


def test_a_dynamic_batch_takes_every_batch_size_of_the_target(backend, tmp_path):
    engine = build(backend, tmp_path, batch="n")
    runs_here(backend, engine)
    pixels = TINY["image"](4)
    wanted = expected(tmp_path, pixels)

    for batch in TARGET.batch_sizes:
        assert_close(engine, outputs(backend, engine, tmp_path, pixels[:batch]), wanted[:batch])


def test_int8_in_the_backends_own_scheme_gives_what_the_reference_gives(backend, tmp_path):
    engine = build(backend, tmp_path, scheme=backend.scheme(TARGET))
    runs_here(backend, engine)
    pixels = TINY["image"]()

    assert_close(engine, outputs(backend, engine, tmp_path, pixels), expected(tmp_path, pixels))


def test_int8_in_the_backends_own_scheme_is_executed_in_int8(backend, tmp_path):
    engine = build(backend, tmp_path, scheme=backend.scheme(TARGET))

    executed = dict(engine.executed_precision)
    if not executed:
        pytest.skip(f"{engine.backend} does not tell what it executes")
    assert executed.get("int8", 0) >= 2, executed


def test_fp16_is_built_where_the_backend_claims_it_and_computed_in_fp16(backend, tmp_path):
    if "fp16" not in backend.FLOATS:
        pytest.skip("its kernels compute FP16 graphs in FP32")
    ir = pytest.importorskip("onnx_ir", reason="FP16 graphs are written with onnx-ir: pip install 'rdeploy[torch]'")
    from rdeploy.graph import fp16

    model = ir.load(TINY["write"](tmp_path / "fp32.onnx"))
    fp16.convert(model)
    ir.save(model, tmp_path / "tiny.onnx")

    engine = backend.build_engine(tmp_path / "tiny.onnx", tmp_path / "engine", target=TARGET, options=backend.Options())

    assert dict(engine.executed_precision).get("fp16", 0) >= 2, engine.executed_precision
    runs_here(backend, engine)
    pixels = TINY["image"]()
    assert_close(engine, outputs(backend, engine, tmp_path, pixels), expected(tmp_path, pixels))


def test_the_number_of_threads_does_not_change_the_result(backend, tmp_path):
    engine = build(backend, tmp_path)
    runs_here(backend, engine)
    pixels = TINY["image"]()

    one, two = (outputs(backend, engine, tmp_path, pixels, threads=n) for n in (1, 2))

    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-3)


def test_results_stay_when_the_session_runs_again(backend, tmp_path):
    engine = build(backend, tmp_path)
    runs_here(backend, engine)

    with backend.open_session(tmp_path / "engine" / engine.path, threads=1) as session:
        first = session.run({"x": TINY["image"](seed=1)})["y"]
        kept = first.copy()
        second = session.run({"x": TINY["image"](seed=2)})["y"]

    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(first, second)


def test_a_session_says_what_it_takes_and_refuses_what_does_not_fit(backend, tmp_path):
    engine = build(backend, tmp_path)
    runs_here(backend, engine)
    pixels = TINY["image"]()

    with backend.open_session(tmp_path / "engine" / engine.path, threads=1) as session:
        assert [(i.name, i.dtype, i.shape) for i in session.inputs] == [("x", "float32", (1, 3, 16, 16))]
        assert [(o.name, o.shape) for o in session.outputs] == [("y", (1, 10))]
        for wrong, message in (
            ({}, "input 'x' is missing; the engine takes x: float32 [1, 3, 16, 16]"),
            ({"x": pixels.astype(np.float64)}, "input 'x' is float64"),
            ({"x": pixels[:, :, :8]}, "input 'x' is [1, 3, 8, 16]"),
            ({"x": pixels, "z": pixels}, "unknown input 'z'"),
        ):
            with pytest.raises(ConfigError) as caught:
                session.run(wrong)
            assert message in str(caught.value)


def test_a_session_that_is_not_open_does_not_run(backend, tmp_path):
    session = backend.open_session(tmp_path / "engine")

    with pytest.raises(InvariantError, match="not open: use it in a `with` block"):
        session.run({"x": TINY["image"]()})


def test_what_is_not_a_model_is_refused_in_one_line(backend, tmp_path):
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"this is no model " * 50)

    for onnx in (garbage, tmp_path / "absent.onnx"):
        with pytest.raises(ConfigError) as caught:
            backend.build_engine(onnx, tmp_path / "engine", target=TARGET, options=backend.Options())
        assert onnx.name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "absent"])
def test_a_damaged_engine_is_refused_in_one_line(backend, tmp_path, damage):
    engine = build(backend, tmp_path)
    path = tmp_path / "engine" / engine.path
    content = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes({"cut": content[: len(content) // 2], "garbage": b"garbage" * 500, "empty": b""}[damage])

    with pytest.raises(RdeployError) as caught, backend.open_session(path):
        pass

    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dynamic_resolution_is_refused(backend, tmp_path):
    if backend.__name__.endswith("reference"):
        pytest.skip("the reference evaluates a graph of any shape")

    with pytest.raises(RdeployError, match="only the first dimension may be dynamic"):
        build(backend, tmp_path, size="s")
