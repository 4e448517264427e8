import copy
import dataclasses
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn  # noqa: E402

from rdeploy.adapt import _telling, _torch, _training, distill  # noqa: E402
from rdeploy.errors import ConfigError  # noqa: E402

from .conftest import Views, blobs, network, subject  # noqa: E402

OPTIONS = distill.Options(epochs=6, batch=32, learning_rate=3e-3, checkpoint_s=0.0, patience=1.0)
CPU = torch.device("cpu")


class Blurred(nn.Module):
    """A trained network that was reduced: it sees half of the size, enlarged without care."""

    def __init__(self, net):
        super().__init__()
        self.net = copy.deepcopy(net)
        with torch.no_grad():
            self.net[0].weight.mul_(0.3)

    def forward(self, images):
        return self.net(nn.functional.interpolate(images, scale_factor=2.0))


@pytest.fixture
def reduced(trained):
    return Blurred(trained).eval()


def training_subject(module, native, folder, *, labels=None, **more):
    return subject(module, native, training=Views(blobs(192, seed=2)[0], labels), folder=folder, **more)


def trained_by(one, options=OPTIONS):
    training = _training.Training(one, options, distill.plan(len(one.training), options), CPU)
    outcome = training.run()
    training.close()
    return outcome


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_student_comes_nearer_to_its_teacher_without_labels(reduced, trained, tmp_path):
    one = training_subject(reduced, trained, tmp_path)
    before, state = one.score(one.run, one.preprocessing), copy.deepcopy(reduced.state_dict())

    change = distill.apply(one, OPTIONS)

    student = copy.deepcopy(reduced)
    student.load_state_dict(change.state)
    after = one.score(_torch.runner(student.eval(), one.spec), one.preprocessing)
    assert after.order > before.order
    assert same(reduced.state_dict(), state)  # what came in is left as it was
    assert "192 images, 6 of 6 epochs" in change.detail


def test_an_interrupted_training_ends_in_the_same_bits(reduced, trained, tmp_path):
    whole = trained_by(training_subject(reduced, trained, tmp_path / "whole"))

    class Killed(Exception):
        pass

    def kill_at(message):
        if "epoch 3 of" in message:
            raise Killed

    first = training_subject(reduced, trained, tmp_path / "cut", tell=kill_at)
    with pytest.raises(Killed):
        trained_by(first)
    assert (tmp_path / "cut" / _training.CHECKPOINT).is_file()
    told = []
    resumed = trained_by(training_subject(reduced, trained, tmp_path / "cut", tell=told.append))

    # The kill came before the third round was written down: every step before it was.
    assert "goes on at step 17 of 36" in told[0]
    assert same(whole.state, resumed.state)


def test_a_damaged_checkpoint_is_no_checkpoint(reduced, trained, tmp_path):
    (tmp_path / _training.CHECKPOINT).write_bytes(b"PK\x03\x04 half a file")
    told = []

    outcome = trained_by(training_subject(reduced, trained, tmp_path, tell=told.append))

    assert "192 images" in told[0]
    assert outcome.state is not None


def test_it_ends_early_when_nothing_improves_and_returns_the_start(trained, tmp_path):
    one = training_subject(trained, trained, tmp_path)
    one = dataclasses.replace(one, training=Views(blobs(192, seed=2)[0].repeat(2, axis=1).repeat(2, axis=2)))
    options = dataclasses.replace(OPTIONS, epochs=40, learning_rate=1e-12, patience=0.1)
    one.choosing.pictures.array = blobs(96, seed=5)[0]  # the student is the teacher, and sees what it sees

    outcome = trained_by(one, options)

    assert outcome.state is None
    assert "31 of 40 epochs (no progress in 4 rounds)" in outcome.detail


