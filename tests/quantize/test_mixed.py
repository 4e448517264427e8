"""Accuracy control: how many layers fall back, how many graphs are judged for it, and what a drop is."""

import math
import runpy
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")
pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'rdeploy[torch]'")

from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.metrics import segmentation  # noqa: E402
from rdeploy.quantize import mixed, recipe, spooled  # noqa: E402
from rdeploy.quantize.sensitivity import Sensitivity  # noqa: E402
from rdeploy.types import QuantOptions, QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
HALVES = tuple(Sensitivity(layer=f"l{i}", noise=2.0 ** -(i + 1), macs=0.01) for i in range(40))
"""Each layer makes half of the error that is left."""


def amplitude(count):
    """Decisions flip in proportion to the amplitude of what is left: 8 points with everything in INT8."""
    return 8 * math.sqrt(mixed.remaining(HALVES)[count])


@pytest.mark.parametrize(("budget", "expected"), [(8.0, 0), (4.0, 2), (1.0, 6), (0.5, 8), (0.1, 13)])
def test_the_fewest_layers_that_hold_are_found_in_a_few_evaluations(budget, expected):
    asked = []

    count, curve, settled = mixed.fewest(lambda k: asked.append(k) or amplitude(k), HALVES, budget=budget)

    assert (count, settled) == (expected, True)
    assert {point.layers for point in curve} == set(asked)
    assert len(asked) <= 4
    assert [point.drop for point in curve] == sorted((point.drop for point in curve), reverse=True)
    assert next(point for point in curve if point.layers == count).float_macs == pytest.approx(0.01 * count)


@pytest.mark.parametrize("needed", range(41))
def test_a_prediction_that_is_wrong_still_ends_at_the_fewest(needed):
    asked = []

    def drop(count):
        asked.append(count)
        return 0.0 if count >= needed else 5.0

    count, _, settled = mixed.fewest(drop, HALVES, budget=0.5)

    assert (count, settled) == (needed, True)
    assert len(asked) <= mixed.MOST_EVALUATIONS
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("share", [lambda i: 1 / 200, lambda i: 0.05 * 0.95**i])
@pytest.mark.parametrize("needed", [1, 120, 150, 199])
def test_drops_just_above_the_budget_do_not_use_the_evaluations_up(share, needed):
    """200 layers; each prediction, made from 0.6 points for 0.5, asks for a few layers more."""
    ranked = tuple(Sensitivity(layer=f"l{i}", noise=share(i), macs=0.005) for i in range(200))

    count, curve, settled = mixed.fewest(lambda k: 0.6 if k < needed else 0.4, ranked, budget=0.5)

    assert (count, settled) == (needed, True)
    assert len(curve) <= mixed.MOST_EVALUATIONS


FLIPS = {0: 8, 1: 5, 2: 6, 4: 3, 6: 4, 8: 2, 12: 4, 16: 3, 20: 2, 28: 1, 32: 4, 36: 3, 40: 4, 44: 1}
"""Of 250 decisions of a MobileNetV2 that change with so many of 63 layers in float."""


def test_a_number_that_holds_is_found_below_others_that_do_not():
    """Two decisions may change. How many do is luck besides: 8 layers are enough, 12 to 16 and 32 to 40 are not."""
    left = np.interp(
        range(64), [0, 1, 2, 4, 8, 16, 24, 32, 40, 63], [1, 0.73, 0.62, 0.51, 0.37, 0.2, 0.12, 0.07, 0.04, 0]
    )
    ranked = tuple(Sensitivity(layer=f"l{i}", noise=share, macs=0.01) for i, share in enumerate(-np.diff(left)))

    def drop(count):
        return 100 / 250 * FLIPS[max(known for known in FLIPS if known <= count)]

    found, curve, _ = mixed.fewest(drop, ranked, budget=1.0, known={0: drop(0)}, decisions=250)
    among_holding, _, _ = mixed.fewest(drop, ranked, budget=1.0, known={0: drop(0)})

    assert found == 8
    assert among_holding == 20
    assert drop(found) <= 1.0
    assert len(curve) <= mixed.MOST_EVALUATIONS


@pytest.mark.parametrize(("luck", "decisions"), [(0.0, 2.0), (1.0, 4.0), (2.0, (1 + math.sqrt(3)) ** 2)])
def test_with_luck_as_many_flip_as_are_allowed_where_more_are_expected(luck, decisions):
    """Of n that are expected n - luck * sqrt(n) flip: of 4 two, with luck of one deviation."""
    assert mixed._hoped(0.8, 250, luck) == pytest.approx(100 / 250 * decisions)


