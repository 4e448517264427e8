import dataclasses

import pytest

from rdeploy import usability
from rdeploy.adapted import Adaptation, Rung
from rdeploy.measured import Measurement, Memory
from rdeploy.results import Accuracy, EngineResult, Result, Verification
from rdeploy.types import Variant

NOWHERE = Memory(weights=None, activations=None, workspace=None, process_peak=None)


def scored(drop, *, labelled=True, samples=400, changed=0.04):
    """Return a verification that lost `drop` points; without labels so many decisions changed."""
    agreed = changed if labelled else drop / 100
    agreement = Accuracy(
        metric="agreement",
        value=1 - agreed,
        reference=1.0,
        drop=agreed,
        ci95=(0.9, 0.99),
        samples=samples,
        labelled=False,
    )
    top1 = Accuracy(
        metric="top1",
        value=0.9 - drop / 100,
        reference=0.9,
        drop=drop / 100,
        ci95=(0.8, 0.95),
        samples=samples,
        labelled=True,
    )
    return Verification(passed=True, accuracy=top1 if labelled else None, agreement=agreement)


def variant(side, p50_ms, drop, *, precision="fp32", like, **more):
    """Return a row like the fixture's whose one engine takes `p50_ms` and lost `drop` points."""
    measurement = Measurement(
        batch=1, threads=1, latencies_ms=(p50_ms,) * 3, warmup=1, stable=True, memory=NOWHERE, load=None
    )
    engine = dataclasses.replace(
        like.engines[0], verification=scored(drop, **more), measurement=None if p50_ms is None else measurement
    )
    return Result(
        variant=Variant(resolution=(side, side), precision=precision), target="cpu", status="ok", engines=(engine,)
    )


def judged(result, *rows):
    like = result.variants[0]
    made = tuple(variant(*row[:3], like=like, **(row[3] if len(row) > 3 else {})) for row in rows)
    found = usability.judge(dataclasses.replace(result, variants=made))
    return [row.usability for row in found.variants]


def test_a_small_loss_is_usable_and_says_on_how_many_images(result):
    (one,) = judged(result, (6, 1.0, 1.5))

    assert (one.verdict, one.by, one.labelled) == ("usable", None, True)
    assert one.drop == pytest.approx(1.5)
    # Agresti and Min: (0.04 x 400 + 1) / 402 changed, 1.96 sqrt((0.0423 - 0.015^2) / 402).
    assert one.reason == "loses 1.5 points [-0.5, 3.5] on 400 labelled images"


def test_an_interval_that_was_found_by_resampling_is_taken_as_it_is():
    verification = scored(1.3)
    miou = dataclasses.replace(verification.accuracy, metric="miou", drop_ci95=(0.004, 0.02))

    lost = usability.points_lost(dataclasses.replace(verification, accuracy=miou))

    assert (lost.drop, lost.ci95) == (pytest.approx(1.3), pytest.approx((0.4, 2.0)))


def test_a_large_loss_needs_fine_tuning(result):
    (one,) = judged(result, (6, 1.0, 9.0))

    assert one.verdict == "needs fine-tuning"
    assert one.reason.endswith("more than 2; fine-tune it with --finetune DIR, or take a higher resolution")


@pytest.mark.parametrize("change", [{"source": "net.onnx"}, {"task": "detection"}])
def test_what_rdeploy_does_not_train_is_sent_to_its_own_training(result, change):
    spec = dataclasses.replace(result.spec, **change)

    (one,) = judged(dataclasses.replace(result, spec=spec), (6, 1.0, 9.0))

    assert one.reason.endswith("train the original model at this resolution, or take a higher one")


def test_without_labels_decisions_that_changed_count(result):
    few, many = judged(result, (7, 2.0, 4.0, {"labelled": False}), (6, 1.0, 9.0, {"labelled": False}))

    assert (few.verdict, few.labelled) == ("usable", False)
    assert few.reason == "changes 4.0 % [1.0, 10.0] of the decisions on 400 images"
    assert many.verdict == "needs fine-tuning"
    assert "more than 5" in many.reason


def test_what_another_variant_beats_in_both_is_dominated_by_it(result):
    better, worse = judged(result, (7, 1.0, 0.4), (6, 1.3, 1.6))

    assert better.verdict == "usable"
    assert (worse.verdict, worse.by) == ("dominated", "r7-fp32")
    assert worse.reason == "r7-fp32 takes 1.00 ms and loses 0.4 points, this 1.30 ms and 1.6"


def test_the_native_model_dominates_what_is_slower_than_it(result):
    (one,) = judged(result, (6, 9.0, 0.1))

    assert (one.verdict, one.by) == ("dominated", "native")


@pytest.mark.parametrize(("p50_ms", "drop"), [(1.0, 1.2), (1.02, 1.0), (0.99, 9.0)])
def test_what_is_within_noise_or_better_in_one_thing_dominates_nothing(result, p50_ms, drop):
    first, second = judged(result, (7, 1.0, 1.0), (6, p50_ms, drop))

    assert first.verdict != "dominated"
    assert second.verdict != "dominated"


def test_what_was_not_measured_here_is_not_compared_by_speed(result):
    _, second = judged(result, (7, 1.0, 0.4), (6, None, 1.0))

    assert second.verdict == "usable"


def test_where_int8_costs_it_is_not_the_resolution_that_is_to_be_trained(result):
    _, quantized = judged(result, (6, 2.0, 1.0), (6, 1.0, 7.0, {"precision": "int8"}))

    assert quantized.verdict == "needs fine-tuning"
    assert quantized.reason.endswith("FP32 at this resolution loses 1.0, so it is INT8 that costs: --max-drop")


@pytest.mark.parametrize(
    ("kept", "said"), [(True, "it was fine-tuned"), (False, "fine-tuning was tried and gained nothing")]
)
def test_what_was_fine_tuned_already_needs_more_images(result, kept, said):
    like = result.variants[0]
    rungs = (Rung(step="plain", kept=True, agreement=0.7), Rung(step="distill", kept=kept, agreement=0.8))
    row = dataclasses.replace(variant(6, 1.0, 9.0, like=like), adaptation=Adaptation(rungs=rungs))

    found = usability.judge(dataclasses.replace(result, variants=(row,)))

    assert found.variants[0].usability.reason.endswith(f"{said}: more images or epochs, or a higher resolution")


def test_without_anything_to_compare_there_is_no_verdict(result):
    row = dataclasses.replace(result.variants[0], engines=(EngineResult(backend="reference"),))

    found = usability.judge(dataclasses.replace(result, variants=(row,)))

    assert found.variants[0].usability is None
    assert usability.points_lost(None) is None


def test_an_engine_that_failed_verification_gets_no_verdict(result):
    row = variant(6, 1.0, 1.0, like=result.variants[0])
    engine = dataclasses.replace(row.engines[0], verification=Verification(passed=False, reasons=("constant",)))

    found = usability.judge(dataclasses.replace(result, variants=(dataclasses.replace(row, engines=(engine,)),)))

    assert found.variants[0].usability is None
