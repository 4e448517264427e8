"""Static token merging: exact where tokens are equal, as ToMe by hand elsewhere, and the same in every runtime."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")

from torch import nn  # noqa: E402

from rdeploy import backends, export, resize, targets  # noqa: E402
from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.resize import tokens  # noqa: E402
from rdeploy.resize._merging import MOST, Merge, MergingBlocks  # noqa: E402
from rdeploy.types import ModelSpec, Preprocessing  # noqa: E402

OPTIONS = tokens.Options()
SPEC = ModelSpec(
    name="net",
    source="net",
    sha256="",
    native_resolution=(32, 32),
    preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3),
)


def vit(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    net = timm.create_model(name, **(small | kwargs)).eval()
    for parameter in net.parameters():  # new networks are too much alike from token to token
        nn.init.normal_(parameter, std=0.3)
    return net


def torchvision_vit():
    transformers = pytest.importorskip("torchvision.models.vision_transformer", reason="torchvision is not installed")
    torch.manual_seed(0)
    net = transformers.VisionTransformer(32, 8, 3, 2, 24, 48, num_classes=5).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def run(module, images):
    with torch.no_grad():
        return module(images)


def in_pairs():
    """Return images (2, 3, 32, 32) whose patches are equal two by two, left and right."""
    patches = torch.rand(2, 3, 32, 2, 8)
    return patches.repeat_interleave(2, dim=3).reshape(2, 3, 32, 32)


def by_hand(values, keys, count):
    """ToMe's bipartite soft matching with loops, kept tokens in their order."""
    even, odd = list(range(0, len(values), 2)), list(range(1, len(values), 2))
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    scores = unit[even] @ unit[odd].T
    merged = sorted(np.argsort(-scores.max(axis=1))[:count])
    kept = [values[even[i]] for i in range(len(even)) if i not in merged]
    groups = [[values[j]] + [values[even[i]] for i in merged if scores[i].argmax() == k] for k, j in enumerate(odd)]
    return np.array(kept + [np.mean(group, axis=0) for group in groups])


@pytest.mark.parametrize(("patches", "count"), [(16, 1), (16, 7), (15, 5), (9, 4)])
def test_one_merge_is_tomes(patches, count):
    torch.manual_seed(patches)
    values, keys = torch.rand(2, patches, 6), torch.randn(2, patches, 4)
    merge = Merge(patches, count)

    plan = merge.plan(keys)
    mean = merge.sum(values, plan) / merge.sum(torch.ones(2, patches, 1), plan)

    wanted = np.stack([by_hand(values[i].numpy(), keys[i].numpy(), count) for i in range(2)])
    np.testing.assert_allclose(mean.numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_is_lost_or_counted_twice_at_any_size(dtype):
    merge = Merge(1024, 200).to(dtype)

    total = merge.sum(torch.eye(1024, dtype=dtype)[None], merge.plan(torch.randn(1, 1024, 8).to(dtype)))

    assert total.shape == (1, 824, 1024)
    assert torch.equal(total.float().sum(1), torch.ones(1, 1024))


@pytest.mark.parametrize("count", [0, 8])
def test_a_count_that_cannot_be_merged(count):
    with pytest.raises(ValueError, match=f"of 16 tokens 1 to 7 can be merged at once, not {count}"):
        Merge(16, count)


NETWORKS = {
    "class token": lambda: vit(no_embed_class=True),
    "average pooling": lambda: vit(class_token=False, global_pool="avg"),
    "attention pooling": lambda: vit(class_token=False, global_pool="map"),
    "registers": lambda: vit(reg_tokens=2, no_embed_class=True),
    "layer scale, normalised queries": lambda: vit(init_values=0.5, qk_norm=True, no_embed_class=True),
    "all tokens": lambda: vit(global_pool="", num_classes=0, no_embed_class=True),
    "torchvision": torchvision_vit,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_merging_equal_tokens_changes_nothing(name):
    net, images = NETWORKS[name](), in_pairs()
    positions = net.encoder.pos_embedding if name == "torchvision" else net.pos_embed
    nn.init.zeros_(positions)

    merged = tokens.apply(net, SPEC, (24, 24), tokens.Options(schedule=(7, 0, 0)))

    torch.testing.assert_close(run(merged, images), run(net, images), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "torchvision"])
def test_merging_other_tokens_changes_the_output_and_nothing_of_the_original(name):
    net = NETWORKS[name]()
    images = torch.rand(2, 3, 32, 32)
    before = copy.deepcopy(net.state_dict())

    merged = tokens.apply(net, SPEC, (24, 24), tokens.Options(schedule=(3, 2, 1)))

    assert run(merged, images).shape == run(net, images).shape
    assert not torch.allclose(run(merged, images), run(net, images), atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_later_blocks_see_fewer_tokens():
    merged = tokens.apply(vit(), SPEC, (24, 24), tokens.Options(schedule=(3, 0, 2)))
    (blocks,) = merged.blocks
    seen = []
    for block in blocks.blocks:
        block.mlp.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))

    run(merged, torch.rand(1, 3, 32, 32))

    assert isinstance(blocks, MergingBlocks)
    assert seen == [14, 14, 12]  # the class token among them


