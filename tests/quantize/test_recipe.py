"""The whole of quantization on small graphs: what is chosen, what is said about it, what is refused."""

import dataclasses
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx  # noqa: E402
from onnx import numpy_helper  # noqa: E402

from rdeploy.errors import ConfigError, StageError, Unsupported  # noqa: E402
from rdeploy.quantize import check, families, judge, recipe  # noqa: E402
from rdeploy.quantize.histogram import Histogram  # noqa: E402
from rdeploy.quantize.repair import equalization  # noqa: E402
from rdeploy.types import QuantOptions, QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
OPS = ("Conv", "Gemm", "MatMul", "Add", "GlobalAveragePool")
AFFINE = QuantScheme(name="affine", activations="uint8", ops=OPS, output_ops=("Conv",))
SYMMETRIC = QuantScheme(name="symmetric", activations="int8", ops=OPS, residual="branch")

NET = """
    a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) c = Conv<pads=[1,1,1,1]>(r, u) s = Add(c, r) t = Relu(s)
    d = Conv(t, v) p = GlobalAveragePool(d) f = Flatten(p) y = Gemm<transB=1>(f, k)
"""
ARRAYS = {
    "w": W(6, 3, 3, 3, seed=1, scale=0.3),
    "b": W(6, seed=2, scale=0.1),
    "u": W(6, 6, 3, 3, seed=3, scale=0.15),
    "v": W(8, 6, 1, 1, seed=4, scale=0.4),
    "k": W(5, 8, seed=5),
}


def images(count=12, *, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(1, 3, 8, 8)).astype(np.float32) * rng.uniform(0.5, 1.5) for _ in range(count)]


def network(folder, body=NET, arrays=ARRAYS, **facts):
    return TEXT["write"](folder / "fp32.onnx", body, **facts, **arrays)


def quantized(path, out, scheme=AFFINE, batches=None, options=None):
    batches = batches or images()
    options = options or QuantOptions()
    seen = recipe.calibrate(path, path.parent, schemes=[scheme], images=batches, recipe=options.recipe)
    return recipe.quantize(seen, out, scheme=scheme, images=batches, options=options)


def step(found, start):
    """The one line of the recipe that starts so."""
    (line,) = [line for line in found.recipe if line.startswith(start)]
    return line


def sqnr_db(path, out, batches):
    exact, rounded = (np.concatenate([TEXT["run"](p, b) for b in batches]) for p in (path, out))
    return 10 * np.log10(np.square(exact).sum() / np.square(exact - rounded).sum())


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC], ids=lambda s: s.name)
def test_the_quantized_graph_is_legal_close_to_float_and_says_what_was_done(scheme, tmp_path):
    path, out = network(tmp_path), tmp_path / "int8.onnx"

    found = quantized(path, out, scheme)

    check.check_legal(out, scheme)
    onnx.checker.check_model(str(out), full_check=True)
    assert sqnr_db(path, out, images(20, seed=8)) > 25
    assert found.calibrator in families.RECIPES["plain"].calibrators
    assert found.samples == 12
    assert found.coverage == 1
    assert found.skipped == ()
    assert found.recipe[0] == "recipe plain"
    tried = "; ".join(rf"{name} \d+\.\d dB" for name in families.RECIPES["plain"].calibrators)
    assert re.fullmatch(tried, step(found, "minmax"))
    two = r"\w+ \d+\.\d dB, \w+ \d+\.\d dB"
    assert re.fullmatch(rf"biases corrected, {two}: \w+ kept", step(found, "biases"))
    for name in ("equalization", "bias correction"):
        assert re.fullmatch(rf"{name} [+-]\d+\.\d dB: (kept|dropped)", step(found, f"{name} "))


def test_ranges_see_images_that_channels_were_not_equalized_on(tmp_path, monkeypatch):
    watched = []
    monkeypatch.setattr(equalization, "equalize", lambda path, out, schemes, batches: watched.append(len(batches)) or 0)

    found = recipe.calibrate(network(tmp_path), tmp_path, schemes=[AFFINE], images=images(12))

    assert watched == [6]
    assert found.graphs[0].histograms["x"].batches == 12


