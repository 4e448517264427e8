"""Candidates and measured points for the tests of a search; loaded by path, as the tests are no package."""

from types import SimpleNamespace

from rdeploy.search import Budget, Candidate, Evidence, Interval, Point
from rdeploy.standing import Watcher
from rdeploy.types import Variant


def interval(value, width=0.5):
    return Interval(value=value, low=value - width, high=value + width)


def variant(side, precision="fp32"):
    return Variant(resolution=(side, side), precision=precision)


def candidate(side, drop, *, macs=None, precision="fp32", width=0.5, changed=None, samples=0, images=64):
    macs = side * side * 1000 if macs is None else macs
    changed = None if changed is None else interval(changed)
    known = {"drop": interval(drop, width), "images": images, "changed": changed, "samples": samples}
    return Candidate(variant=variant(side, precision), macs=macs, **known)


def evidence(side, drop, ms, *, precision="fp32", backend="openvino", batch=1, width=0.5, changed=None, samples=0):
    return Evidence(
        point=Point(variant=variant(side, precision), backend=backend, batch=batch),
        macs=side * side * 1000,
        drop=interval(drop, width),
        latency_ms=interval(ms, ms * 0.01),
        throughput_ips=1000 * batch / ms,
        memory_bytes=100_000_000,
        size_bytes=20_000_000,
        changed=None if changed is None else interval(changed),
        samples=samples,
    )


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
    given = {"embed_preprocess": False, "recipe": "fast", "calibrator": "auto", "calib_samples": 8}
    request = SimpleNamespace(precisions=("int8", "fp16"), **given)
    known = {
        "this": SimpleNamespace(judged=[0] * 100, spec=SimpleNamespace(native_resolution=(224, 224)), request=request),
        "baseline": SimpleNamespace(variant=variant(224)),
        "budget": Budget(max_drop=1.0),
        "watcher": Watcher(None, Budget(), deadline=0.0),
        "store": Record(),
        "ways": (("openvino", 1),),
        "left_out": {},
    }
    return SimpleNamespace(**{**known, **facts})