SHAPE = tokens.Shape(prefix=1, patches=196, width=384, attention=589_824, mlp=1_179_648, blocks=12)


def test_the_cost_of_a_schedule_is_that_of_the_literature():
    assert SHAPE.macs((0,) * 12) == SHAPE.budget(1.0)
    # ViT-S/16 at 224: 4.599 GMACs with the patch embedding (0.058)
    assert SHAPE.macs((0,) * 12) / 1e9 == pytest.approx(4.599 - 0.058, rel=0.001)
    assert SHAPE.budget((160 / 224) ** 2) / 1e9 == pytest.approx(2.268 - 0.029, rel=0.01)


@pytest.mark.parametrize("share", [0.95, 0.56, 0.3])
@pytest.mark.parametrize("weights", [[1.0] * 12, [float(i) for i in range(12)], [0.0] * 6 + [1.0] * 6])
def test_a_schedule_uses_up_its_budget_and_no_more(share, weights):
    budget = SHAPE.budget(share)

    schedule = SHAPE.spread(weights, budget)

    if SHAPE.macs(SHAPE.spread(weights, 0.0)) <= budget:
        assert 0.97 * budget < SHAPE.macs(schedule) <= budget
    assert all(count >= 0 for count in schedule)


def test_no_block_merges_more_than_bfloat16_can_count():
    shape = tokens.Shape(prefix=1, patches=1369, width=384, attention=4 * 384**2, mlp=8 * 384**2, blocks=12)
    late = shape.spread([float(block >= 3) for block in range(12)], shape.budget(0.4))

    assert max(late) == MOST
    keys, merge = torch.randn(1, 1369, 16), Merge(1369, MOST)
    with torch.no_grad():
        plan = merge.to(torch.bfloat16).plan(keys.to(torch.bfloat16))
    assert (plan.sum(dim=1) == 1).all()
    with pytest.raises(ValueError, match="1 to 255 can be merged at once, not 256"):
        Merge(1369, MOST + 1)


def test_the_search_finds_where_merging_hurts_least():
    budget = SHAPE.budget(0.6)
    harm = np.array([9.0, 9, 9, 9, 1, 1, 1, 1, 9, 9, 9, 9])
    evaluated = []

    def error(schedule):
        evaluated.append(schedule)
        return float(harm @ schedule)

    found = tokens.search(SHAPE, budget, error, trials=30)

    even = SHAPE.spread([1.0] * 12, budget)
    assert SHAPE.macs(found) <= budget
    assert len(evaluated) == len(set(evaluated)) <= 30
    assert harm @ found < 0.75 * harm @ even


def test_images_decide_the_schedule_and_without_any_it_is_even():
    net = vit(depth=4)
    images = [np.random.default_rng(i).random((1, 3, 32, 32), np.float32) for i in range(6)]

    even = tokens.fit(net, SPEC, (28, 28), OPTIONS, None)
    searched = tokens.fit(net, SPEC, (28, 28), OPTIONS, images)

    def error(options):
        merged = tokens.apply(net, SPEC, (28, 28), options)
        pairs = [(run(merged, torch.from_numpy(x)), run(net, torch.from_numpy(x))) for x in images]
        return sum(float(((a - b) ** 2).sum() / (b**2).sum()) for a, b in pairs)

    assert max(even.schedule) - min(even.schedule) <= 1
    assert error(searched) <= error(even)
    assert tokens.fit(net, SPEC, (28, 28), searched, images) == searched
    assert tokens.said(tokens.Options(schedule=(3, 2))) == "tokens merged in each block: 3, 2"