def test_what_is_kept_is_what_scored_best(tmp_path):
    found = quantized(network(tmp_path), tmp_path / "int8.onnx")

    plain = re.findall(r"(\w+) (\d+\.\d) dB", step(found, "minmax"))
    finalists = {name for name, _ in sorted(plain, key=lambda one: -float(one[1]))[:2]}
    line = step(found, "biases")
    scores = {name: float(score) for name, score in re.findall(r"(\w+) (\d+\.\d) dB", line)}
    assert set(scores) == finalists
    assert line.endswith(f": {max(scores, key=scores.get)} kept")
    for line in found.recipe:
        if gained := re.search(r" ([+-]\d+\.\d) dB: (kept|dropped)", line):
            assert gained[2] == ("kept" if float(gained[1]) > 0 else "dropped") or "0.0" in line


@pytest.mark.parametrize(
    ("scores", "felt", "finalists", "kept"),
    [
        ({"mse": 20.0, "minmax": 19.8, "gradient": 19.5}, 10, ["mse", "minmax", "gradient"], "mse"),
        ({"mse": 20.0, "minmax": 19.7, "gradient": 19.8}, 10, ["mse", "gradient"], "gradient"),
        ({"mse": 20.0, "minmax": 19.7, "gradient": 19.8}, 4, ["mse", "gradient"], "mse"),  # of few images
        ({"mse": 20.0, "minmax": 19.8, "gradient": 19.5}, 4, ["mse", "minmax", "gradient"], "mse"),
        ({"mse": 20.0, "minmax": 19.8, "gradient": 18.5}, 10, ["mse", "minmax"], "mse"),
        ({"minmax": 18.0, "mse": 19.0, "gradient": 20.0}, 10, ["gradient", "mse"], "gradient"),
    ],
)
def test_ranges_that_allow_for_unseen_images_are_kept_if_they_come_close(scores, felt, finalists, kept):
    seen = Histogram(batches=10)
    by_gradient = Histogram(batches=10, felt=[np.zeros(4, np.float32)] * felt)
    watched = judge.Watched("exported", Path("none.onnx"), {"x": seen}, {"x": by_gradient})
    drafts = [judge.Draft(watched, name, {}, score) for name, score in scores.items()]

    found = recipe._finalists(drafts)

    assert [draft.calibrator for draft in found] == finalists
    attempts = [recipe._Attempt(draft, lambda model, placement: {}, draft.sqnr_db) for draft in found]
    assert recipe._best_ranges(attempts).draft.calibrator == kept


def test_a_graph_that_cannot_win_is_not_repaired(tmp_path, monkeypatch):
    """Its biases are corrected, to compare it; what takes longer is left to those that are close."""
    solved, scored = [], judge.Judge.score
    monkeypatch.setitem(
        recipe.REPAIRS,
        "error_feedback",
        lambda judge, draft, start: solved.append(draft.graph.name) or [judge.nearest(draft.graph)],
    )
    monkeypatch.setattr(
        judge.Judge,
        "score",
        lambda self, draft, repair: scored(self, draft, repair) - 9 * (draft.graph.name == "equalized"),
    )

    found = quantized(network(tmp_path), tmp_path / "int8.onnx")

    assert solved == ["exported"]
    assert step(found, "equalization").endswith("dropped")


def test_of_two_ways_to_finish_a_repair_the_closer_one_is_kept(tmp_path, monkeypatch):
    path, batches = network(tmp_path), images()
    seen = recipe.calibrate(path, tmp_path, schemes=[AFFINE], images=batches, recipe="plain")
    own = judge.Judge(path, tmp_path / "o.onnx", AFFINE, batches, {}, ())
    attempt = recipe._begin(own, recipe._draft(own, seen.graphs[0], "minmax", QuantOptions()))
    ways = recipe.REPAIRS["error_feedback"](own, attempt.draft, attempt.repair)
    scores = [own.score(attempt.draft, way) for way in ways]
    monkeypatch.setitem(recipe.REPAIRS, "error_feedback", lambda judge, draft, start: ways)

    found = recipe._repair(own, attempt, "error_feedback")

    assert len(ways) == 2
    assert found.sqnr_db == max(*scores, attempt.sqnr_db)


def test_auto_keeps_the_outliers_that_decide_the_output(tmp_path):
    """The output is the ninth power of what is quantized: only the one pixel in 4096 that is far out counts."""
    body = "c = Conv(x, w) c2 = Mul(c, c) c3 = Mul(c2, c) c6 = Mul(c3, c3) y = Mul(c6, c3)"
    path = network(tmp_path, body, {"w": W(2, 3, 1, 1)}, x=(1, 3, 64, 64))
    batches = [W(1, 3, 64, 64, seed=i) for i in range(8)]
    for batch in batches:
        batch[0, 1, 30, 30] = 40.0

    assert quantized(path, tmp_path / "int8.onnx", SYMMETRIC, batches).calibrator == "minmax"


