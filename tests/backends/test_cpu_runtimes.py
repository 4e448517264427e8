"""What is particular to ONNX Runtime and to OpenVINO."""

import numpy as np
import pytest

from rdeploy import hardware
from rdeploy.backends import onnxruntime, openvino
from rdeploy.errors import ConfigError, MissingDependency, StageError
from rdeploy.types import Target

TARGET = Target(name="t")
needs_onnxruntime = pytest.mark.skipif(onnxruntime.unavailable() is not None, reason=str(onnxruntime.unavailable()))
needs_openvino = pytest.mark.skipif(openvino.unavailable() is not None, reason=str(openvino.unavailable()))


@pytest.mark.parametrize("backend", [onnxruntime, openvino])
@pytest.mark.parametrize(
    ("machine", "flags", "activations", "weight_max"),
    [
        ("x86_64", "avx2 avx512f avx512_vnni", "uint8", 127),
        ("x86_64", "avx2 avx_vnni", "uint8", 127),
        ("x86_64", "avx2 avx512f", "uint8", 63),
        ("aarch64", "asimddp", "int8", 127),
    ],
)
def test_the_scheme_follows_the_cpu(monkeypatch, backend, machine, flags, activations, weight_max):
    monkeypatch.setattr(hardware.platform, "machine", lambda: machine)
    monkeypatch.setattr(hardware, "_read", lambda path: f"flags : {flags}\n" if path.name == "cpuinfo" else "")

    scheme = backend.scheme(TARGET)

    assert (scheme.activations, scheme.weight_max) == (activations, weight_max)


@needs_onnxruntime
@pytest.mark.parametrize("threads", [1, 2])
def test_onnxruntime_uses_the_threads_it_is_given_and_does_not_spin_when_idle(tiny, tmp_path, threads):
    with onnxruntime.open_session(tiny["write"](tmp_path / "m.onnx"), threads=threads) as session:
        options = session._session.get_session_options()

    assert options.intra_op_num_threads == threads
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


@needs_onnxruntime
def test_onnxruntime_leaves_no_profile_behind(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    onnxruntime.build_engine(
        tiny["write"](tmp_path / "m.onnx"), tmp_path / "e", target=TARGET, options=onnxruntime.Options()
    )

    assert {path.name for path in tmp_path.rglob("*")} == {"m.onnx", "e", "onnxruntime.onnx"}


@needs_onnxruntime
def test_onnxruntimes_preface_is_left_out_of_its_reasons(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"garbage")

    with pytest.raises(ConfigError) as caught, onnxruntime.open_session(path):
        pass

    assert str(caught.value) == f"ONNX Runtime cannot load {path}: Protobuf parsing failed."


@needs_onnxruntime
def test_a_graph_that_fails_while_it_runs_is_a_stage_error(tmp_path):
    onnx = pytest.importorskip("onnx", reason="writes the network")
    from onnx import TensorProto, helper

    shapes = [("x", TensorProto.FLOAT, [2]), ("n", TensorProto.INT64, [1]), ("y", TensorProto.FLOAT, None)]
    x, n, y = (helper.make_tensor_value_info(*shape) for shape in shapes)
    graph = helper.make_graph([helper.make_node("Reshape", ["x", "n"], ["y"])], "g", [x, n], [y])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)

    with onnxruntime.open_session(path) as session, pytest.raises(StageError, match=r"run: ONNX Runtime, .*m.onnx: "):
        session.run({"x": np.zeros(2, np.float32), "n": np.array([3])})


@needs_openvino
@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_uses_the_threads_it_is_given(tiny, tmp_path, threads):
    engine = openvino.build_engine(
        tiny["write"](tmp_path / "m.onnx"), tmp_path, target=TARGET, options=openvino.Options()
    )

    with openvino.open_session(tmp_path / engine.path, threads=threads) as session:
        assert session.threads == threads


