"""What `rdeploy profile` shows, from made-up measurements."""

import dataclasses
import io

from rich.console import Console

from rdeploy.measured import EndToEnd, Energy, LayerTime, LayerTimes, Measurement, Memory, Paced, Scenario, Throughput
from rdeploy.report import profile as profile_tables
from rdeploy.results import EngineResult

MEMORY = Memory(weights=1, activations=1, workspace=None, process_peak=50_000_000)


def engine(backend, latency_ms, *, batch=1, **fields):
    measured = Measurement(
        batch=batch, threads=1, latencies_ms=(latency_ms,) * 70, warmup=3, stable=True, memory=MEMORY, **fields
    )
    return EngineResult(backend=backend, measurement=measured)


def shown(found):
    console = Console(file=io.StringIO(), width=140, highlight=False)
    for title, table in profile_tables.tables(found):
        console.print(title)
        console.print(table)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines() if line.strip()]


def test_one_engine_is_one_compact_table():
    assert shown([engine("onnxruntime", 2.0)]) == [
        "engine p50 ms p90 ms p99 ms mean ms cov % images/s peak MB size MB runs",
        "onnxruntime 2.000 2.000 – 2.000 0.0 500.0 50.0 – 70",
    ]


def test_the_knee_of_a_sweep_and_an_unfit_machine_are_marked():
    sweep = [engine("a", 1.0), engine("a", 1.1, batch=2), engine("a", 2.2, batch=4, unfit=("load 3.1 on 2 cores",))]

    lines = shown(sweep)

    assert [line.split()[:2] for line in lines[1:]] == [["a", "b1"], ["a", "b2"], ["a", "b4"]]
    assert [line.split()[-1] for line in lines[1:]] == ["70", "knee", "unfit"]
    assert profile_tables.remarks(sweep) == [
        "rdeploy profile: the machine was not fit to measure on: load 3.1 on 2 cores"
    ]


def test_layers_of_several_runtimes_are_one_table_that_sums_to_the_whole():
    first = [
        LayerTime(name="conv_nchwc", kind="Conv", mean_ms=3.0, layers=("conv", "relu")),
        LayerTime(name="ReorderInput", kind="ReorderInput", mean_ms=0.5),
        LayerTime(name="fc", kind="Gemm", mean_ms=1.0, layers=("fc",)),
    ]
    second = [
        LayerTime(name="conv", kind="Convolution", mean_ms=2.0, layers=("conv",)),
        LayerTime(name="conv add", kind="Subgraph", mean_ms=0.25, layers=("conv",)),
    ]
    times = [
        LayerTimes(profiler="x", runs=1, whole_ms=5.0, remainder_ms=0.5, kernels=tuple(first)),
        LayerTimes(profiler="y", runs=1, whole_ms=2.5, remainder_ms=0.25, kernels=tuple(second)),
    ]

    lines = shown([engine("one", 5.0, layers=times[0]), engine("two", 2.5, layers=times[1])])

    assert lines[-6:] == [
        "layer one two",
        "conv 3.000 2.250",
        "fc 1.000 –",
        "(ReorderInput) 0.500 –",
        "(remainder) 0.500 0.250",
        "whole 5.000 2.500",
    ]


def test_many_layers_are_cut_and_the_rest_is_one_row():
    kernels = tuple(LayerTime(name=f"l{i}", kind="", mean_ms=1.0, layers=(f"l{i}",)) for i in range(20))
    times = LayerTimes(profiler="x", runs=1, whole_ms=21.0, remainder_ms=1.0, kernels=kernels)

    assert "(5 more) 5.000" in shown([engine("one", 5.0, layers=times)])


def test_everything_that_was_asked_for_is_shown():
    energy = Energy(joules_per_run=0.0123, watts=10.0, idle_watts=4.0, runs=9, method="RAPL")
    paced = Paced(
        fps=30.0, paced_ms=(4.0,), back_to_back_ms=(2.0,), idle_cost=2.0, idle_cost_ci95=(1.9, 2.1), verdict="slower"
    )
    stages = EndToEnd(images=2, decode_ms=(1.0, 2.0), preprocess_ms=(3.0, 3.0), inference_ms=(4.0, 5.0))
    one = engine(
        "a",
        2.0,
        energy=energy,
        paced=paced,
        end_to_end=stages,
        throughput=(Throughput(streams=2, threads=1, seconds=1.0, runs=10, images_per_s=10.0, p50_ms=2.0),),
        scenarios=(Scenario(scenario="Offline", valid=False, metric="samples a second", value=9.0),),
    )

    lines = shown([one])

    assert "a 2 1 10.0 2.000 10" in lines
    assert "a 30 4.000 2.000 2.00x slower [1.90, 2.10] 0 of 1" in lines
    assert "a 1.500 3.000 4.500 – – 9.000 2" in lines
    assert "a 12.3 10.0 4.0 RAPL" in lines
    assert "a Offline samples a second 9.000 INVALID" in lines


def test_what_is_doubtful_or_missing_is_said_once():
    locked = Energy(joules_per_run=None, method="RAPL is here, but only root may read it")
    absent = Energy(joules_per_run=None, method="no meter: neither RAPL nor NVML is here")
    first = engine("a", 1.0, energy=locked, notes=("layers: a has no profiler",))
    second = dataclasses.replace(engine("b", 1.0, energy=absent))
    second = dataclasses.replace(second, measurement=dataclasses.replace(second.measurement, stable=False))

    assert profile_tables.remarks([first, second]) == [
        "rdeploy profile: a: RAPL is here, but only root may read it",
        "rdeploy profile: a: layers: a has no profiler",
        "rdeploy profile: b: the latency did not settle",
    ]


def test_another_definition_of_latency_is_said():
    (line,) = profile_tables.remarks([engine("a", 1.0, definition="GPU time between two CUDA events")])

    assert line == "rdeploy profile: a: not comparable with the others: GPU time between two CUDA events"
