"""What a search looks at: the sizes at each place, and what it leaves out with a reason."""

from types import SimpleNamespace

import pytest

from rdeploy import space
from rdeploy.compare import Row
from rdeploy.intake import Build
from rdeploy.results import EngineResult, Failure
from rdeploy.search_request import search_request
from rdeploy.steps import Steps
from rdeploy.store import Store
from rdeploy.types import Target, Variant


def searched(tmp_path, target=None, **options):
    """Return the request of a search, and the build that it works with, for a network of 224 pixels."""
    request = search_request("m.onnx", {"out": str(tmp_path), **options})
    steps = Steps(target=target or Target(name="cpu"), store=Store(tmp_path), progress=print)
    model = SimpleNamespace(spec=SimpleNamespace(native_resolution=(224, 224)))
    names = {"calib": None, "judged": None, "graphs_for": steps.target.backends}
    return request, Build(request=request.build, steps=steps, model=model, **names)


def ids(tmp_path, **options):
    request, this = searched(tmp_path, fp32=True, **options)
    return [variant.id for variant in space.grid(this, ladder=request.ladder)]


def test_without_a_size_every_place_gets_a_ladder_of_them(tmp_path):
    found = ids(tmp_path, at=["input", "stem"])

    assert found[:5] == ["r200-fp32", "r176-fp32", "r152-fp32", "r128-fp32", "r104-fp32"]
    assert found[5] == "r224-stem200-fp32"


def test_a_scale_of_one_is_the_native_size_and_no_ladder(tmp_path):
    assert ids(tmp_path, scale=1.0) == ["r224-fp32"]


@pytest.mark.parametrize(
    ("at", "found"),
    [
        ("stem@0.75", ["r224-stem168-fp32"]),
        ("input@0.75+tokens@0.5", ["r168-tokens84-fp32"]),
        (["stem@0.75", "input@0.5"], ["r224-stem168-fp32", "r112-fp32"]),
    ],
)
def test_places_that_say_their_own_scale_are_searched_at_that(at, found, tmp_path):
    assert ids(tmp_path, at=at) == found


def test_a_place_with_its_own_scale_goes_with_the_ladder_of_another(tmp_path):
    found = ids(tmp_path, at=["stem@0.75", "input"])

    assert found == ["r224-stem168-fp32", "r200-fp32", "r176-fp32", "r152-fp32", "r128-fp32", "r104-fp32"]


def baseline(not_run=None, failure=None):
    built = {"tensorrt_rtx": SimpleNamespace(not_run=not_run)}
    results = {"openvino": EngineResult(backend="openvino", failure=failure)}
    return Row(variant=Variant(resolution=(224, 224)), graphs={}, exported=None, built=built, results=results)


def test_a_precision_that_the_target_does_not_compute_is_left_out_with_the_reason(tmp_path):
    _, this = searched(tmp_path, fp16=True)
    floats = Target(name="mine", precisions=("fp32",))
    (tmp_path / "images").mkdir()
    _, only_floats = searched(tmp_path, floats, int8=True, calib=str(tmp_path / "images"))

    assert space.left_out(this, baseline())["fp16"].startswith("FP16 does not pay on target cpu")
    assert space.left_out(only_floats, baseline()) == {
        "int8": "the profile of target mine does not list int8 under precisions"
    }


def test_a_backend_whose_engines_cannot_be_measured_here_is_left_out_with_the_reason(tmp_path):
    _, this = searched(tmp_path, fp32=True)
    failure = Failure(stage="build", error="StageError", message="no such op")

    assert space.left_out(this, baseline("built for sm_89, which is not here", failure)) == {
        "tensorrt_rtx": "its engines cannot be measured on this machine: built for sm_89, which is not here",
        "openvino": "it does not take the native model: build: no such op",
    }
