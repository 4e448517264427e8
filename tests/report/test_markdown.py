import dataclasses

from rdeploy.report import markdown
from rdeploy.results import Failure, Result
from rdeploy.types import Variant


def test_the_native_baseline_comes_first_then_every_engine(result):
    rows = markdown.table(result)

    assert [(row.variant, row.backend) for row in rows] == [
        ("native", "openvino"),
        ("native", "onnxruntime"),
        ("r6-int8", "tensorrt_rtx"),
        ("r6-int8", "openvino"),
        ("r6-int8", "onnxruntime"),
        ("r6-int8", "reference"),
    ]


def test_a_row_says_what_was_measured_in_its_units(result):
    row = markdown.table(result)[3]

    assert (row.resolution, row.precision, row.p50_ms, row.speedup) == ("6", "int8", "1.00", "2.50x faster")
    assert (row.interval, row.memory_mb, row.gmacs, row.parity_db) == ("[2.45, 2.55]", "50.0", "0.00", "21.5")
    assert (row.accuracy, row.agreement) == ("85.0 [64.0, 95.0]", "96.0 [90.0, 99.0]")
    assert row.status == ""


def test_what_could_not_be_measured_or_built_says_why_in_its_row(result):
    rows = {row.backend: row for row in markdown.table(result)[2:]}

    assert rows["tensorrt_rtx"].status == "built for sm_89"
    assert rows["tensorrt_rtx"].p50_ms == "–"
    assert rows["reference"].status == "build failed"


def test_a_variant_that_failed_whole_is_one_row_and_one_line_under_failures(result):
    failure = Failure(stage="export", error="StageError", message="op Foo\nis unknown", reproduce="rdeploy build x")
    lost = Result(variant=Variant(resolution=(4, 4)), target="cpu", status="failed", failure=failure)

    report = markdown.render(dataclasses.replace(result, variants=(*result.variants, lost)))

    assert "| r4-fp32 | 4 | fp32 | – |" in report
    assert "- r4-fp32: export: op Foo is unknown; again with `rdeploy build x`" in report


def test_an_engine_that_failed_verification_is_a_failure_with_its_reasons(result):
    row = result.variants[0]
    refused = dataclasses.replace(row.engines[1].verification, passed=False, reasons=("the output is constant",))
    engines = (dataclasses.replace(row.engines[1], verification=refused),)

    report = markdown.render(dataclasses.replace(result, variants=(dataclasses.replace(row, engines=engines),)))

    assert "verification failed" in report
    assert "- r6-int8 on openvino: verify: the output is constant" in report


def test_the_report_tells_what_was_assumed_snapped_calibrated_and_how_long_it_took(result):
    report = markdown.render(result)

    assert "Assumed, because nobody said so: crop_pct." in report
    assert "- r6-int8: snapped from 5 to 6" in report
    assert "- r6-int8: percentile, 40 images, 97.0 % of the MACs in INT8" in report
    assert "- r6-int8: head left in float: first layer" in report
    assert "- 40 images: ranges may not cover what the model will see" in report
    assert "- export: 2.5 s" in report
    assert "- runtimes: openvino 1.0" in report
    assert "- r6-int8 on reference: build: no such op; again with `rdeploy worker j`" in report


def test_every_line_of_the_table_has_as_many_cells_as_its_head(result):
    lines = [line for line in markdown.render(result).splitlines() if line.startswith("|")]

    assert len(lines) == 2 + 6
    assert len({line.count("|") for line in lines}) == 1


def test_a_bar_in_a_name_does_not_break_the_table(result):
    row = result.variants[0]
    engine = dataclasses.replace(row.engines[0], backend="a|b")

    report = markdown.render(dataclasses.replace(result, variants=(dataclasses.replace(row, engines=(engine,)),)))

    assert "| a\\|b |" in report


def test_only_so_many_layers_are_listed(result):
    row = result.variants[0]
    many = dataclasses.replace(row.quantization, skipped=tuple((f"layer{i}", "float") for i in range(9)))

    report = markdown.render(dataclasses.replace(result, variants=(dataclasses.replace(row, quantization=many),)))

    assert "layer4 left in float" in report
    assert "layer5 left in float" not in report
    assert "4 more layers left in float, see manifest.json" in report


def test_an_unfit_machine_is_a_star_in_the_row_and_its_reason_in_the_notes(result):
    row = result.variants[0]
    busy = dataclasses.replace(row.engines[1].measurement, unfit=("load 3.1 on 2 cores",))
    engines = (dataclasses.replace(row.engines[1], measurement=busy),)
    changed = dataclasses.replace(result, variants=(dataclasses.replace(row, engines=engines),))

    shown = markdown.table(changed)[2]
    assert (shown.p50_ms, shown.status, shown.speedup) == ("1.00*", "", "2.50x faster")
    assert markdown.doubts(changed) == ("* the machine was not fit to measure on: load 3.1 on 2 cores",)
    assert "- * the machine was not fit to measure on: load 3.1 on 2 cores" in markdown.render(changed)
    assert markdown.doubts(result) == ()
