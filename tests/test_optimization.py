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
from rdeploy.standing import Watcher

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


class Record:
    """The candidates of a run, as its store keeps them."""

    def __init__(self, *candidates):
        self.kept = {one.variant.id: (one, "") for one in candidates}

    def keep_candidate(self, one, ruled_out=""):
        self.kept[one.variant.id] = one, ruled_out

    def candidates(self):
        return dict(self.kept)


def search_of(**facts):
    """Return as much of a search for 1 point of loss as the choice of what to look at needs."""
    request = SimpleNamespace(precisions=("int8", "fp16"), embed_preprocess=False, recipe="fast", calibrator="auto")
    request.calib_samples = 8
    watcher = Watcher(None, Budget(), deadline=0.0)
    this = SimpleNamespace(judged=[0] * 100, spec=SimpleNamespace(native_resolution=(224, 224)), request=request)
    known = {"this": this, "baseline": SimpleNamespace(variant=variant(224)), "budget": Budget(max_drop=1.0)}
    known["watcher"] = watcher
    return SimpleNamespace(**{**known, "ways": (("openvino", 1),), "left_out": {}, "store": Record(), **facts})


def test_a_size_above_the_native_one_rules_out_no_smaller_one(monkeypatch):
    lost = {448: 30.0, 224: 0.0, 192: 5.0, 160: 9.0}
    one = search_of()
    monkeypatch.setattr(
        optimization, "_judged_float", lambda one, v, count: candidate(v.resolution[0], lost[v.resolution[0]])
    )

    judged = list(optimization._judged_downwards(one, [variant(side) for side in lost], 100))

    assert [c.variant.resolution[0] for c in judged] == [448, 224, 192]
    assert one.store.kept["r160-fp32"][1].startswith("not judged: r192-fp32, which is larger")


def test_a_precision_that_is_left_out_makes_no_candidate_and_fp32_is_only_the_native_model():
    floats = [candidate(224, 0), candidate(160, 0)]
    one = search_of(left_out={"fp16": "the target has none"}, store=Record(*floats))

    rounded = optimization._rounded_candidates(one)
    points = optimization._prospects(one, [*floats, *rounded], [], one.budget).promising()

    assert [c.variant.id for c in rounded] == ["r224-int8", "r160-int8"]
    assert {point.variant.id for point in points} == {"r224-fp32", "r224-int8", "r160-int8"}


def test_the_native_size_has_its_preprocessing_inside_where_that_is_asked_for_but_not_the_native_model():
    one = search_of(store=Record(candidate(224, 0)))
    one.this.request.embed_preprocess = True

    assert [c.variant.embeds_preprocessing for c in optimization._rounded_candidates(one)] == [True, True]
    assert not one.baseline.variant.embeds_preprocessing


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

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: optimization._write_outcome(tmp_path, found), range(200)))

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