def test_decisions_are_counted_where_each_image_has_one(tmp_path):
    exact = TEXT["write"](tmp_path / "a.onnx", "p = GlobalAveragePool(x) y = Flatten(p)")

    counted = {task: mixed.judge_on(exact, [W(1, 3, 8, 8)], task=task).counted for task in mixed.JUDGED}

    assert counted == {"classification": True, "segmentation": False, "embedding": False}


def test_a_search_that_is_ended_gives_the_fewest_that_held(monkeypatch):
    monkeypatch.setattr(mixed, "MOST_EVALUATIONS", 4)
    ranked = tuple(Sensitivity(layer=f"l{i}", noise=1 / 200, macs=0.005) for i in range(200))

    count, curve, settled = mixed.fewest(lambda k: 0.6 if k < 90 else 0.4, ranked, budget=0.5)

    assert not settled
    assert 90 <= count < 200
    assert any(point.layers == count and point.drop == 0.4 for point in curve)


def test_what_was_measured_before_is_not_measured_again():
    asked = []

    mixed.fewest(lambda k: asked.append(k) or amplitude(k), HALVES, budget=1.0, known={0: 8.0})

    assert 0 not in asked


def test_a_drop_is_the_share_of_decisions_that_change_or_the_accuracy_lost(tmp_path):
    """Two networks over two images: the second decides otherwise on the first image."""
    body = "p = GlobalAveragePool(x) f = Flatten(p) y = MatMul(f, k)"
    exact = TEXT["write"](tmp_path / "a.onnx", body, k=np.eye(3, dtype=np.float32))
    other = TEXT["write"](tmp_path / "b.onnx", body, k=np.diag(np.float32([0, 1, 1])))
    images = [np.zeros((1, 3, 8, 8), np.float32) for _ in range(2)]
    images[0][0, :2] = np.float32([2, 1])[:, None, None]
    images[1][0, 2] = 1

    assert mixed.judge_on(exact, images).drop(exact) == 0
    assert mixed.judge_on(exact, images).drop(other) == 50
    assert mixed.judge_on(exact, images, labels=(0, 2)).drop(other) == 50
    assert mixed.judge_on(exact, images, labels=(1, 2)).drop(other) == -50  # it is right where the original was wrong
    cosine = mixed.judge_on(exact, images, task="embedding").drop(other)
    assert cosine == pytest.approx(100 * (1 - (1 / math.sqrt(5) + 1) / 2))


def test_pixels_count_one_by_one_where_the_output_is_a_map(tmp_path):
    exact = TEXT["write"](tmp_path / "a.onnx", "y = Identity(x)")
    other = TEXT["write"](tmp_path / "b.onnx", "y = Mul(x, s)", s=np.where(np.arange(8) < 2, -1, 1).astype(np.float32))

    judge = mixed.judge_on(exact, [W(1, 3, 8, 8)], task="segmentation")

    assert judge.drop(other) == 25
    assert (judge.samples, judge.labelled) == (1, False)


def test_with_masks_the_mean_intersection_over_union_is_what_drops(tmp_path):
    """Class 1 is a quarter of the mask; a network that says class 0 everywhere has (3/4 + 0) / 2 in place of 1."""
    exact = TEXT["write"](tmp_path / "a.onnx", "y = Identity(x)", x=(1, 2, 4, 4))
    other = TEXT["write"](tmp_path / "b.onnx", "y = Mul(x, s)", x=(1, 2, 4, 4), s=np.float32([1, 0]).reshape(2, 1, 1))
    mask = np.zeros((4, 4), np.uint8)
    mask[:2, :2] = 1
    image = np.stack([np.full((4, 4), 0.5), mask]).astype(np.float32)[None]

    def counts(index, scores):
        assert index == 0
        return segmentation.count(segmentation.classes_of(scores[None])[0], mask, 2, void=())

    judge = mixed.judge_on(exact, [image], task="segmentation", counts=counts)

    assert judge.drop(exact) == 0
    assert judge.drop(other) == pytest.approx(100 * (1 - 0.375))
    assert (judge.samples, judge.labelled) == (1, True)


