"""Which of the hopeful points are measured next."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from rdeploy import optimization
from rdeploy.search import Point

POINTS = runpy.run_path(str(Path(__file__).parent / "points.py"))
candidate, evidence, variant = (POINTS[name] for name in ("candidate", "evidence", "variant"))


def chosen(variants, measured, *, at_once=3):
    one = SimpleNamespace(baseline=SimpleNamespace(variant=variant(224)), at_once=at_once)
    points = [Point(variant=v, backend=b) for v in variants for b in ("openvino", "onnxruntime")]
    found = optimization._next(one, points, [candidate(v.resolution[0], 0) for v in variants], measured)
    return list(dict.fromkeys(point.variant for point in found))


def at(place, side):
    return replace(variant(224), at=place, resize_options=((place, (("resolution", (side, side)),)),))


def test_the_first_are_the_native_size_in_every_precision():
    variants = [variant(224), variant(160), variant(224, "int8"), variant(128)]

    assert chosen(variants, []) == [variant(224), variant(224, "int8")]


def test_in_fp32_alone_the_smallest_goes_with_the_native_model():
    assert chosen([variant(224), variant(160), variant(128)], []) == [variant(224), variant(128)]


def test_a_few_at_a_time_the_most_hopeful_first():
    assert chosen([variant(s) for s in (112, 128, 144, 160)], [evidence(224, 0, 8)]) == [
        variant(s) for s in (112, 128, 144)
    ]


def test_of_a_place_of_which_nothing_is_known_one_is_measured_and_tells_of_the_others():
    variants = [at("stem", 112), at("stem", 128), variant(128), at("stem", 144)]

    assert chosen(variants, [evidence(224, 0, 8)]) == [at("stem", 112), variant(128)]
    told = [evidence(224, 0, 8), replace(evidence(224, 3, 5), point=Point(variant=at("stem", 112), backend="openvino"))]
    assert chosen(variants[1:], told) == variants[1:]
