"""Detections in closed form: the layouts, suppression, matching, and mAP by pycocotools."""

import numpy as np
import pytest

from rdeploy import verify
from rdeploy.errors import Unsupported
from rdeploy.metrics import coco, detection
from rdeploy.metrics.outputs import Outputs
from rdeploy.verify import agreement
from rdeploy.verify.accuracy import Truth

SIZE = (40, 80)
BOX = (10.0, 10.0, 30.0, 20.0)
CENTRE = (20.0, 15.0, 20.0, 10.0)


def columns(*rows, candidates=8):
    """(1, 4 + 2, A): every row is a centre box and two scores."""
    table = np.zeros((candidates, 6), np.float32)
    table[: len(rows)] = rows
    return [table.T[None]]


def test_yolo_columns_are_decoded_to_corners():
    (found,) = detection.decode(columns((*CENTRE, 0.1, 0.9)), ("output",), SIZE)

    assert found.tolist() == [[*BOX, pytest.approx(0.9), 1.0]]


def test_rows_have_an_objectness_that_multiplies():
    table = np.zeros((1, 9, 7), np.float32)
    table[0, 3] = (*CENTRE, 0.5, 0.8, 0.2)

    (found,) = detection.decode([table], ("output",), SIZE)

    assert found.tolist() == [[*BOX, pytest.approx(0.4), 0.0]]


@pytest.mark.parametrize("swap", [False, True])
def test_boxes_and_scores_come_in_either_order(swap):
    boxes, scores = np.zeros((1, 6, 4), np.float32), np.zeros((1, 6, 3), np.float32)
    boxes[0, 2], scores[0, 2, 1] = BOX, 0.7
    rows = [scores, boxes] if swap else [boxes, scores]

    (found,) = detection.decode(rows, ("a", "b"), SIZE)

    assert found.tolist() == [[*BOX, pytest.approx(0.7), 1.0]]
    assert detection.box_axes([array.shape for array in rows]) == (int(swap), 2)


def test_queries_are_relative_and_their_last_class_is_none():
    logits, boxes = np.full((1, 5, 3), -9.0, np.float32), np.zeros((1, 5, 4), np.float32)
    logits[0, :, 2] = 9.0
    logits[0, 1] = (9.0, 0.0, 0.0)
    boxes[0, 1] = (0.25, 0.375, 0.25, 0.25)

    (found,) = detection.decode([logits, boxes], ("softmax_logits", "pred_boxes"), SIZE)

    assert found.tolist() == [[10.0, 10.0, 30.0, 20.0, pytest.approx(1.0, abs=1e-3), 0.0]]
    assert detection.box_axes([logits.shape, boxes.shape], ("softmax_logits", "pred_boxes")) is None


@pytest.mark.parametrize("swap", [False, True])
def test_queries_with_a_score_for_each_class_have_no_class_for_none(swap):
    logits, boxes = np.full((1, 5, 3), -9.0, np.float32), np.zeros((1, 5, 4), np.float32)
    logits[0, 1, 2] = np.log(3)
    boxes[0, 1] = (0.25, 0.375, 0.25, 0.25)
    rows, names = [logits, boxes], ["sigmoid_logits", "pred_boxes"]

    (found,) = detection.decode(rows[::-1] if swap else rows, names[::-1] if swap else names, SIZE)

    assert found.tolist() == [[10.0, 10.0, 30.0, 20.0, pytest.approx(0.75), 2.0]]


@pytest.mark.parametrize(("classes", "form"), [(92, "softmax_logits"), (91, "sigmoid_logits"), (80, "sigmoid_logits")])
def test_coco_s_number_of_classes_tells_what_plain_logits_are(classes, form):
    assert detection.layout([(1, 300, classes), (1, 300, 4)], ("logits", "pred_boxes")) == form


def test_plain_logits_of_another_number_of_classes_are_refused():
    with pytest.raises(Unsupported) as caught:
        detection.layout([(1, 300, 8), (1, 300, 4)], ("logits", "pred_boxes"))

    assert str(caught.value) == (
        "whether the last of the 8 classes of `logits` is none (DETR) or each has a score of its own (RT-DETR, Deformable "
        "DETR) is not known: name that output softmax_logits or sigmoid_logits"
    )


def test_an_end_to_end_detector_s_rows_are_taken_as_they_are():
    table = np.zeros((2, 300, 6), np.float32)
    table[0, :2] = [(*BOX, 0.4, 3.0), (*BOX, 0.9, 3.0)]  # the same box twice: it says so

    first, second = detection.decode([table], ("output0",), SIZE)

    assert first.tolist() == [[*BOX, pytest.approx(0.9), 3.0], [*BOX, pytest.approx(0.4), 3.0]]
    assert len(second) == 0
    assert detection.box_axes([table.shape]) == (0, 2)
    assert detection.box_axes([(1, 5, 6)]) == (0, 2)  # five boxes of six numbers, not six boxes of five