def test_auto_clips_a_heavy_tail(tmp_path):
    rng = np.random.default_rng(0)
    batches = [rng.standard_t(3, size=(1, 3, 64, 64)).astype(np.float32) for _ in range(8)]
    path = network(tmp_path, "y = Conv(x, w)", {"w": W(6, 3, 1, 1)}, x=(1, 3, 64, 64))

    found = quantized(path, tmp_path / "int8.onnx", SYMMETRIC, batches)

    assert found.calibrator in ("percentile", "mse", "gradient")
    exact, best = (
        float(re.search(rf"{name} (\d+\.\d) dB", step(found, "minmax"))[1]) for name in ("minmax", found.calibrator)
    )
    assert best > exact + 0.5


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse", "entropy"])
def test_a_calibrator_that_was_asked_for_is_the_one_that_is_used(name, tmp_path):
    found = quantized(network(tmp_path), tmp_path / "int8.onnx", options=QuantOptions(calibrator=name))

    assert found.calibrator == name
    assert re.fullmatch(rf"{name} \d+\.\d dB", step(found, name))


def test_the_calibrators_options_reach_it(tmp_path):
    path = network(tmp_path)
    options = QuantOptions(calibrator="percentile", calibrator_options=(("percentile", 60.0),))

    rough = quantized(path, tmp_path / "rough.onnx", options=options)

    assert float(step(rough, "percentile").split()[1]) < 15  # 40 % of everything is clipped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (QuantOptions(calibrator="minmux"), r"unknown calibrator 'minmux', did you mean 'minmax'\?"),
        (
            QuantOptions(calibrator="percentile", calibrator_options=(("percentil", 99.0),)),
            r"calibrator percentile: unknown key 'percentil', did you mean 'percentile'\?",
        ),
        (
            QuantOptions(calibrator="minmax", calibrator_options=(("power", 1.0),)),
            r"calibrator minmax: unknown key 'power' \(allowed: none\)",
        ),
    ],
)
def test_an_option_that_is_wrong_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        quantized(network(tmp_path), tmp_path / "int8.onnx", options=options)


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    path = network(tmp_path)

    facts = [quantized(path, tmp_path / f"{i}.onnx") for i in range(2)]

    assert facts[0] == facts[1]
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()


def test_two_schemes_share_one_pass_over_the_images_and_their_weights(tmp_path):
    path, weights, batches = network(tmp_path), {}, images()
    seen = recipe.calibrate(path, tmp_path, schemes=[AFFINE, SYMMETRIC], images=batches)

    for scheme in (AFFINE, SYMMETRIC):
        facts = {"scheme": scheme, "images": batches, "options": QuantOptions()}
        recipe.quantize(seen, tmp_path / f"{scheme.name}.onnx", weights=weights, **facts)
        recipe.quantize(seen, tmp_path / "alone.onnx", **facts)
        assert (tmp_path / f"{scheme.name}.onnx").read_bytes() == (tmp_path / "alone.onnx").read_bytes()
    assert set(weights) <= {"exported", "equalized"}
    assert {name.partition("::")[0] for known in weights.values() for name, _, _ in known} == {"w", "u", "v", "k"}


@pytest.mark.parametrize("count", [1, 2, 33])
def test_any_number_of_images_will_do(count, tmp_path):
    path, out = network(tmp_path), tmp_path / "int8.onnx"

    assert quantized(path, out, batches=images(count)).samples == count
    assert sqnr_db(path, out, images(count)) > 15


def test_layers_that_stay_in_float_are_listed_with_the_reason(tmp_path):
    body = "h = MatMul(x, w) t = Transpose<perm=[0,2,1]>(h) g = MatMul(h, t) y = MatMul(g, v)"
    path = network(tmp_path, body, {"w": W(8, 8), "v": W(6, 4)}, x=(1, 6, 8))
    batches = [W(1, 6, 8, seed=i) for i in range(4)]

    found = quantized(path, tmp_path / "int8.onnx", batches=batches)

    assert found.skipped == (("g", "multiplies two activations (attention)"),)
    assert found.coverage == (6 * 8 * 8 + 6 * 6 * 4) / (6 * 8 * 8 + 6 * 8 * 6 + 6 * 6 * 4)