def test_a_loss_that_is_not_finite_ends_the_training_with_the_way_out(reduced, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "loss_of", lambda student, *_: (student * math.nan).sum())

    outcome = trained_by(training_subject(reduced, trained, tmp_path))

    assert "1.67 of 6 epochs (the loss is no longer finite: lower --finetune-rate)" in outcome.detail
    kept = reduced.state_dict() if outcome.state is None else outcome.state
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_an_interrupt_writes_the_checkpoint(reduced, trained, tmp_path):
    def interrupt(message):
        if "epoch 2 of" in message:
            raise KeyboardInterrupt

    one = training_subject(reduced, trained, tmp_path, tell=interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained_by(one, dataclasses.replace(OPTIONS, checkpoint_s=1e9))

    kept = torch.load(tmp_path / _training.CHECKPOINT, weights_only=True)
    assert kept["progress"]["step"] == 12


def test_micro_batches_add_up_to_the_whole_batch(trained, tmp_path):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    one = training_subject(student, trained, tmp_path)
    found = []
    for micro in (None, 8):
        options = dataclasses.replace(OPTIONS, micro_batch=micro)
        training = _training.Training(one, options, distill.plan(192, options), CPU)
        large, small, labels = training._cut_out(0)
        loss = training._gradients(0, large, small, labels)
        found.append((loss, [p.grad.clone() for p in training.student.parameters()]))
        training.close()

    (whole, gradients), (parts, summed) = found
    assert parts == pytest.approx(whole, rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(gradients, summed))


def test_where_the_memory_is_full_fewer_images_go_at_once(reduced, trained, tmp_path, monkeypatch):
    one = training_subject(reduced, trained, tmp_path)
    training = _training.Training(one, OPTIONS, distill.plan(192, OPTIONS), CPU)
    gradients, seen = training._gradients, []

    def full(*args):
        seen.append(training.progress.micro_batch)
        if training.progress.micro_batch > 8:
            raise torch.OutOfMemoryError
        return gradients(*args)

    monkeypatch.setattr(training, "_gradients", full)
    training._step(0, *training._cut_out(0))
    training.close()

    assert seen == [32, 16, 8]


def test_half_precision_trains_as_well(reduced, trained, tmp_path):
    one = training_subject(reduced, trained, tmp_path)

    outcome = trained_by(one, dataclasses.replace(OPTIONS, amp="cpu"))

    assert outcome.state is not None
    assert all(value.dtype != torch.bfloat16 for value in outcome.state.values())


def test_the_rate_rises_and_falls_to_nothing():
    options = distill.Options(learning_rate=1.0, warmup=0.1)
    rates = [distill.learning_rate(step, 100, options) for step in range(101)]

    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 0.0005), ("sgd", 0.05)])
def test_an_optimizer_has_a_rate_and_a_decay_of_its_own(optimizer, rate, trained):
    options = distill.Options(optimizer=optimizer)
    weights = list(trained.parameters())

    found = distill.optimizer_of(weights, options)

    assert type(found).__name__.lower() == optimizer
    assert [group["lr"] for group in found.param_groups] == [rate, rate]
    assert sum(len(group["params"]) for group in found.param_groups) == len(weights)
    flat = [parameter.ndim <= 1 for group in found.param_groups for parameter in group["params"]]
    assert [group["weight_decay"] > 0 for group in found.param_groups] == [True, False]
    assert flat == sorted(flat)
    assert distill.learning_rate(0, 20, dataclasses.replace(options, learning_rate=0.1)) == pytest.approx(0.1)


def test_a_training_with_sgd_goes_on_where_it_was(reduced, trained, tmp_path, monkeypatch):
    options = dataclasses.replace(OPTIONS, optimizer="sgd", learning_rate=0.02, epochs=4)
    whole = trained_by(training_subject(reduced, trained, tmp_path / "whole"), options)

    def interrupt(message):
        if "epoch 2 of" in message:
            raise KeyboardInterrupt

    one = training_subject(reduced, trained, tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        trained_by(dataclasses.replace(one, tell=interrupt), options)
    resumed = trained_by(one, options)

    assert whole.state is not None
    assert same(resumed.state, whole.state)


def test_progress_is_expected_once_the_rate_has_fallen_to_a_quarter():
    found = [step for step in range(101) if distill.settles(step, 100, OPTIONS)]

    assert found == list(range(found[0], 101))
    assert distill.learning_rate(found[0], 100, OPTIONS) <= OPTIONS.learning_rate / 4
    assert 65 <= found[0] <= 70


@pytest.mark.parametrize(
    ("images", "epochs", "batch", "rounds"),
    [(50_000, 8, 64, 8), (10_000, 40, 64, 40), (300, 60, 64, 60), (40, 60, 40, 60)],
)
def test_the_number_of_images_decides_how_long_it_takes(images, epochs, batch, rounds):
    plan = distill.plan(images, distill.Options())

    assert (plan.epochs, plan.batch, plan.rounds) == (epochs, batch, rounds)


def test_a_long_epoch_is_examined_on_the_way():
    plan = distill.plan(640_000, distill.Options(epochs=1))

    assert (plan.steps, plan.round_steps, plan.rounds) == (10_000, 1000, 10)
    assert [step for step in range(1, 10_001) if plan.ends_round(step)] == list(range(1000, 10_001, 1000))


@pytest.mark.parametrize("task", ["classification", "segmentation", "embedding"])
def test_the_loss_is_nothing_for_the_same_answer_and_grows(task):
    shape = (2, 5, 6, 6) if task == "segmentation" else (2, 5)
    answer = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    assert distill.loss_of(answer, answer, None, task, OPTIONS).item() == pytest.approx(0.0, abs=1e-6)
    near, far = (
        distill.loss_of(answer.roll(1, 1) * part + answer * (1 - part), answer, None, task, OPTIONS)
        for part in (0.2, 1.0)
    )
    assert 0 < near < far


def test_the_loss_has_a_closed_form():
    # Softened with 2, the teacher's logits (2 log 3, 0) are 3/4 and 1/4, the student's (0, 0) one half each.
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)

    without = distill.loss_of(student, teacher, None, "classification", OPTIONS)
    labelled = distill.loss_of(student, teacher, torch.tensor([1]), "classification", OPTIONS)
    one_logit = distill.loss_of(student[:, :1], -teacher[:, :1], None, "classification", OPTIONS)

    assert without.item() == pytest.approx(4 * divergence, rel=1e-5)
    assert labelled.item() == pytest.approx(0.8 * 4 * divergence + 0.2 * math.log(2), rel=1e-5)
    assert one_logit.item() == pytest.approx(4 * divergence, rel=1e-5)