def test_a_budget_that_cannot_be_met_is_snapped_to_the_least_there_is():
    assert tokens.snap(vit(), SPEC, (24, 24), OPTIONS) == (24, 24)
    snapped = tokens.snap(vit(depth=1), SPEC, (8, 8), OPTIONS)

    assert (8, 8) < snapped < (32, 32)
    shape = tokens._shape(vit(depth=1), SPEC)
    assert shape.macs(shape.spread([1.0], 0.0)) <= 1.03 * shape.budget((snapped[0] / 32) ** 2)


def test_what_has_no_tokens_to_merge_is_refused_in_plain_words():
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24)
    parallel = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, block_fn=_parallel())

    assert tokens.unsupported(swin, SPEC, (24, 24), OPTIONS) == (
        "SwinTransformer is no plain vision transformer (timm's VisionTransformer and DeiT, torchvision's vit, "
        "transformers' ViT, DINOv2, CLIP and SigLIP): its tokens cannot be merged"
    )
    assert tokens.unsupported(parallel, SPEC, (24, 24), OPTIONS) == (
        "its blocks are of the kind ParallelScalingBlock, whose tokens cannot be merged"
    )
    assert tokens.unsupported(vit(), SPEC, (48, 48), OPTIONS) == "48 is larger than the 32 that the network sees"
    assert "cannot take 32" in str(tokens.unsupported(vit(img_size=64), SPEC, (24, 24), OPTIONS))


def _parallel():
    from timm.models.vision_transformer import ParallelScalingBlock

    return ParallelScalingBlock


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((3, 2), "the schedule is for 2 blocks, and the network has 3"),
        ((8, 0, 0), "a block cannot merge 8 of 16 tokens"),
    ],
)
def test_a_schedule_that_does_not_fit(schedule, message):
    with pytest.raises(Unsupported, match=message):
        tokens.apply(vit(), SPEC, (24, 24), tokens.Options(schedule=schedule))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A merged transformer inside smaller images, and its graph."""
    places = (
        resize.Place(at="input", resolution=(24, 24)),
        resize.Place(at="tokens", resolution=(20, 20), options=(("schedule", (2, 1, 1)),)),
    )
    net = resize.apply(vit(global_pool="avg", class_token=False), SPEC, places)
    path = tmp_path_factory.mktemp("merged") / "model.onnx"
    export.export(net, SPEC, (24, 24), path, dynamic_batch=True)
    images = [np.random.default_rng(i).random((1, 3, 24, 24), np.float32) for i in range(8)]
    return path, images, export.torch_outputs(net, images)[0]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_graph_is_the_module_on_a_cpu(exported, name, tmp_path):
    path, images, wanted = exported
    plugin = backends.find(name)
    if reason := plugin.unavailable():
        pytest.skip(reason)

    engine = plugin.build_engine(path, tmp_path, target=targets.load("cpu"), options=plugin.Options())
    with plugin.open_session(tmp_path / engine.path, threads=1) as session:
        found = np.concatenate([session.run({"input": image})["output"] for image in images])

    exact = set(dict(engine.executed_precision)) & {"bf16", "fp16"} == set()
    np.testing.assert_allclose(found, wanted, atol=(1e-4 if exact else 0.1) * np.abs(wanted).max())


def test_tensorrt_takes_the_graph(exported, tmp_path):
    plugin = backends.find("tensorrt_rtx")
    if reason := plugin.unavailable():
        pytest.skip(reason)

    engine = plugin.build_engine(exported[0], tmp_path, target=targets.load("rtx-40"), options=plugin.Options())

    assert engine.size_bytes > 1000


def test_int8_leaves_the_merging_in_float(exported):
    import onnx_ir as ir

    from rdeploy.quantize import placement

    scheme = backends.find("tensorrt_rtx").scheme(targets.load("rtx-40"))
    model = ir.load(exported[0])

    placed = placement.place(model, scheme)

    linear = 3 * 4 + 1  # qkv, projection and two of the MLP in each block, and the classifier
    assert len(placed.weights) == linear
    products = [node for node in model.graph if node.op_type == "MatMul" and node not in placed.weights]
    assert {name for name, _ in placed.skipped} >= {node.name for node in products}
    ops = {node.op_type for readers in placed.reads.values() for node, _ in readers}
    assert ops <= {"MatMul", "Gemm"}
