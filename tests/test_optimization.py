"""Which of the hopeful points are measured next."""

import runpy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rdeploy import hardware, optimization
from rdeploy.errors import ConfigError
from rdeploy.run_store import RunStore
from rdeploy.search import Budget, Point
from rdeploy.search_request import search_request

POINTS = runpy.run_path(str(Path(__file__).parent / "points.py"))
candidate, evidence, variant, search_of = (POINTS[n] for n in ("candidate", "evidence", "variant", "search_of"))


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


class Others(RunStore):
    """A run at which another process measures two points: one is found when it is looked for, the other is never done."""

    busy = frozenset({"r160-fp32@openvino", "r128-fp32@openvino"})

    def claim(self, point):
        return point not in self.busy and super().claim(point)

    def elsewhere(self):
        return self.busy

    def done(self, _):
        if "r160-fp32@openvino" in self.busy:
            self.settle("r160-fp32@openvino", evidence(160, 0, 4))
            self.busy -= {"r160-fp32@openvino"}


def test_what_another_process_is_at_is_waited_for_and_at_last_unfinished(tmp_path, monkeypatch):
    store, looks = Others(tmp_path), []
    one = search_of(
        store=store, at_once=3, crew=SimpleNamespace(begin=lambda variants: None, size=0), late=lambda: len(looks) > 3
    )
    one.this.request.precisions = ("fp32",)
    one.budget = Budget(objective="size")  # nothing measured rules another out
    monkeypatch.setattr(optimization.time, "sleep", lambda seconds: (looks.append(seconds), store.done(seconds)))
    monkeypatch.setattr(
        optimization.rounds,
        "measure",
        lambda one, taken: [store.settle(p.id, evidence(p.variant.resolution[0], 0, 8)) for p in taken],
    )

    left = optimization._measure_all(one, [candidate(side, 0) for side in (224, 160, 128)])

    assert [e.point.id for e in store.evidence()] == ["r160-fp32@openvino", "r224-fp32@openvino"]
    assert [point.id for point in left] == ["r128-fp32@openvino"]


def test_two_processes_may_write_the_outcome_at_the_same_time(tmp_path):
    choice = SimpleNamespace(pick=None, second=None, reason="r" * 1000)
    found = SimpleNamespace(choice=choice, front=(), measured=(), ruled_out=(), failures=(), unfinished=())
    found.result = SimpleNamespace(variants=())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: optimization._write_outcome(tmp_path, found, []), range(200)))

    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]


IMAGES = SimpleNamespace(sha256="i", labels=(0, 1))
THIS = SimpleNamespace(spec=SimpleNamespace(sha256="m"), calib=IMAGES, judged=IMAGES, training=None, target="cpu")


def differing(tmp_path, options=None, **changed):
    """Return what is not the same once something has changed."""
    plain = {"out": str(tmp_path), "fp32": True}
    before = optimization._facts(search_request("m.onnx", plain), THIS)
    request = search_request("m.onnx", {**plain, **(options or {})})
    after = optimization._facts(request, SimpleNamespace(**{**vars(THIS), **changed}))
    return [name for name in before if before[name] != after[name]]


def test_a_run_is_another_one_with_other_content_behind_the_same_names(tmp_path, monkeypatch):
    other = SimpleNamespace(sha256="i", labels=(1, 1))

    assert differing(tmp_path, {"time_budget": 60, "resume": True}) == []
    assert differing(tmp_path, {"max_drop": 1.0}) == ["options"]
    assert differing(tmp_path, spec=SimpleNamespace(sha256="x")) == ["model"]
    assert differing(tmp_path, judged=other) == ["judged images or their labels"]
    before = optimization._facts(search_request("m.onnx", {"out": str(tmp_path)}), THIS)
    monkeypatch.setattr(hardware, "cpu_model", lambda: "another CPU")
    after = optimization._facts(search_request("m.onnx", {"out": str(tmp_path)}), THIS)
    assert [name for name in before if before[name] != after[name]] == ["this machine's cpu"]


def test_a_command_that_cannot_begin_leaves_no_record(tmp_path):
    with pytest.raises(ConfigError):
        optimization.optimize(search_request("nothere.onnx", {"out": str(tmp_path / "run")}))

    assert not (tmp_path / "run").exists()


def test_samples_of_which_none_can_be_drawn_lose_nothing_that_was_measured(tmp_path):
    one = search_of(store=RunStore(tmp_path))
    one.this.request.precisions = ("fp32",)
    one.store.keep_candidate(candidate(224, 0))

    optimization._measure_samples(one, 3)

    assert one.left_out["samples"].startswith("nothing to sample: without --int8 and without --at tokens")


def test_a_search_keeps_the_cache_within_its_size(tmp_path, monkeypatch):
    pruned = []
    steps = SimpleNamespace(store=SimpleNamespace(prune=pruned.append))
    this = SimpleNamespace(
        **{**vars(THIS), "spec": SimpleNamespace(sha256="m", native_resolution=(224, 224)), "steps": steps}
    )
    monkeypatch.setattr(optimization, "take_in", lambda request, progress: (this, ()))
    monkeypatch.setattr(optimization, "_measure_all", lambda one, judged: ())
    monkeypatch.setattr(optimization, "_finish", lambda *facts: "found")
    monkeypatch.setattr(optimization.pipeline, "run_variant", lambda *_, **__: None)
    for name in ("batches", "expected"):
        monkeypatch.setattr(optimization.pipeline.advice, name, lambda *_: ())
    monkeypatch.setattr(optimization.engines, "native_outputs", lambda *_: None)
    monkeypatch.setattr(optimization.space, "left_out", lambda *_: {})
    monkeypatch.setattr(optimization.rounds.Search, "batches", (1,))
    for name in ("judged", "rounded", "mixed"):
        monkeypatch.setattr(optimization.candidates, name, lambda *_, **__: [])

    found = optimization.optimize(search_request("m.onnx", {"out": str(tmp_path), "fp32": True}))

    assert found == "found"
    assert pruned == [optimization.pipeline.CACHE_BYTES]