@needs_openvino
def test_the_ir_executes_what_the_onnx_file_executes(tiny, tmp_path):
    import openvino as vendor

    onnx = tiny["write"](tmp_path / "m.onnx", scheme=openvino.scheme(TARGET))
    engine = openvino.build_engine(onnx, tmp_path, target=TARGET, options=openvino.Options())
    direct = openvino.Session(onnx)
    with openvino.Session(tmp_path / engine.path) as session:
        precision = session._compiled.get_property("INFERENCE_PRECISION_HINT")
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    direct._compiled = vendor.Core().compile_model(str(onnx), "CPU", settings)

    assert engine.executed_precision == direct.executed_precision()


@pytest.mark.parametrize(
    ("primitive", "input_types", "precision"),
    [
        ("brgconv_avx512_I8", ["u8", "i8", "f32"], "int8"),
        ("brgemm_avx512_i8", ["i8", "i8", "dynamic"], "int8"),
        ("jit_avx512_I8", ["u8", "i32", "i32"], "other"),
        ("jit_avx512_bf16", ["bf16"], "bf16"),
        ("brgconv_avx512_1x1_f32", ["f32"], "fp32"),
        ("ref_i32", ["i32"], "other"),
    ],
)
def test_openvinos_kernels_are_told_apart_by_their_names_and_inputs(primitive, input_types, precision):
    assert openvino._precision(primitive, input_types) == precision


@needs_openvino
def test_openvino_sees_what_was_written_into_an_array_that_it_was_given_before(tiny, tmp_path):
    onnx = tiny["write"](tmp_path / "m.onnx")
    engine = openvino.build_engine(onnx, tmp_path, target=TARGET, options=openvino.Options())
    image = tiny["image"]()
    buffer = image.copy()

    with openvino.open_session(tmp_path / engine.path) as session:
        name, result = session.inputs[0].name, session.outputs[0].name
        expected = session.run({name: image * 0.5})[result]
        before = session.run({name: buffer})[result]
        buffer *= 0.5
        after = session.run({name: buffer})[result]

    np.testing.assert_array_equal(after, expected)
    assert not np.array_equal(after, before)


@needs_openvino
def test_the_ir_keeps_fp32_weights(tiny, tmp_path):
    onnx = tiny["write"](tmp_path / "m.onnx", channels=64)

    openvino.build_engine(onnx, tmp_path, target=TARGET, options=openvino.Options())

    assert (tmp_path / "openvino.bin").stat().st_size > 4 * 64 * 64 * 9


@needs_openvino
def test_an_ir_with_half_its_weights_is_refused(tiny, tmp_path):
    openvino.build_engine(tiny["write"](tmp_path / "m.onnx"), tmp_path, target=TARGET, options=openvino.Options())
    weights = tmp_path / "openvino.bin"
    weights.write_bytes(weights.read_bytes()[:100])

    with pytest.raises(ConfigError, match=r"OpenVINO cannot load .*openvino.xml: ") as caught:
        openvino.open_session(tmp_path / "openvino.xml").__enter__()
    assert "Exception from" not in str(caught.value)


@needs_openvino
def test_what_is_no_ir_says_so(tmp_path):
    path = tmp_path / "openvino.xml"
    path.write_bytes(b"garbage")

    with pytest.raises(ConfigError, match=r"not an OpenVINO IR; build the engine again"):
        openvino.open_session(path).__enter__()


@pytest.mark.parametrize(("backend", "module"), [(onnxruntime, "onnxruntime"), (openvino, "openvino")])
def test_an_absent_runtime_says_what_to_install(monkeypatch, backend, module):
    monkeypatch.setattr(backend._engine.importlib.util, "find_spec", lambda name: None)

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(backend._engine.importlib, "import_module", absent)

    assert backend.unavailable().endswith("is not installed here; install it with: pip install 'rdeploy[cpu]'")
    with pytest.raises(MissingDependency, match=r"pip install 'rdeploy\[cpu\]'"):
        backend.open_session("engine").__enter__()