@pytest.mark.parametrize("count", [8, 64])
def test_label_maps_are_small_and_not_all_in_memory(count, tmp_path, monkeypatch):
    """A map of 128 x 128 has 16 kB in bytes; at most 64 kB are in memory beside the scores of one image."""
    monkeypatch.setattr(spooled, "IN_MEMORY_BYTES", 1 << 16)
    path = TEXT["write"](tmp_path / "a.onnx", "y = Identity(x)", x=(1, 3, 128, 128))
    images = [W(1, 3, 128, 128)] * count
    tracemalloc.start()

    judge = mixed.judge_on(path, images, task="segmentation")

    assert judge.drop(path) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert judge.samples == count
    assert peak < 1 << 20


def test_a_task_without_decisions_to_count_is_refused(tmp_path):
    exact = TEXT["write"](tmp_path / "a.onnx", "y = Identity(x)")

    with pytest.raises(Unsupported) as caught:
        mixed.judge_on(exact, [], task="detection")

    assert str(caught.value) == (
        "--max-drop judges classification, segmentation, embedding; for detection build INT8 without it"
    )


SCHEME = QuantScheme(name="s", activations="int8", ops=("Conv", "MatMul"), weight_max=63)
NET = "a = Conv(x, w) r = Relu(a) c = Conv(r, u) g = GlobalAveragePool(c) f = Flatten(g) y = MatMul(f, k)"
ARRAYS = {"w": W(6, 3, 1, 1, seed=1), "u": W(6, 6, 1, 1, seed=2), "k": W(6, 5, seed=3)}


def controlled(folder, drops, **more):
    """Run accuracy control on a real network, with a judge that says what is told by the number of layers in float."""
    path, out = TEXT["write"](folder / "fp32.onnx", NET, **ARRAYS), folder / "int8.onnx"
    images = [W(1, 3, 8, 8, seed=i) for i in range(8)]
    seen = recipe.calibrate(path, folder, schemes=[SCHEME], images=images, recipe="fast")
    asked = []

    def requantize(keep_float):
        asked.append(keep_float)
        options = QuantOptions(calibrator="minmax", keep_float=keep_float)
        return recipe.quantize(seen, out, scheme=SCHEME, images=images, options=options)

    judge = mixed.Judge(lambda graph: drops[len(asked[-1])], 8, False)
    made = mixed.control(
        path, out, scheme=SCHEME, images=images, requantize=requantize, judge=judge, max_drop=1.0, **more
    )
    return made, asked, out


def test_int8_that_holds_is_left_alone(tmp_path):
    made, asked, _ = controlled(tmp_path, [0.5])

    assert asked == [()]
    assert made.fallbacks.layers == ()
    assert [(point.layers, point.drop) for point in made.fallbacks.curve] == [(0, 0.5)]


def test_the_graph_that_is_left_is_the_one_with_the_layers_named_in_float(tmp_path):
    made, _, out = controlled(tmp_path, [3.0, 2.0, 0.9, 0.0])

    names = [name for name, _ in made.fallbacks.layers]
    assert len(names) == 2
    assert {name for name, reason in made.skipped if reason == "kept in float on request"} == set(names)
    assert made.fallbacks.candidates == 3
    assert {point.layers: point.drop for point in made.fallbacks.curve}.items() <= {0: 3.0, 1: 2.0, 2: 0.9}.items()
    assert made.coverage < 1


def test_what_fell_back_under_one_scheme_is_tried_first_under_the_next(tmp_path):
    made, asked, _ = controlled(tmp_path, [3.0, 0.9], first=(("c", 0.7),))

    assert asked == [("c",)]
    assert made.fallbacks.layers == (("c", 0.7),)


def test_where_nothing_can_stay_int8_that_is_said(tmp_path):
    with pytest.raises(Unsupported) as caught:
        controlled(tmp_path, [3.0, 2.5, 2.0])

    assert str(caught.value) == "no layer can stay INT8 within 1 points: INT8 alone loses 3.00 on 8 images"


def test_a_search_that_ends_too_early_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(mixed, "MOST_EVALUATIONS", 1)

    with pytest.raises(Unsupported) as caught:
        controlled(tmp_path, [3.0, 2.0, 0.9])

    assert str(caught.value) == (
        "1 evaluations found no number of float layers within 1 points: with 0 of 3 in float 3.00 are lost; "
        "allow more with --max-drop, or deploy it in float"
    )


def test_a_search_that_ends_with_layers_that_hold_says_that_fewer_may_be_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(mixed, "MOST_EVALUATIONS", 2)

    made, _, _ = controlled(tmp_path, [3.0, 0.9, 0.9])

    assert made.recipe[-1] == "the search for float layers ended after 2 evaluations: fewer than 2 may be enough"
