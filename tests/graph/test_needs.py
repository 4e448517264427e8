"""What a graph needs, read from small files; and whether the table says of TensorRT-RTX what its own parser says."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the graphs are written with onnx: pip install 'rdeploy[torch]'")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from rdeploy import capabilities  # noqa: E402
from rdeploy.backends import tensorrt_rtx  # noqa: E402
from rdeploy.errors import ConfigError  # noqa: E402
from rdeploy.graph import needs  # noqa: E402
from rdeploy.types import Target  # noqa: E402


def info(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def write(path, nodes, *, shape=(1, 3, 8, 8), constants=(), outputs=("y",), opset=18, kind=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes, "g", [info("x", shape, kind)], [info(name, None, kind) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def node(op, inputs=("x",), outputs=("y",), **attributes):
    return helper.make_node(op, list(inputs), list(outputs), name=f"the_{op}", **attributes)


def test_a_file_that_is_no_graph(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no graph")

    with pytest.raises(ConfigError, match="m.onnx is not an ONNX model, or is damaged or cut off"):
        needs.read(tmp_path / "m.onnx")


def test_operators_opset_precisions_and_sizes(tmp_path):
    weight = np.ones((4, 3, 1, 1), np.float32)
    nodes = [
        node("Conv", ("x", "w"), ("c",)),
        node("Relu", ("c",)),
    ]

    found = needs.read(write(tmp_path / "m.onnx", nodes, constants=[("w", weight)], opset=17))

    assert found.opset == 17
    assert found.operators == (("Conv", ("the_Conv",)), ("Relu", ("the_Relu",)))
    assert found.precisions == ("fp32",)
    assert found.weight_bytes == 4 * 3 * 4
    assert found.activation_bytes == (3 + 4) * 64 * 4
    assert (found.forms, found.dynamic, found.unsigned) == ((), (), ())


def test_half_precision_and_a_dynamic_resolution(tmp_path):
    found = needs.read(write(tmp_path / "m.onnx", [node("Relu")], shape=("n", 3, "h", "w"), kind=TensorProto.FLOAT16))

    assert found.precisions == ("fp16",)
    assert found.dynamic == ("x",)


@pytest.mark.parametrize(
    ("zero", "unsigned", "offset"),
    [(np.int8(0), (), ()), (np.uint8(0), ("the_QuantizeLinear",), ()), (np.int8(3), (), ("the_QuantizeLinear",))],
)
def test_what_is_not_symmetric_and_signed(tmp_path, zero, unsigned, offset):
    pair = [node("QuantizeLinear", ("x", "s", "z"), ("q",)), node("DequantizeLinear", ("q", "s"))]

    found = needs.read(write(tmp_path / "m.onnx", pair, constants=[("s", np.float32(0.1)), ("z", zero)]))

    assert found.precisions == ("fp32", "int8")
    assert (found.unsigned, found.zero_points) == (unsigned, offset)


def test_an_integer_bias(tmp_path):
    nodes = [node("DequantizeLinear", ("b", "s"), ("d",)), node("Add", ("x", "d"))]

    found = needs.read(write(tmp_path / "m.onnx", nodes, constants=[("b", np.int32([1])), ("s", np.float32(0.1))]))

    assert found.integer_biases == ("the_DequantizeLinear",)


UPDATE = [("i", np.int64([[0]])), ("u", np.ones((1, 3, 8, 8), np.float32))]
FORMS = [
    ("pool_dilation", node("MaxPool", kernel_shape=[2, 2], dilations=[2, 2]), (), ("y",)),
    ("pool_indices", node("MaxPool", outputs=("y", "i"), kernel_shape=[2, 2]), (), ("y",)),
    (
        "resize_antialias",
        node("Resize", ("x", "", "s"), mode="linear", antialias=1),
        [("s", np.float32([1, 1, 0.5, 0.5]))],
        ("y",),
    ),
    (
        "resize_coordinates",
        node("Resize", ("x", "", "s"), mode="linear", coordinate_transformation_mode="half_pixel_symmetric"),
        [("s", np.float32([1, 1, 0.5, 0.5]))],
        ("y",),
    ),
    (
        "resize_coordinates",
        node("Resize", ("x", "", "", "n"), mode="linear", axes=[2, 3], keep_aspect_ratio_policy="not_larger"),
        [("n", np.int64([4, 6]))],
        ("y",),
    ),
    ("scatter_reduction", node("ScatterND", ("x", "i", "u"), reduction="add"), UPDATE, ("y",)),
]
PLAIN = [
    (node("MaxPool", kernel_shape=[2, 2], dilations=[1, 1]), ()),
    (node("Resize", ("x", "", "s"), mode="linear"), [("s", np.float32([1, 1, 0.5, 0.5]))]),
    (node("ScatterND", ("x", "i", "u")), UPDATE),
    (node("Einsum", ("x", "x"), equation="bchw,bchv->bcwv"), ()),
]


def test_operators_that_are_not_those_of_onnx(tmp_path):
    nodes = [
        helper.make_node("QuickGelu", ["x"], ["a"], name="act", domain="com.microsoft"),
        helper.make_node("NoSuchOperator", ["a"], ["b"], name="other"),
        node("Relu", ("b",)),
    ]

    found = needs.read(write(tmp_path / "m.onnx", nodes)).foreign

    assert found == (("NoSuchOperator", ("other",)), ("com.microsoft.QuickGelu", ("act",)))


ELLIPSES = ["...hw,...hv->...wv", "bchh->bch", "bchw,bchv -> bc hh wv"]


@pytest.mark.parametrize("equation", ELLIPSES)
def test_an_ellipsis_or_a_repeated_index_is_a_form_of_its_own(tmp_path, equation):
    operands = ("x",) * (equation.count(",") + 1)
    path = write(tmp_path / "m.onnx", [node("Einsum", operands, equation=equation)])

    assert needs.read(path).forms == (("einsum_ellipsis", ("the_Einsum",)),)


@pytest.mark.parametrize(("form", "written", "constants", "outputs"), FORMS, ids=[form[0] for form in FORMS])
def test_forms_are_recognised(tmp_path, form, written, constants, outputs):
    found = needs.read(write(tmp_path / "m.onnx", [written], constants=constants, outputs=outputs))

    assert found.forms == ((form, (written.name,)),)


@pytest.mark.parametrize(("written", "constants"), PLAIN, ids=[plain[0].op_type for plain in PLAIN])
def test_plain_forms_are_none(tmp_path, written, constants):
    assert needs.read(write(tmp_path / "m.onnx", [written], constants=constants)).forms == ()


needs_rtx = pytest.mark.skipif(tensorrt_rtx.unavailable() is not None, reason=str(tensorrt_rtx.unavailable()))


def rtx_parser():
    flavour = tensorrt_rtx._flavour()
    logger = tensorrt_rtx._trt.logger_of(flavour)
    builder = flavour.trt.Builder(logger)
    network = builder.create_network(tensorrt_rtx._trt.network_flags(flavour.trt))
    return flavour.trt.OnnxParser(network, logger), (builder, network)


@needs_rtx
@pytest.mark.parametrize(
    ("written", "constants", "outputs"),
    [form[1:] for form in FORMS] + [(*plain, ("y",)) for plain in PLAIN],
    ids=lambda value: getattr(value, "op_type", ""),
)
def test_the_table_says_of_every_form_what_the_parser_says(tmp_path, written, constants, outputs):
    path = write(tmp_path / "m.onnx", [written], constants=constants, outputs=outputs)
    parser, alive = rtx_parser()

    told = capabilities.obstacles(needs.read(path), capabilities.find("tensorrt_rtx", "1.7"), Target(name="any"))

    assert bool(told) == (not parser.parse_from_file(str(path))), told
    del alive


@needs_rtx
def test_the_table_says_of_every_operator_what_the_parser_says():
    entry = capabilities.find("tensorrt_rtx", tensorrt_rtx.version())
    parser, alive = rtx_parser()
    schemas = [schema for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain]
    operators = {schema.name for schema in schemas if schema.since_version <= entry.opset}
    operators |= {operator for each in capabilities.table() for operator in each.lacks}

    assert {o for o in operators if not parser.supports_operator(o)} == set(entry.lacks)
    del alive
