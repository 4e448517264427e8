"""How often the gate cries wolf, and how often it finds a real slow-down: an A/A study and injected slow-downs, under load.

    python benchmarks/gate.py [--comparisons 200] [--injected 20] [--launches 6] [--samples FILE.jsonl] [--out RESULT.md]

The network is a chain of 20 equal convolutions; a slow-down of 5, 10 or 20 % is the same chain with 1, 2 or 4 more of
them. Every comparison is what `rdeploy check --rerun-baseline` measures: so many launches, fresh processes on both sides
in each, interleaved. A second process loads the machine meanwhile, on and off at random. The samples are appended to a
file as they come, so that a study can be interrupted, continued, and judged again under other budgets without measuring.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean, median, stdev

LAYERS, CHANNELS, SIDE = 20, 16, 28
EXTRA = {0: 0, 5: 1, 10: 2, 20: 4}
BUDGETS = (0.0, 0.02, 0.05, 0.10)
ALPHA = 0.01


def write_chain(path: Path, layers: int) -> None:
    """Write a chain of equal 3x3 convolutions with ReLU as ONNX."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    shape = [1, CHANNELS, SIDE, SIDE]
    nodes, weights = [], []
    for index in range(layers):
        kernel = rng.standard_normal((CHANNELS, CHANNELS, 3, 3)).astype(np.float32) / (3 * CHANNELS**0.5)
        weights.append(numpy_helper.from_array(kernel, f"w{index}"))
        nodes.append(helper.make_node("Conv", [f"x{index}", f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"x{index + 1}"]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, shape)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def load_the_machine(seed: int) -> None:
    """Keep one core busy for 0.05 to 1 s, rest as long, and so on."""
    import numpy as np

    rng = random.Random(seed)
    a = np.ones((160, 160), np.float32)
    while os.getppid() != 1:
        end = time.monotonic() + rng.uniform(0.05, 1.0)
        while time.monotonic() < end:
            a = np.tanh(a @ a)
        time.sleep(rng.uniform(0.05, 1.0))


def build(folder: Path) -> dict[int, Path]:
    """Return slow-down in percent -> the engine of that chain."""
    from rdeploy import backends
    from rdeploy.types import Target

    module, engines = backends.find("onnxruntime"), {}
    for percent, extra in EXTRA.items():
        onnx = folder / f"chain-{percent}.onnx"
        write_chain(onnx, LAYERS + extra)
        place = folder / f"engine-{percent}"
        place.mkdir()
        engine = module.build_engine(onnx, place, target=Target(name="cpu"), options=module.Options())
        engines[percent] = place / engine.path
    return engines


def comparison(engines: dict[int, Path], percent: int, count: int, seed: int) -> dict:
    """Return what the gate reads of every launch of both sides (ms), the median beside it, and the load."""
    from rdeploy import launches

    places = {
        "current": launches.Place(backend="onnxruntime", path=engines[percent]),
        "baseline": launches.Place(backend="onnxruntime", path=engines[0]),
    }
    found = launches.measure(places, count, threads=1, seed=seed)
    if found.failures:
        sys.exit(f"a side failed: {found.failures}")
    row: dict = {"load": round(os.getloadavg()[0], 2)}
    for side, measured in found.launches.items():
        row[side] = [launch.latency_ms for launch in measured]
        row[f"{side}_p50"] = [median(x for block in launch.blocks_ms for x in block) for launch in measured]
        row[f"{side}_mean"] = [launch.mean_ms for launch in measured]
    return row


def study(arguments: argparse.Namespace, samples: Path) -> None:
    """Measure what the file does not hold yet, A/A and slow-downs in a seeded mixed order."""
    wanted = [0] * arguments.comparisons + [p for p in EXTRA if p for _ in range(arguments.injected)]
    order = list(enumerate(wanted))
    random.Random(arguments.seed).shuffle(order)
    done = {row["id"] for row in read(samples)}
    burner = multiprocessing.get_context("spawn").Process(target=load_the_machine, args=(arguments.seed,), daemon=True)
    burner.start()
    try:
        with tempfile.TemporaryDirectory(prefix="rdeploy-gate-") as temporary:
            engines = build(Path(temporary))
            for place, (identity, percent) in enumerate(order):
                if identity in done:
                    continue
                row = comparison(engines, percent, arguments.launches, 1000 * identity)
                with samples.open("a") as file:
                    file.write(json.dumps({"id": identity, "at": place, "percent": percent, **row}) + "\n")
    finally:
        burner.kill()
        burner.join()


def read(samples: Path) -> list[dict]:
    """Return the comparisons measured so far, in the order in which they were."""
    if not samples.is_file():
        return []
    return sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["at"])


def verdict(baseline: list[float], current: list[float], budget: float, alpha: float) -> str:
    """Return the gate's own verdict on these launches."""
    from rdeploy import evidence, verdicts

    return verdicts.judge(
        "latency", None, evidence.side_by_side("latency", current, baseline), budget, alpha=alpha
    ).verdict