def test_what_attention_multiplies_can_have_ranges_of_its_own(tmp_path):
    """A few large queries decide; the mean square of the errors of all values does not mind cutting them."""
    body = "h = MatMul(x, w) t = Transpose<perm=[0,2,1]>(h) g = MatMul(h, t) p = Softmax(g) m = MatMul(p, h) y = MatMul(m, v)"
    path = network(tmp_path, body, {"w": W(8, 8), "v": W(8, 4)}, x=(1, 6, 8))
    batches = [
        W(1, 6, 8, seed=i) * np.where(np.arange(6) == i % 6, 6, 0.3)[:, None].astype(np.float32) for i in range(12)
    ]

    found = quantized(path, tmp_path / "int8.onnx", batches=batches, options=QuantOptions(recipe="attention"))
    alone = quantized(
        path, tmp_path / "mse.onnx", batches=batches, options=QuantOptions(recipe="attention", calibrator="mse")
    )

    (tried,) = [line for line in found.recipe if line.startswith("minmax ")]
    scores = {name: float(db) for name, db in re.findall(r"(\S+) (-?[\d.]+) dB", tried)}
    assert {"mse", "mse+mean_extremes", "minmax+mean_extremes"} <= set(scores)
    assert scores["mse+mean_extremes"] != scores["mse"]
    assert found.calibrator in scores
    assert alone.calibrator == "mse"
    check.check_legal(tmp_path / "int8.onnx", dataclasses.replace(AFFINE, products="all", patches=True))


def test_it_is_said_whether_the_images_were_enough(tmp_path):
    path = network(tmp_path)
    steady = [images(1)[0]] * 8
    growing = [image * 2**i for i, image in enumerate([images(1)[0]] * 8)]

    said = [
        quantized(path, tmp_path / "int8.onnx", batches=b, options=QuantOptions(recipe="fast")).recipe[1]
        for b in (steady, growing)
    ]

    assert said == ["ranges stopped moving after 1 of 8 images", "ranges still moved at image 8 of 8: give more images"]


def test_the_thorough_recipe_tries_every_repair_of_the_weights_and_keeps_the_best(tmp_path):
    pytest.importorskip("torch", reason="adaptive rounding needs torch")
    path, out, four_bits = network(tmp_path), tmp_path / "int8.onnx", dataclasses.replace(AFFINE, weight_max=7)

    found = quantized(path, out, four_bits, images(40), QuantOptions(recipe="thorough"))

    gains = []
    for repair in (*families.RECIPES["thorough"].repairs, *families.RECIPES["thorough"].finish):
        name = repair.replace("_", " ")
        gain, verdict = re.fullmatch(rf"{name} ([+-]\d+\.\d) dB: (kept|dropped)", step(found, f"{name} ")).groups()
        gains.append(float(gain))
        assert gains[-1] == 0 or verdict == ("kept" if gains[-1] > 0 else "dropped")
    assert sum(gain for gain in gains if gain > 0) > 3
    check.check_legal(out, four_bits)


def test_a_graph_without_weighted_layers_has_nothing_to_quantize(tmp_path):
    path = network(tmp_path, "y = Relu(x)", {})

    with pytest.raises(Unsupported) as caught:
        recipe.observe_for(path, [AFFINE, SYMMETRIC], images())

    assert str(caught.value) == (
        "there is nothing to quantize: the graph holds no convolution or Linear layer with constant weights"
    )


def test_an_activation_that_is_not_finite_is_named(tmp_path):
    path = network(tmp_path, "l = Log(x) y = Conv(l, w)", {"w": W(2, 3, 1, 1)})

    with pytest.raises(StageError) as caught:
        recipe.observe_for(path, [AFFINE], images())

    assert str(caught.value) == (
        "quantize: the tensor holds NaN or infinity: 'l' while calibrating; the FP32 model itself is broken"
    )


def test_an_int8_graph_that_is_not_finite_is_refused(tmp_path):
    """The logarithm of what rounds to zero, and is below it where the bias takes back that most values are rounded up."""
    path = network(tmp_path, "c = Conv(x, w) y = Log(c)", {"w": np.ones((1, 1, 1, 1), np.float32)}, x=(1, 1, 4, 4))
    batch = np.full((1, 1, 4, 4), 0.6 / 127, np.float32)
    batch[0, 0, 0, :2] = 1, 0.1 / 127

    with pytest.raises(StageError, match="quantize: the INT8 graph gives NaN or infinity on calibration images"):
        quantized(path, tmp_path / "int8.onnx", SYMMETRIC, [batch], QuantOptions(calibrator="minmax"))


