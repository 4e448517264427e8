"""What OpenVINO computes float layers in: tried where the CPU leaves a choice, written into the IR, followed on loading."""

import runpy
from pathlib import Path

import pytest

from rdeploy import hardware, targets
from rdeploy.backends import openvino
from rdeploy.errors import ConfigError

pytestmark = [
    pytest.mark.needs("openvino"),
    pytest.mark.skipif(openvino.unavailable() is not None, reason=openvino.unavailable() or ""),
]
TINY = runpy.run_path(str(Path(__file__).parent.parent / "tiny_onnx.py"))
TARGET = targets.load("cpu")


def built(folder, **options):
    onnx = TINY["write"](folder / "m.onnx")
    return folder / openvino.build_engine(onnx, folder, target=TARGET, options=openvino.Options(**options)).path


def computes_in(path):
    with openvino.Session(path) as session:
        return session._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()


@pytest.fixture
def rival(monkeypatch):
    """A CPU that has the format that OpenVINO would choose by itself."""
    name = "bf16" if hardware.is_x86() else "f16"
    monkeypatch.setattr(openvino, "_can_compute", lambda core: ("f32", name))
    return name


@pytest.mark.parametrize(("share", "wins"), [(0.5, True), (0.95, False), (2.0, False)])
def test_the_narrower_format_has_to_be_faster_by_a_tenth(share, wins, rival, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino, "_raced", lambda path, batch, names: {"f32": 1.0, rival: share})

    found = openvino._inference_precision(tmp_path, 1, openvino.Options())

    assert found == (rival if wins else "f32")


def test_without_a_choice_nothing_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(openvino, "_can_compute", lambda core: ("f32",))
    monkeypatch.setattr(openvino, "_raced", lambda *_: pytest.fail("tried"))

    assert openvino._inference_precision(tmp_path, 1, openvino.Options()) == "f32"


def test_both_are_run_in_turn(tmp_path):
    path = built(tmp_path, inference_precision="f32")

    found = openvino._raced(path, 1, ("f32", "f32"))

    assert 0 < found["f32"] < 10


def test_the_ir_says_what_it_is_computed_in(tmp_path):
    assert computes_in(built(tmp_path, inference_precision="f32")) == "f32"


def test_bf16_is_computed_where_it_was_asked_for(tmp_path):
    import openvino as vendor

    if "bf16" not in openvino._can_compute(vendor.Core()):
        pytest.skip("this CPU has no BF16")
    path = built(tmp_path, inference_precision="bf16")

    assert computes_in(path) == "bf16"


def test_an_ir_that_asks_for_what_this_cpu_has_not_is_computed_as_openvino_likes(tmp_path, rival, monkeypatch):
    path = built(tmp_path, inference_precision=rival)
    monkeypatch.setattr(openvino, "_can_compute", lambda core: ("f32",))

    with openvino.Session(path) as session:
        assert session.run({info.name: TINY["image"]() for info in session.inputs})


def test_a_format_that_the_cpu_has_not_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(openvino, "_can_compute", lambda core: ("f32",))

    with pytest.raises(ConfigError, match="inference_precision bf16: this CPU computes in f32"):
        built(tmp_path, inference_precision="bf16")


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="inference_precision 'int4': there are auto, f32, bf16, f16"):
        openvino.Options(inference_precision="int4")