def sequential(rows: list[dict], budget: float, first: int, most: int) -> Iterator[tuple[str, int]]:
    """Yield verdict and launches of `--until-decided`, started anywhere in the launches of all comparisons in a row."""
    from rdeploy import intervals

    baseline = [x for row in rows for x in row["baseline"]]
    current = [x for row in rows for x in row["current"]]
    for start in range(0, len(baseline) - most, max(1, first // 2)):
        count, look = first, 1
        while True:
            window = slice(start, start + count)
            found = verdict(baseline[window], current[window], budget, intervals.spent(ALPHA, look))
            following = intervals.next_look(count)
            if found != "inconclusive" or following > most:
                yield found, count
                break
            count, look = following, look + 1


def render(arguments: argparse.Namespace, rows: list[dict]) -> str:
    """Return the tables."""
    import networks

    by_percent = {percent: [row for row in rows if row["percent"] == percent] for percent in EXTRA}
    loads = sorted(row["load"] for row in rows)
    lines = [
        "# How often the gate cries wolf, and what it finds",
        "",
        f"A chain of {LAYERS} equal 3x3 convolutions ({CHANNELS} channels, {SIDE}x{SIDE}) on ONNX Runtime, one thread, "
        "against itself (A/A) and against the chain with 1, 2 or 4 more of them. "
        f"Each comparison: {arguments.launches} launches, fresh processes on both sides in each, 99 % interval. "
        "One process loaded the machine on and off; other work was running on it as well: "
        f"load {loads[0]:.1f} to {loads[-1]:.1f}, median {median(loads):.1f}, on {os.cpu_count()} cores. {networks.machine()}",
        "",
        "| work added | comparisons | slow-down found, mean | a launch's scatter: 10th percentile | median | mean |",
        "|---|---|---|---|---|---|",
    ]
    for percent, found in by_percent.items():
        if found:
            lines.append(_measured(percent, found))
    lines += ["", f"## Verdicts after {arguments.launches} launches", "", _head(), "|---|---|" + "---|" * 4]
    for percent, found in by_percent.items():
        for budget in BUDGETS if found else ():
            counts = [verdict(row["baseline"], row["current"], budget, ALPHA) for row in found]
            lines.append(_shares(percent, budget, counts))
    lines += [
        "",
        false_alarms(by_percent[0]),
        "",
        "## Verdicts of `--until-decided`",
        "",
        f"Looks at {arguments.launches} launches, then half as many more each time, up to 42; the error is spent over the "
        "looks. Replayed on the launches above, in the order in which they were measured, started at every third of them.",
        "",
        _head() + " launches, mean |",
        "|---|---|" + "---|" * 5,
    ]
    for percent, found in by_percent.items():
        for budget in BUDGETS if len(found) * arguments.launches > 42 else ():
            ends = list(sequential(found, budget, arguments.launches, 42))
            mean = sum(count for _, count in ends) / len(ends)
            lines.append(f"{_shares(percent, budget, [one for one, _ in ends])} {mean:.1f} |")
    return "\n".join(lines) + "\n"


def _head() -> str:
    return "| work added | budget | n | regression | pass or improvement | inconclusive |"


def _measured(percent: int, rows: list[dict]) -> str:
    every = [c / b for row in rows for b, c in zip(row["baseline"], row["current"])]
    scatters = (f"{_scatter(rows, name):.1%}" for name in ("", "_p50", "_mean"))
    return f"| {_label(percent)} | {len(rows)} | {geometric_mean(every) - 1:+.1%} | {' | '.join(scatters)} |"


def _scatter(rows: list[dict], name: str) -> float:
    """Return the standard deviation between the launches of a comparison, of their log ratios; the median comparison."""
    ratios = [[math.log(c / b) for b, c in zip(row[f"baseline{name}"], row[f"current{name}"])] for row in rows]
    return median(stdev(one) for one in ratios)


def false_alarms(rows: list[dict]) -> str:
    """Return how many of the A/A comparisons were called a regression, and below what the rate is with 95 % confidence."""
    from scipy.special import betaincinv

    counts = []
    for budget in BUDGETS:
        found = sum(verdict(row["baseline"], row["current"], budget, ALPHA) == "regression" for row in rows)
        bound = float(betaincinv(found + 1, len(rows) - found, 0.95)) if found < len(rows) else 1.0
        counts.append(
            f"{found} of {len(rows)} with a budget of {budget:.0%} (rate below {bound:.1%} with 95 % confidence)"
        )
    return f"False regressions in the A/A study: {'; '.join(counts)}."


def _label(percent: int) -> str:
    return f"{percent} %" if percent else "none (A/A)"


def _shares(percent: int, budget: float, found: list[str]) -> str:
    total = len(found)
    regressions, passes = found.count("regression"), found.count("pass") + found.count("improvement")
    shares = (f"{count} ({count / total:.1%})" for count in (regressions, passes, total - regressions - passes))
    return f"| {_label(percent)} | {budget:.0%} | {total} | {' | '.join(shares)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=200, help="A/A comparisons")
    parser.add_argument("--injected", type=int, default=20, help="comparisons of each slow-down")
    parser.add_argument("--launches", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=Path, default=Path("gate.jsonl"), help="where the latencies are kept")
    parser.add_argument("--data", type=Path, help="not used: the input is random numbers")
    parser.add_argument("--out", type=Path, help="write the tables to this file as well")
    parser.add_argument("--judge-only", action="store_true", help="measure nothing, judge what the file holds")
    arguments = parser.parse_args()
    if not arguments.judge_only:
        study(arguments, arguments.samples)
    table = render(arguments, read(arguments.samples))
    print(table)
    if arguments.out:
        arguments.out.write_text(table)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    main()
