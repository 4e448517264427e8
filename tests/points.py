"""Candidates and measured points for the tests of a search; loaded by path, as the tests are no package."""

from rdeploy.search import Candidate, Evidence, Interval, Point
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
