"""The words of a search: names, sizes to try, and the front."""

import runpy
from dataclasses import replace
from pathlib import Path

from rdeploy import search
from rdeploy.search import Point
from rdeploy.types import Variant

POINTS = runpy.run_path(str(Path(__file__).parent / "points.py"))
evidence, variant = (POINTS[name] for name in ("evidence", "variant"))


def test_a_points_name_says_the_variant_and_the_backend():
    assert Point(variant=variant(168, "int8"), backend="openvino").id == "r168-int8@openvino"


def test_the_sizes_go_down_from_the_native_one_and_keep_its_shape():
    assert search.resolutions((224, 224)) == tuple((s, s) for s in (224, 200, 176, 152, 128, 104))
    assert search.resolutions((512, 512))[:3] == ((512, 512), (480, 480), (448, 448))
    assert search.resolutions((240, 320))[-1] == (96, 128)
    assert search.resolutions((32, 32)) == tuple((s, s) for s in (32, 28, 24, 20, 16))


def test_sizes_go_down_place_by_place():
    stem = [
        Variant(resolution=(224, 224), at="stem", resize_options=(("stem", (("resolution", (side, side)),)),))
        for side in (112, 168)
    ]

    found = search.downwards([variant(112), stem[0], variant(224), stem[1], variant(168)])

    assert [one.id for one in found] == [
        "r224-fp32",
        "r168-fp32",
        "r112-fp32",
        "r224-stem168-fp32",
        "r224-stem112-fp32",
    ]


def test_a_size_above_the_native_one_is_told_at_every_place():
    above = replace(variant(224), resize_options=(("stem", (("resolution", (224, 256)),)),))

    assert [search.enlarges(one, (224, 224)) for one in (variant(256), above, variant(224), variant(112))] == [
        True, True, False, False,
    ]  # fmt: skip


def test_the_front_holds_what_nothing_beats_fastest_first():
    points = [evidence(224, 0, 8), evidence(192, 2, 9), evidence(160, 1, 4), evidence(128, 3, 2), evidence(112, 4, 3)]

    assert [one.point.variant.resolution[0] for one in search.front(points)] == [128, 160, 224]


def test_latencies_within_the_noise_are_one_point_the_more_accurate():
    assert [e.drop.value for e in search.front([evidence(160, 1, 4.00), evidence(168, 0.5, 4.08)])] == [0.5]
