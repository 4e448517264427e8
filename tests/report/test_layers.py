"""Where the time goes and where rounding hurts: the tables of the report, from what lies beside a manifest."""

import dataclasses

from rdeploy.measured import LayerTime, LayerTimes
from rdeploy.report import layers, points, samples
from rdeploy.report.points import Bundle, Point


def times(**by_name):
    kernels = tuple(LayerTime(name=n, kind="Conv", mean_ms=ms, layers=(n,)) for n, ms in by_name.items())
    return LayerTimes(
        profiler="a profiler", runs=30, whole_ms=sum(by_name.values()) + 0.5, remainder_ms=0.5, kernels=kernels
    )


def tensor(name, own, readers):
    return {"name": name, "low": -1.0, "high": 1.0, "step": 0.1, "clipped": 0.01, "own_db": own, "sqnr_db": own - 3,
            "advice": "more images", "readers": readers}  # fmt: skip


POINT = Point(id="r24-int8@openvino", variant="r24-int8", backend="openvino", resolution="24", side=24, precision="int8",
              position="input", role="pick")  # fmt: skip
BUNDLE = Bundle(
    folder="net-r24-int8", manifest={"variant": {"id": "r24-int8"}}, latencies_ms={}, baseline_ms={},
    layers={"openvino": times(conv1=0.2, conv2=1.0)}, baseline_layers={"openvino": times(conv1=0.9, conv2=2.0)},
    tensors=(tensor("a", 30.0, ["conv1"]), tensor("b", 12.0, ["conv2"])),
)  # fmt: skip


def test_the_slowest_layer_comes_first_beside_the_native_one_with_the_error_of_what_it_reads():
    part = layers.parts([BUNDLE], [POINT])[0]

    assert part["title"] == "r24-int8@openvino: time by layer"
    assert part["rows"][0] == ["conv2", "2.000", "1.000", "9.0"]
    assert part["rows"][1] == ["conv1", "0.900", "0.200", "27.0"]
    assert part["rows"][-1] == ["whole", "3.400", "1.700", "–"]
    assert part["open"]


def test_what_is_not_shown_is_summed_up():
    many = times(**{f"conv{index}": 1.0 for index in range(14)})
    part = layers.parts([dataclasses.replace(BUNDLE, layers={"openvino": many}, baseline_layers={})], [POINT])[0]

    assert part["rows"][10][:3] == ["(4 more)", "–", "4.000"]


def test_the_tensors_that_rounding_hurts_most_come_first():
    part = layers.parts([BUNDLE], [POINT])[1]

    assert part["title"] == "r24-int8: quantization error"
    assert [row[0] for row in part["rows"]] == ["b", "a"]
    assert part["rows"][0][1:] == ["-1 .. 1", "1.00", "12.0", "9.0", "more images"]


def test_a_point_off_the_front_says_where_its_time_goes_too_after_the_front_and_closed():
    names = ("r24-int8", "r16-int8")
    off, front = (
        dataclasses.replace(POINT, id=f"{n}@openvino", variant=n, role=r) for n, r in zip(names, ("", "front"))
    )
    bundles = [dataclasses.replace(BUNDLE, manifest={"variant": {"id": name}}) for name in names]

    found = layers.parts(bundles, [off, front])

    titles = [part["title"] for part in found]
    assert titles[:2] == ["r16-int8@openvino: time by layer", "r24-int8@openvino: time by layer"]
    assert not any(part["open"] for part in found)


def test_the_native_model_has_no_table_of_its_own():
    assert layers.parts([BUNDLE], [dataclasses.replace(POINT, role="native")]) == []


def test_damaged_samples_are_left_out_and_the_rest_is_read():
    raw = {
        "engines": {"a": {"latencies_ms": [1.0, 2.0], "layers": {"nonsense": 1}}, "b": {"latencies_ms": [-1]}, "c": 3}
    }
    errors = {"tensors": [tensor("x", 20.0, []), {"name": "y"}, 7]}
    bare = points.Bundle(folder="f", manifest={}, latencies_ms={}, baseline_ms={})

    found = samples.with_samples(bare, raw, errors)

    assert found.latencies_ms == {"a": [1.0, 2.0]}
    assert found.layers == {}
    assert [one["name"] for one in found.tensors] == ["x"]
    assert samples.with_samples(bare, None, [1]).tensors == ()