def test_a_dense_answer_is_compared_at_the_teachers_size():
    teacher = torch.ones(1, 3, 8, 8) * torch.tensor([3.0, 0.0, 0.0]).view(1, 3, 1, 1)

    assert distill.loss_of(teacher[:, :, :4, :4], teacher, None, "segmentation", OPTIONS).item() == pytest.approx(
        0, abs=1e-6
    )


def test_masks_take_part_and_void_does_not():
    options = distill.Options(label_weight=1.0)
    scores = torch.zeros(1, 2, 2, 2)
    scores[:, 1] = 50.0
    mask = torch.full((1, 4, 4), -100)

    def loss(labels):
        return float(distill.loss_of(scores, scores, labels, "segmentation", options))

    assert loss(mask) == 0.0
    mask[:, :2] = 1
    assert loss(mask) == pytest.approx(0.0, abs=1e-6)
    mask[:, 2:] = 0
    assert loss(mask) == pytest.approx(25.0)
    with pytest.raises(ConfigError, match=r"hold class 2, but the model has 2 classes .* say so with --void 2"):
        loss(mask.clamp(min=2))


def test_labels_take_part_where_there_are_any(reduced, trained, tmp_path):
    images, kinds = blobs(192, seed=2)
    one = training_subject(reduced, trained, tmp_path, labels=tuple(int(kind) for kind in kinds))
    told = []

    outcome = trained_by(dataclasses.replace(one, tell=told.append))

    assert "192 images and labels" in told[0]
    assert outcome.state is not None


def test_it_tells_each_round_with_what_is_left(reduced, trained, tmp_path):
    told = []

    trained_by(training_subject(reduced, trained, tmp_path, tell=told.append))

    rounds = [message for message in told if " epoch " in message]
    assert len(rounds) == 6
    assert all(message.startswith("fine-tuning r8: ") and message.endswith(" left") for message in rounds)
    assert "epoch 6 of 6" in rounds[-1]
    assert rounds[-1].endswith("0 s left")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"module": None}, "an ONNX file holds no PyTorch module to train: give the original model"),
        ({"training": None}, "no images were given to train on (--finetune DIR)"),
        ({"training": Views(np.zeros((9, 4, 4, 3), np.uint8))}, "9 images are left to train on, 128 are the least"),
        ({"module": nn.Flatten()}, "the module has no parameters that could be trained"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_plain_words(change, reason, trained, tmp_path):
    one = dataclasses.replace(training_subject(trained, trained, tmp_path), **change)

    assert distill.unsupported(one, OPTIONS).startswith(reason)


def test_a_detector_is_refused(trained, tmp_path):
    one = training_subject(trained, trained, tmp_path)
    one = dataclasses.replace(one, spec=dataclasses.replace(one.spec, task="detection"))

    assert "a detector needs its own training" in distill.unsupported(one, OPTIONS)
    assert distill.unsupported(training_subject(trained, trained, tmp_path), OPTIONS) is None


@pytest.mark.parametrize(("seconds", "said"), [(42.4, "42 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_are_said_in_the_unit_that_fits(seconds, said):
    assert _telling.duration(seconds) == said


def test_networks_without_batch_statistics_of_their_own_keep_them(trained, tmp_path):
    one = training_subject(network().eval(), trained, tmp_path)
    training = _training.Training(one, OPTIONS, distill.plan(192, OPTIONS), CPU)
    training._training_mode(8)
    few = training.student[1].training
    training._training_mode(32)
    many = training.student[1].training
    training.close()

    assert (few, many) == (False, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
def test_a_gpu_trains_in_half_precision_and_gives_its_memory_back(reduced, trained, tmp_path):
    told = []
    distill.apply(training_subject(reduced, trained, tmp_path / "first"), OPTIONS)  # cuBLAS keeps its workspace
    held = torch.cuda.memory_allocated()

    change = distill.apply(training_subject(reduced, trained, tmp_path / "second", tell=told.append), OPTIONS)

    assert "on cuda in bfloat16" in told[0] or "on cuda in float16" in told[0]
    assert change is not None
    assert all(value.device.type == "cpu" for value in change.state.values())
    assert torch.cuda.memory_allocated() == held
