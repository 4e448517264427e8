"""How does the throughput of judging and building grow with the nodes of a Ray cluster?

    python benchmarks/scale_out.py --data photos/ [--nodes 1 --nodes 2] [--out benchmarks/results/scale_out.md]

A local cluster of nodes with stores of their own; each node is pinned to one core (two nodes share a core where there are
more nodes than cores, and gain nothing then). The same variants are judged in FP32 and built in INT8 with empty stores,
through the very crew that `rdeploy optimize --workers` has; nothing is measured. Starting the cluster and loading PyTorch on
each node is counted apart: a long search pays it once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import networks

from rdeploy import cluster, intake, judging
from rdeploy.pipeline import engines
from rdeploy.search_request import search_request
from rdeploy.types import QuantOptions, Variant


@contextlib.contextmanager
def started(nodes: int, folder: Path) -> Iterator[str]:
    """Start a head that computes nothing and so many nodes, each on one core; yield the address."""
    from ray.cluster_utils import Cluster

    cores = sorted(os.sched_getaffinity(0))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for index in range(nodes):
            os.sched_setaffinity(0, {cores[index % len(cores)]})  # the node's processes inherit it
            paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
            own = {"RDEPLOY_CACHE": str(folder / f"node{index}"), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
            made.add_node(num_cpus=1, env_vars=own)
            os.sched_setaffinity(0, set(cores))
        yield made.address
    finally:
        os.sched_setaffinity(0, set(cores))
        made.shutdown()


def timed(nodes: int, options: argparse.Namespace) -> tuple[float, float, float]:
    """Return the seconds of loading, of judging all variants, and of building them."""
    with tempfile.TemporaryDirectory(prefix="rdeploy-scale-") as work:
        os.environ["RDEPLOY_CACHE"] = str(Path(work) / "search")
        asked = {"calib": str(options.data), "calib_samples": options.images, "random_init": True, "int8": True}
        request = search_request(options.model, {**asked, "recipe": "fast", "backend": "onnxruntime", "out": work})
        this, _ = intake.take_in(request.build, lambda text: print(f"  {text}", file=sys.stderr, flush=True))
        native = judging.native_row(this)
        outputs = engines.native_outputs(this, native)
        side = this.spec.native_resolution[0]
        sizes = [side - 16 * step for step in range(1, options.variants + 1)]
        exact = [Variant(resolution=(size, size)) for size in sizes]
        quant = QuantOptions(recipe="fast", samples=options.images)
        with started(nodes, Path(work)) as address, cluster.join(address, this, native, outputs) as crew:
            clock = [time.monotonic()]
            crew.judge([native.variant] * nodes, min(2, options.images))
            clock.append(time.monotonic())
            crew.judge(exact, options.images)
            clock.append(time.monotonic())
            variants = [replace(one, precision="int8", quant=quant) for one in exact]
            crew.begin(variants)
            for variant in variants:
                crew.bring(variant)
            clock.append(time.monotonic())
    loading, judged, built = (after - before for before, after in itertools.pairwise(clock))
    return loading, judged, built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of images")
    parser.add_argument("--nodes", type=int, action="append")
    parser.add_argument("--model", default="torchvision:resnet18")
    parser.add_argument("--variants", type=int, default=6)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = ["| nodes | judge, s | build, s | variants a minute | against one node |", "|---|---|---|---|---|"]
    first = None
    for nodes in options.nodes or [1, 2, 4]:
        _, judged, built = timed(nodes, options)
        rate = 60 * options.variants / (judged + built)
        first = first or rate
        lines.append(f"| {nodes} | {judged:.0f} | {built:.0f} | {rate:.1f} | {rate / first:.2f}x |")
        print(lines[-1], flush=True)
    cores = len(os.sched_getaffinity(0))
    what = f"{options.model}, {options.variants} variants, {options.images} images; this machine has {cores} cores"
    text = "\n".join([*lines, "", f"{what}. {networks.machine()}"])
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(f"# Throughput against nodes\n\n{text}\n")


if __name__ == "__main__":
    main()
