"""The loop of a fine-tuning: steps, examinations, checkpoints; a subject goes in, the best weights seen come out."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rdeploy.adapt import Subject, _torch
from rdeploy.adapt._telling import Teller, duration, percent
from rdeploy.metrics.closeness import Closeness

if TYPE_CHECKING:
    from rdeploy.adapt.distill import Options, Plan

CHECKPOINT = "checkpoint.pt"
_FEWEST_FOR_BATCH_STATISTICS = 16
_BROKEN_STEPS = 10
_LARGEST_GRADIENT = 5.0

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The best weights, None where they are those at the start; and what to say of the training."""

    state: State | None
    detail: str


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a training is: all that a checkpoint keeps besides tensors. Scores are (decided, smooth)."""

    step: int = 0
    first: tuple[float, float] = (0.0, 0.0)
    best: tuple[float, float] = (0.0, 0.0)
    best_step: int = 0
    smoothest: float = -float("inf")
    idle_rounds: int = 0
    micro_batch: int = 0
    broken: int = 0
    spent_s: float = 0.0
    why: str = ""
    """Why it ended before its last step."""
    losses: list[float] = field(default_factory=list)


class Training:
    """One fine-tuning, from its checkpoint if there is one."""

    def __init__(self, subject: Subject, options: Options, plan: Plan, device: torch.device) -> None:
        from rdeploy.adapt import distill

        self.subject, self.options, self.plan, self.device = subject, options, plan, device
        self._distill = distill
        self.teacher = copy.deepcopy(subject.native).requires_grad_(False).to(device)
        self.student = distill.trainable_copy(subject.module).to(device)
        for network in (self.teacher, self.student):
            network.to(memory_format=torch.channels_last)
        weights = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = distill.optimizer_of(weights, options)
        half = self._half_precision()
        self.half = half
        self.scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
        self.progress = Progress(micro_batch=min(options.micro_batch or plan.batch, plan.batch))
        self.best: State = self._state()
        self._fetch = ThreadPoolExecutor(1, thread_name_prefix="views")
        self._teller = Teller(subject, plan)
        self._saved = time.monotonic()

    def close(self) -> None:
        """Give the threads and the GPU's memory back."""
        self._fetch.shutdown(wait=True, cancel_futures=True)
        del self.teacher, self.student, self.optimizer
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def run(self) -> Outcome:
        """Train to the end, and say how it went; what was reached is kept when it is interrupted."""
        if self._resume():
            self._teller.say(f"goes on at step {self.progress.step} of {self.plan.steps}")
        else:
            self._begin()
        try:
            for step, pixels in self._batches(self.progress.step):
                if self._over():
                    break
                self._step(step, *pixels)
                self.progress.step = step + 1
                self._teller.show(self.progress)
                if self.plan.ends_round(step + 1):
                    self._examine()
                    self._save()
                elif time.monotonic() - self._saved > self.options.checkpoint_s:
                    self._save()
        except KeyboardInterrupt:
            self._save()
            raise
        return self._outcome()

    def _begin(self) -> None:
        score = self._score()
        self.progress.first = self.progress.best = score.order
        self.progress.smoothest = score.order[1]
        labels = " and labels" if self.subject.training is not None and self.subject.training.labelled else ""
        half = f" in {str(self.half).removeprefix('torch.')}" if self.half else ""
        self._teller.say(
            f"from {self.plan.images} images{labels}, {self.plan.epochs} epochs, {self.plan.steps} steps of {self.plan.batch} "
            f"on {self.device.type}{half}; {percent(score.share)} alike at the start"
        )

    def _over(self) -> bool:
        allowed = max(3, round(self.options.patience * self.plan.rounds))
        if self.progress.idle_rounds >= allowed:
            self.progress.why = f"no progress in {self.progress.idle_rounds} rounds"
        if self.progress.broken >= _BROKEN_STEPS:
            self.progress.why = "the loss is no longer finite: lower --finetune-rate"
        return bool(self.progress.why)

    def _batches(self, first: int) -> Iterator[tuple[int, tuple[Any, Any, Any]]]:
        """Yield (step, (native's pixels, variant's pixels, labels)) from a step on; the next batch is cut out meanwhile."""
        waiting: Future[Any] | None = None
        for step in range(first, self.plan.steps):
            ready = waiting or self._fetch.submit(self._cut_out, step)
            waiting = self._fetch.submit(self._cut_out, step + 1) if step + 1 < self.plan.steps else None
            yield step, ready.result()

    def _cut_out(self, step: int) -> tuple[Any, Any, Any]:
        """Return a step's batch; which images it holds and what of them depends on the seed and the step alone."""
        views = self.subject.training
        assert views is not None  # a subject without is not trained
        epoch, position = divmod(step, self.plan.epoch_steps)
        order = np.random.default_rng([self.subject.seed, epoch]).permutation(self.plan.images)
        rows = order[position * self.plan.batch : (position + 1) * self.plan.batch].tolist()
        large, small = views.batch(epoch, rows)
        truth = views.truth(epoch, rows)
        return torch.from_numpy(large), torch.from_numpy(small), None if truth is None else torch.from_numpy(truth)

    def _step(self, step: int, large: Tensor, small: Tensor, labels: Tensor | None) -> None:
        """Make one optimizer step; where a GPU's memory is full, with half as many images at once from then on."""
        while (loss := self._tried(step, large, small, labels)) is None:
            self.progress.micro_batch = max(1, self.progress.micro_batch // 2)
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self._teller.say(f"the GPU's memory is full: {self.progress.micro_batch} images at once from here on")
        self.progress.broken = 0 if np.isfinite(loss) else self.progress.broken + 1
        if self.progress.broken and not self.scaler.is_enabled():
            return
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.student.parameters(), _LARGEST_GRADIENT)
        self.scaler.step(self.optimizer)  # which leaves out a step whose gradients overflowed
        self.scaler.update()
        self.progress.losses.append(loss)

    def _tried(self, step: int, large: Tensor, small: Tensor, labels: Tensor | None) -> float | None:
        """Return the loss of a batch whose gradients are there; None where they did not fit into the memory."""
        try:
            return self._gradients(step, large, small, labels)
        except torch.OutOfMemoryError:
            if self.progress.micro_batch == 1:
                raise
            return None

    def _gradients(self, step: int, large: Tensor, small: Tensor, labels: Tensor | None) -> float:
        """Add up the gradients of a batch, micro-batch by micro-batch, and return its loss."""
        torch.manual_seed(self.subject.seed * 1_000_003 + step)  # for dropout: a resumed training draws the same
        size = self.progress.micro_batch
        self._training_mode(size)
        for group in self.optimizer.param_groups:
            group["lr"] = self._distill.learning_rate(step, self.plan.steps, self.options)
        self.optimizer.zero_grad(set_to_none=True)
        total, same = 0.0, small.shape == large.shape and bool((small == large).all())
        for rows in torch.arange(len(large)).split(size):
            images = self._images(small[rows])
            with self._autocast(), torch.no_grad():
                wanted = _torch.tensors(self.teacher(images if same else self._images(large[rows])))[0]
            with self._autocast():
                found = _torch.tensors(self.student(images))[0]
            truth = None if labels is None else labels[rows].to(self.device)
            task = self.subject.spec.task
            loss = self._distill.loss_of(found, wanted, truth, task, self.options) * (len(rows) / len(large))
            self.scaler.scale(loss).backward()
            total += float(loss.detach())
        return total

    def _images(self, pixels: Tensor) -> Tensor:
        images = _torch.normalised(pixels, self.subject.spec.preprocessing, self.device)
        return images.to(_torch.dtype_of(self.student)).contiguous(memory_format=torch.channels_last)

    def _training_mode(self, size: int) -> None:
        """Switch to training mode; BatchNorm keeps its statistics where a micro-batch is too small for its own."""
        with contextlib.suppress(NotImplementedError):  # a graph of torch.export has one mode only
            self.student.train()
            if size < _FEWEST_FOR_BATCH_STATISTICS:
                for part in self.student.modules():
                    if isinstance(part, _BatchNorm):
                        part.eval()

    def _examine(self) -> None:
        """Score the student on the images that it does not train on, and keep it if there was none better."""
        state, score = self.progress, self._score()
        better, smoother = score.order > state.best, score.order[1] > state.smoothest
        settling = self._distill.settles(state.step, self.plan.steps, self.options)
        state.idle_rounds = state.idle_rounds + 1 if settling and not (better or smoother) else 0
        state.smoothest = max(state.smoothest, score.order[1])
        if better:
            state.best, state.best_step, self.best = score.order, state.step, self._state()
        self._teller.round(state, score)
        state.losses.clear()

    def _score(self) -> Closeness:
        with contextlib.suppress(NotImplementedError):
            self.student.eval()
        run = _torch.runner(self.student, self.subject.spec, self.subject.dense_size)
        return self.subject.score(run, self.subject.preprocessing)

    def _state(self) -> State:
        return {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.student.state_dict().items()
        }

    def _outcome(self) -> Outcome:
        state = self.progress
        detail = (
            f"{self.plan.images} images, {state.step / self.plan.epoch_steps:.3g} of {self.plan.epochs} epochs"
            + f" ({state.why})" * bool(state.why)
            + f", {duration(self._teller.spent_s)}; alike on images to choose by {percent(state.first[0])} -> "
            + percent(state.best[0])
        )
        return Outcome(state=self.best if state.best_step else None, detail=detail)

    # What survives a kill

    def _save(self) -> None:
        """Write the checkpoint beside the old one, then put it in its place."""
        self.progress.spent_s = self._teller.spent_s
        folder = self.subject.folder
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "progress": {name: getattr(self.progress, name) for name in Progress.__slots__},
            "student": self._state(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        partial = folder / f"{CHECKPOINT}.{os.getpid()}"
        torch.save(content, partial)
        partial.replace(folder / CHECKPOINT)
        self._saved = time.monotonic()

    def _resume(self) -> bool:
        """Take up the checkpoint if there is one that can be read."""
        file = self.subject.folder / CHECKPOINT
        content = _read(file, self.device) if file.is_file() else None
        if content is None:
            return False
        try:
            self.student.load_state_dict(content["student"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            self.progress, self.best = Progress(**content["progress"]), content["best"]
        except (KeyError, TypeError, ValueError, RuntimeError):  # of another version
            return False
        self.best = {name: tensor.cpu() for name, tensor in self.best.items()}
        self._teller.spent_before_s = self.progress.spent_s
        return True

    # Half precision

    def _half_precision(self) -> torch.dtype | None:
        if self.options.amp == "cpu" and self.device.type == "cpu":
            return torch.bfloat16
        if self.options.amp != "auto" or self.device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None)


def _read(file: Path, device: torch.device) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    except Exception:  # noqa: BLE001 - whatever is wrong with the file, the training begins again
        return None
    return content