def sabotage(path, name, change):
    """Change one constant of a quantized graph."""
    model = onnx.load(str(path))
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    onnx.save(model, str(path))


@pytest.mark.parametrize(
    ("constant", "change", "layer"),
    [
        ("w_scale", lambda v: v * 20, "a"),
        ("v_scale", lambda v: v * 20, "d"),
        ("v_int8", np.negative, "d"),
        ("u_scale", lambda v: v * np.float32(np.nan), "c"),
        ("k_int8", np.zeros_like, "y"),
    ],
)
def test_the_layer_where_the_error_jumps_is_named(constant, change, layer, tmp_path):
    path, out = network(tmp_path), tmp_path / "int8.onnx"
    quantized(path, out, options=QuantOptions(recipe="fast"))
    sabotage(out, constant, change)

    found = judge.first_divergence(path, out, images()[0])

    before, after = re.fullmatch(
        rf"the error jumps at '{layer}': (-?[\d.]+) dB before it, (-?[\d.]+) dB after", found
    ).groups()
    assert float(before) > 15 > 10 > float(after)


def test_a_graph_that_is_close_everywhere_has_no_such_layer(tmp_path):
    path, out = network(tmp_path), tmp_path / "int8.onnx"
    quantized(path, out)

    assert judge.first_divergence(path, out, images()[0]) is None
    assert judge.first_divergence(path, out, images()[0], floor_db=90.0) is not None


def test_seven_bit_weights_are_within_63_in_the_file(tmp_path):
    path, out = network(tmp_path), tmp_path / "int8.onnx"

    quantized(path, out, dataclasses.replace(AFFINE, weight_max=63))

    stored = [t for t in onnx.load(str(out)).graph.initializer if t.name.endswith("_int8")]
    assert [np.abs(numpy_helper.to_array(t).astype(int)).max() for t in stored] == [63] * 4


def test_what_was_pinned_is_not_chosen_again(tmp_path, monkeypatch):
    """With other layers in float another calibrator may win: points of one curve are to differ by those layers alone."""
    path, pinned, tried = network(tmp_path, NET, ARRAYS), recipe.Pinned(), []
    seen = recipe.calibrate(path, tmp_path, schemes=[AFFINE], images=images())
    draft = recipe._draft
    monkeypatch.setattr(recipe, "_draft", lambda *args: tried.append((args[1].name, args[2])) or draft(*args))

    def quantize(*keep_float):
        tried.clear()
        options = QuantOptions(keep_float=keep_float)
        return recipe.quantize(
            seen, tmp_path / "o.onnx", scheme=AFFINE, images=images(), options=options, pinned=pinned
        )

    first = quantize()
    assert len(tried) > 4
    second = quantize("d")

    assert tried == [(pinned.graph, pinned.calibrator)]
    assert second.calibrator == first.calibrator == pinned.calibrator
    assert second.recipe[: len(pinned.said)] == first.recipe[: len(pinned.said)]
    assert ("d", "kept in float on request") in second.skipped


def test_graphs_are_compared_with_their_biases_corrected_for_one_calibrator_too(tmp_path):
    """As where several are tried: an equalized MobileNetV2 is 2.3 dB behind before it, and 1.6 ahead after it."""
    path = network(tmp_path, "c = Conv(x, w) r = Relu(c) y = Conv(r, u)", {"w": W(4, 3, 1, 1), "u": W(4, 4, 1, 1)})
    images = [W(1, 3, 8, 8, seed=i) for i in range(8)]

    seen = recipe.calibrate(path, tmp_path, schemes=[AFFINE], images=images, recipe="depthwise")
    scorer = judge.Judge(seen.graphs[0].path, tmp_path / "o.onnx", AFFINE, images, {}, ())
    options = QuantOptions(calibrator="minmax")
    attempts, _ = recipe._attempts(scorer, seen, recipe.families.RECIPES["depthwise"], options)

    assert len(attempts) == len(seen.graphs) == 2
    assert {attempt.tried for attempt in attempts} == {("bias_correction",)}
