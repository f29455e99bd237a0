"""The training loop of on-policy context distillation (OPCD, arXiv 2602.12275).

    L = E_x E_{y ~ student(. | x)} [ 1/|y| sum_t D( student(. | x, y_<t), teacher(. | knowledge, x, y_<t) ) ]

A step is: sample (no gradient) -> teacher's hidden states -> student's hidden states -> exact divergence -> update.
The baselines are the same loop with another source (`distill.baselines`) or, for SFT, the sampled tokens as teacher.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.backbone import Backbone
from distill.checkpoint import (
    Manifest,
    drop_trainer_state,
    latest_resumable,
    read_manifest,
    restore,
    save_checkpoint,
)
from distill.config import DistillConfig
from distill.errors import CheckpointError, DistillConfigError
from distill.monitor import Guard, StepMetrics, distinct_n, leak_rate
from distill.objective import chunked_cross_entropy, chunked_divergence, position_weights
from distill.packing import Sample, micro_batches, pack
from distill.schedule import auto_objective
from distill.source import Batch, Source
from distill.teacher import Teacher

#: Tokens of a response that count as its opening.
OPENING = 4


@dataclass(frozen=True)
class FitResult:
    """How a run ended. Folders are checkpoints; `best` is chosen by validation, and is `last` without one."""

    history: tuple[StepMetrics, ...]
    validation: dict[int, float]  # step -> score, 0 being the untrained student
    last: Path | None
    best: Path | None
    best_step: int
    stopped: str | None  # why the guard ended the run early


@dataclass
class _Sums:
    """What a step adds up over its micro-batches, on the way to StepMetrics."""

    loss: float = 0.0
    divergence: float = 0.0
    opening: float = 0.0
    student_entropy: float = 0.0
    teacher_entropy: float = 0.0
    first_teacher_mass: list[float] = field(default_factory=list)
    first_student_mass: list[float] = field(default_factory=list)
    first_shared_mass: list[float] = field(default_factory=list)
    seconds_teacher: float = 0.0
    seconds_prefix: float = 0.0


class Trainer:
    """Trains a student towards a teacher that sees the knowledge.

    Args:
        model: the student; a PEFT model trains its adapter only, any other model all its weights.
        teacher: scores the samples.
        source: makes the samples of a step.
        config: validated settings.
        folder: the run's folder; checkpoints and logs go there, and a run that left a state there is resumed.
        base_model: name of the base model, for the manifest.
        parent: id of the checkpoint this one starts from.
        knowledge: id of the knowledge version.
        decode: ids to text, for the rate of leak phrases.

    Raises:
        CheckpointError: the folder holds a run of other settings.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher,
        source: Source,
        config: DistillConfig,
        folder: Path,
        *,
        base_model: str,
        parent: str | None = None,
        knowledge: str | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self.student = Backbone(model)
        self.teacher, self.source, self.config, self.folder = teacher, source, config, folder
        self.base_model, self.parent, self.knowledge, self.decode = base_model, parent, knowledge, decode
        if self.student.head_VD.shape[0] != teacher.head_VD.shape[0]:
            raise DistillConfigError(
                f"the student's head has {self.student.head_VD.shape[0]} rows and the teacher's "
                f"{teacher.head_VD.shape[0]}; use two models of one family"
            )
        if config.gradient_checkpointing:
            _enable_checkpointing(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self.divergence = config.divergence
        self.history: list[StepMetrics] = []
        self.start = self._resume()

    # -- one step, as in the paper ------------------------------------------------------------------------------

    def step(self, batch: Batch, seconds_sampling: float = 0.0) -> StepMetrics:
        """Score a batch under both models, take one optimiser step, and say what was seen."""
        model = self.student.model
        model.train()
        rate = self.config.learning_rate_at(len(self.history))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        started = time.perf_counter()
        sums = self._score_batch(batch.samples, lambda loss: loss.backward())  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if torch.isfinite(norm):  # a broken gradient must not reach the weights; the guard stops the run
            self.optimizer.step()
            self.teacher.follow()
        self.optimizer.zero_grad(set_to_none=True)
        model.eval()
        return self._metrics(batch, sums, float(norm), rate, time.perf_counter() - started, seconds_sampling)

    @torch.no_grad()
    def measure(self, batch: Batch) -> StepMetrics:
        """What `step` would say of a batch, without an update: gradient norm and learning rate are 0.

        Before training it tells whether reverse KL has anything to hold on to: `teacher_mass`, `student_mass` and
        `opening_overlap` at the first token. (The metrics of step 1 say the same of its own batch, since they are
        taken before its update.) Validation batches measured so give the gap that training can close.
        """
        was_training = self.student.model.training
        self.student.model.eval()
        started = time.perf_counter()
        sums = self._score_batch(batch.samples, lambda loss: None)
        self.student.model.train(was_training)
        return self._metrics(batch, sums, 0.0, 0.0, time.perf_counter() - started, 0.0)

    @property
    def objective(self) -> str:
        """Name of the next step's divergence."""
        if self.config.objective != "auto":
            return self.config.objective
        return auto_objective(self.history, enter=self.config.auto_enter, leave=self.config.auto_leave)

    def _score_batch(self, samples: Sequence[Sample], use: Callable[[Tensor], None]) -> _Sums:
        """Score all samples under both models in micro-batches, and give each part's loss to `use`."""
        if not samples:
            raise DistillConfigError("none of the step's rollouts has a sampled token; see the stored episodes' errors")
        sums, tokens = _Sums(), sum(sample.sampled for sample in samples)
        started = time.perf_counter()
        if self.objective != "cross_entropy":
            self.teacher.prepare([sample.teacher_prompt for sample in samples])
        sums.seconds_prefix = sums.seconds_teacher = time.perf_counter() - started
        for part in micro_batches(samples, self.config.micro_batch_tokens):
            use(self.loss(part, sequences=len(samples), tokens=tokens, sums=sums))
        return sums

    def loss(self, samples: Sequence[Sample], *, sequences: int, tokens: int, sums: _Sums) -> Tensor:
        """This micro-batch's share of the batch's loss, a scalar with gradient."""
        packed = pack([sample.student_prompt for sample in samples], samples, device=self.student.device)
        if self.objective == "cross_entropy":
            student_RD = self.student.hidden(packed)[packed.predict_R]
            d_R, overlap = chunked_cross_entropy(student_RD, self.student.head_VD, packed.target_R)
        else:
            started = time.perf_counter()
            teacher_RD = self.teacher.hidden(samples)
            sums.seconds_teacher += time.perf_counter() - started
            student_RD = self.student.hidden(packed)[packed.predict_R]
            d_R, overlap = chunked_divergence(
                student_RD, self.student.head_VD, teacher_RD, self.teacher.head_VD, self.divergence(self.objective)
            )
        weights_R = position_weights(
            packed.lengths, self.config.normalize, sequences=sequences, tokens=tokens, device=d_R.device
        )
        loss = (weights_R * d_R).sum()
        sums.loss += float(loss.detach())
        sums.divergence += float(d_R.detach().sum())
        sums.student_entropy += float(overlap.student_entropy_P.sum())
        sums.teacher_entropy += float(overlap.teacher_entropy_P.sum())
        start = 0
        for length in packed.lengths:
            sums.opening += float(d_R.detach()[start : start + min(length, OPENING)].sum())
            sums.first_teacher_mass.append(float(overlap.teacher_mass_P[start]))
            sums.first_student_mass.append(float(overlap.student_mass_P[start]))
            sums.first_shared_mass.append(float(overlap.shared_mass_P[start]))
            start += length
        return loss

    # -- the run ------------------------------------------------------------------------------------------------

    def fit(
        self,
        *,
        validate: Callable[[int], float] | None = None,
        on_step: Callable[[StepMetrics], None] | None = None,
    ) -> FitResult:
        """Run the remaining steps, with a checkpoint every `save_every` and at the end, validated if asked to.

        `validate(step)` scores the student as it stands, higher being better; step 0 is the untrained one. Ctrl-C
        leaves the last checkpoint in place; the next run goes on from there.
        """
        guard, stopped = Guard(self.config.guard), None
        for metrics in self.history:
            stopped = guard.check(metrics) or stopped
        scores = self._scores()
        if validate and 0 not in scores and self.start == 0:
            self._score(scores, 0, validate)
        if validate and self.start and self.start not in scores:  # killed between checkpoint and validation
            self._score(scores, self.start, validate)
        for number in range(self.start, self.config.steps):
            if stopped:
                break
            began = time.perf_counter()
            batch = self.source(number)
            metrics = self.step(batch, time.perf_counter() - began)
            self.history.append(metrics)
            stopped = guard.check(metrics)
            if on_step:
                on_step(metrics)
            done = number + 1
            if done % self.config.save_every == 0 or done == self.config.steps or stopped:
                self._save(done)
                if validate:
                    self._score(scores, done, validate)
        return self._result(scores, stopped)

    def _result(self, scores: dict[int, float], stopped: str | None) -> FitResult:
        saved = {int(p.name.split("-")[1]): p for p in self.folder.glob("step-*") if (p / "manifest.json").exists()}
        last = saved[max(saved)] if saved else None
        scored = {step: score for step, score in scores.items() if step in saved}
        # of equal scores the earliest: less training, less drift
        best_step = max(scored, key=lambda s: (scored[s], -s)) if scored else max(saved, default=0)
        return FitResult(tuple(self.history), scores, last, saved.get(best_step), best_step, stopped)

    def _resume(self) -> int:
        newest = latest_resumable(self.folder)
        if newest is None:
            return 0
        manifest = read_manifest(newest)
        if (manifest.config, manifest.model, manifest.knowledge) != (
            self.config.model_dump(mode="json"),
            self.base_model,
            self.knowledge,
        ):
            raise CheckpointError(f"{self.folder} holds a run with other settings; give this run another folder")
        state, teacher = restore(newest, self.student.model, self.optimizer)
        self.teacher.restore(teacher)
        self.history = [StepMetrics.model_validate(entry) for entry in state["history"]]
        return int(state["step"])

    def _save(self, step: int) -> Manifest:
        previous = latest_resumable(self.folder)
        folder = self.folder / f"step-{step:06d}"
        manifest = save_checkpoint(
            folder,
            self.student.model,
            base_model=self.base_model,
            parent=self.parent,
            knowledge=self.knowledge,
            step=step,
            config=self.config.model_dump(mode="json"),
            seed=self.config.seed,
            optimizer=self.optimizer,
            state={"history": [metrics.model_dump() for metrics in self.history]},
            teacher=self.teacher.state(),
        )
        if previous is not None and previous != folder:
            drop_trainer_state(previous)
        return manifest

    def _scores(self) -> dict[int, float]:
        path = self.folder / "validation.json"
        return {int(k): v for k, v in json.loads(path.read_text()).items()} if path.exists() else {}

    def _score(self, scores: dict[int, float], step: int, validate: Callable[[int], float]) -> None:
        scores[step] = validate(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".validation.{os.getpid()}"
        draft.write_text(json.dumps(scores))
        draft.replace(self.folder / "validation.json")

    def _metrics(
        self, batch: Batch, sums: _Sums, norm: float, rate: float, seconds: float, sampling: float
    ) -> StepMetrics:
        samples, tokens = batch.samples, sum(sample.sampled for sample in batch.samples)
        responses = [[t for t, m in zip(s.continuation, s.mask, strict=True) if m] for s in samples]
        read = sum(len(s.student_prompt) + len(s.continuation) for s in samples)
        return StepMetrics(
            step=len(self.history) + 1,
            objective=self.objective,
            loss=sums.loss,
            divergence=sums.divergence / tokens,
            opening_share=sums.opening / sums.divergence if sums.divergence else 0.0,
            student_entropy=sums.student_entropy / tokens,
            teacher_entropy=sums.teacher_entropy / tokens,
            teacher_mass=sum(sums.first_teacher_mass) / len(samples),
            student_mass=sum(sums.first_student_mass) / len(samples),
            opening_overlap=sum(sums.first_shared_mass) / len(samples),
            response_tokens=tokens / len(samples),
            distinct_2=distinct_n(responses),
            leak_rate=leak_rate([self.decode(ids) for ids in responses]) if self.decode else 0.0,
            success=sum(e.success for e in batch.episodes) / max(1, len(batch.episodes)),
            grad_norm=norm,
            learning_rate=rate,
            sequences=len(samples),
            dropped=batch.dropped,
            staleness=batch.staleness,
            tokens_per_second=read / seconds,
            seconds_sampling=sampling,
            seconds_teacher=sums.seconds_teacher,
            seconds_prefix=sums.seconds_prefix,
            seconds_student=seconds - sums.seconds_teacher,
            peak_memory_bytes=peak_memory(self.student.device),
        )


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _enable_checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