def test_yolo_rows_of_one_class_are_no_end_to_end_detector_s():
    table = np.zeros((1, 9, 6), np.float32)
    table[0, 3] = (*CENTRE, 0.5, 0.8)

    (found,) = detection.decode([table], ("output",), SIZE)

    assert found.tolist() == [[*BOX, pytest.approx(0.4), 0.0]]


def test_overlapping_boxes_of_one_class_are_suppressed_the_best_stays():
    near = (21.0, 15.0, 20.0, 10.0)
    (same,) = detection.decode(columns((*CENTRE, 0.0, 0.6), (*near, 0.0, 0.9)), ("output",), SIZE)
    (other,) = detection.decode(columns((*CENTRE, 0.6, 0.0), (*near, 0.0, 0.9)), ("output",), SIZE)

    assert same[:, 4].tolist() == [pytest.approx(0.9)]
    assert other[:, 5].tolist() == [1.0, 0.0]


def test_overlap_is_the_closed_form():
    first = np.array([[0.0, 0.0, 2.0, 2.0]])
    second = np.array([[1.0, 0.0, 3.0, 2.0], [5.0, 5.0, 6.0, 6.0]])

    assert detection.overlaps(first, second).tolist() == [[pytest.approx(1 / 3), 0.0]]


def test_matching_uses_each_box_once_and_asks_for_the_class():
    mine = np.array([[*BOX, 0.9, 1.0], [*BOX, 0.8, 1.0], [*BOX, 0.1, 1.0]])
    theirs = np.array([[*BOX, 0.9, 1.0], [*BOX, 0.9, 0.0]])

    assert detection.matched(mine, theirs) == (1, 4)  # the third is too uncertain to count
    assert detection.matched(np.zeros((0, 6)), np.zeros((0, 6))) == (0, 0)


def test_boxes_move_to_the_image_of_which_the_network_saw_a_part():
    moved = detection.to_image(np.array([[0.0, 0.0, 80.0, 40.0, 0.9, 1.0]]), SIZE, (5.0, 10.0, 25.0, 50.0))

    assert moved.tolist() == [[10.0, 5.0, 50.0, 25.0, 0.9, 1.0]]


@pytest.mark.parametrize("shapes", [[(1, 10)], [(1, 5, 6), (1, 5, 7)], [(1, 3, 4, 5)]])
def test_other_outputs_are_refused(shapes):
    with pytest.raises(Unsupported, match=r"are no detector's that rdeploy knows: \(N, 4 \+ classes, candidates\)"):
        detection.layout(shapes)


def detected(*rows):
    return Outputs(arrays=(np.zeros((2, 6, 8)),), detections=np.array(rows, np.float64).reshape(-1, 7))


def test_detectors_agree_by_the_boxes_that_both_have():
    native = detected((0, *BOX, 0.9, 1), (1, *BOX, 0.9, 0))
    variant = detected((0, *BOX, 0.8, 1))

    found = verify.judge(variant, task="detection", native=native)

    assert found.agreement.value == pytest.approx(2 * 1 / 3)
    assert (found.agreement.metric, found.agreement.samples, found.accuracy) == ("agreement", 2, None)
    assert agreement.agree(native, native, "detection").value == 1.0
    assert agreement.agree(detected(), detected(), "detection").value == 1.0


def test_map_is_cocos():
    pytest.importorskip("pycocotools", reason="pycocotools is not installed (extra: coco)")
    truth = Truth(
        boxes=(np.array([[0.125, 0.25, 0.375, 0.5, 1]]), np.array([[0.125, 0.25, 0.375, 0.5, 0]])), frame=SIZE
    )
    right = detected((0, *BOX, 0.9, 1), (1, *BOX, 0.9, 0))
    half = detected((0, *BOX, 0.9, 1))

    found = verify.judge(half, task="detection", native=right, truth=truth).accuracy

    assert (found.metric, found.labelled, found.samples) == ("map", True, 2)
    assert (found.value, found.reference, found.drop) == (pytest.approx(0.5), pytest.approx(1.0), pytest.approx(0.5))
    assert found.ci95[0] <= 0.5 <= found.ci95[1]


def test_what_is_missing_for_map_is_said(monkeypatch):
    monkeypatch.setattr(coco.importlib.util, "find_spec", lambda _: None)

    assert (
        coco.unavailable()
        == "mAP needs pycocotools, which is not installed; install it with: pip install 'rdeploy[coco]'"
    )
