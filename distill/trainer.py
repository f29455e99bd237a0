"""The training loop of on-policy context distillation (OPCD, arXiv 2602.12275).

    L = E_x E_{y ~ student(. | x)} [ 1/|y| sum_t D( student(. | x, y_<t), teacher(. | knowledge, x, y_<t) ) ]

A step is: sample (no gradient) -> teacher's hidden states -> student's hidden states -> exact divergence -> update.
The baselines are the same loop with another source (`distill.baselines`) or, for SFT, the sampled tokens as teacher.
Under `accelerate launch` the same code runs in every process (`distill.parallel`): a step's batch, loss, metrics and
update are those of one process.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.backbone import Backbone
from distill.checkpoint import (
    latest_resumable,
    on_disk,
    read_manifest,
    restore_optimizer,
    restore_weights,
    save_checkpoint,
    tidy,
)
from distill.chunked import Overlap, chunked_cross_entropy, chunked_divergence
from distill.config import DistillConfig
from distill.distributed import from_main, gather, is_main, world
from distill.errors import CheckpointError, DistillConfigError
from distill.monitor import Guard, StepMetrics
from distill.objective import position_weights
from distill.packing import Packed, Sample, micro_batches, pack
from distill.parallel import Alone, current
from distill.source import Batch, Source
from distill.tally import Tally, peak_memory
from distill.teacher import Teacher
from distill.trackers import Tracker

#: The most time, as a share, that goes into saving steps between two checkpoints, so that a kill costs hardly more than
#: the step it hits.
_SAVING_SHARE = 0.05


@dataclass(frozen=True)
class FitResult:
    """How a run ended. Folders are checkpoints; `best` is chosen by validation, and is `last` without one."""

    history: tuple[StepMetrics, ...]
    validation: dict[int, float]  # step -> score, 0 being the untrained student
    last: Path | None
    best: Path | None
    best_step: int
    stopped: str | None  # why the guard ended the run early


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
        parallel: how the work is split over processes; None is what `accelerate launch` asked for.

    The model is a plain one; it is spread over the processes here. The run's folder must be one that all see.

    Raises:
        CheckpointError: the folder holds a run of other settings, or one that started elsewhere.
        DistillConfigError: teacher and student differ in vocabulary, or the processes cannot train together.
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
        parallel: Alone | None = None,
    ) -> None:
        self.parallel = parallel or current()
        self.student = Backbone(model)
        self.teacher, self.source, self.config, self.folder = teacher, source, config, folder
        self.base_model, self.parent, self.knowledge, self.decode = base_model, parent, knowledge, decode
        if self.student.head_VD.shape[0] != teacher.head_VD.shape[0]:
            raise DistillConfigError(
                f"the student's head has {self.student.head_VD.shape[0]} rows and the teacher's "
                f"{teacher.head_VD.shape[0]}; use two models of one family"
            )
        if config.gradient_checkpointing or self.parallel.checkpointing:
            _enable_checkpointing(model)
        newest = self._resumable()
        if newest and is_main():
            tidy(folder, newest, self._stays)
        state = restore_weights(newest, model, teacher) if newest else {}
        self.parallel.adopt(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        if newest:
            restore_optimizer(newest, self.optimizer)
        self.divergence = config.divergence
        self.start = int(state.get("step", 0))
        self.history = [StepMetrics.model_validate(entry) for entry in state.get("history", ())]
        self._saved, self._seconds_saving = time.perf_counter(), 0.0  # when the last save was over, and what it took

    # -- one step, as in the paper ------------------------------------------------------------------------------

    def step(self, batch: Batch, seconds_sampling: float = 0.0) -> StepMetrics:
        """Score a batch under both models, take one optimiser step, and say what was seen."""
        model = self.student.model
        model.train()
        rate = self.config.learning_rate_at(len(self.history))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        started = time.perf_counter()
        tally = self._score_batch(batch.samples, self.parallel.backward)
        norm = self.parallel.clip(self.parameters, self.config.max_grad_norm)
        if math.isfinite(norm):  # a broken gradient must not reach the weights; the guard stops the run
            self.optimizer.step()
            self.teacher.follow()
        self.optimizer.zero_grad(set_to_none=True)
        model.eval()
        tally.seconds, tally.seconds_sampling = time.perf_counter() - started, seconds_sampling
        return self._metrics(batch, tally, norm, rate)

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
        tally = self._score_batch(batch.samples, lambda loss: None)
        self.student.model.train(was_training)
        tally.seconds = time.perf_counter() - started
        return self._metrics(batch, tally, 0.0, 0.0)

    def _score_batch(self, samples: Sequence[Sample], use: Callable[[Tensor], None]) -> Tally:
        """Score this process's share under both models in micro-batches, and give each part's loss to `use`."""
        if not samples:
            raise DistillConfigError("none of the step's rollouts has a sampled token; see the stored episodes' errors")
        tally, tokens = Tally(), sum(sample.sampled for sample in samples)
        started, cached = time.perf_counter(), 0
        if self.config.objective != "cross_entropy":
            cached = self.parallel.run(lambda: self.teacher.prepare([sample.teacher_prompt for sample in samples]))
        tally.seconds_prefix = tally.seconds_teacher = time.perf_counter() - started
        parts = list(micro_batches(self.parallel.share(samples), self.config.micro_batch_tokens, cached))
        for part, counts in self.parallel.aligned(parts, samples):
            loss = self.loss(part, sequences=len(samples), tokens=tokens, tally=tally if counts else Tally())
            use(loss if counts else 0 * loss)
        return tally

    def loss(self, samples: Sequence[Sample], *, sequences: int, tokens: int, tally: Tally) -> Tensor:
        """This micro-batch's share of the batch's loss, a scalar with gradient."""
        teacher_RD = None
        if self.config.objective != "cross_entropy":
            started = time.perf_counter()
            teacher_RD = self.parallel.run(lambda: self.teacher.hidden(samples))
            tally.seconds_teacher += time.perf_counter() - started
        d_R, overlap, packed = self.parallel.run(lambda: self._divergence(samples, teacher_RD))
        weights_R = position_weights(
            packed.lengths, self.config.normalize, sequences=sequences, tokens=tokens, device=d_R.device
        )
        loss = (weights_R * d_R).sum()
        tally.add(float(loss.detach()), d_R.detach(), overlap, packed.lengths)
        return loss

    def _divergence(self, samples: Sequence[Sample], teacher_RD: Tensor | None) -> tuple[Tensor, Overlap, Packed]:
        """Divergence of every sampled token from the teacher, or from what was sampled where there is none."""
        packed = pack([sample.student_prompt for sample in samples], samples, device=self.student.device)
        student_RD, head_VD = self.student.hidden(packed)[packed.predict_R], self.student.head_VD
        if teacher_RD is None:
            return *chunked_cross_entropy(student_RD, head_VD, packed.target_R, allowed=packed.allowed), packed
        scored = chunked_divergence(
            student_RD,
            head_VD,
            teacher_RD,
            self.teacher.head_VD,
            self.divergence(self.config.objective),
            allowed=packed.allowed,
        )
        return *scored, packed

    # -- the run ------------------------------------------------------------------------------------------------

    def fit(
        self,
        *,
        validate: Callable[[int], float] | None = None,
        meanwhile: Callable[[int], None] | None = None,
        on_step: Callable[[StepMetrics], None] | None = None,
        tracker: Tracker | None = None,
    ) -> FitResult:
        """Run the remaining steps, with a checkpoint every `save_every` and at the end, validated if asked to.

        In between the latest step is saved as often as 5% of the time allows; such a checkpoint goes with the next one.
        Of several processes the main one alone calls these, but for `meanwhile`, and all return the same.

        Args:
            validate: scores the student as it stands after so many steps, higher being better; 0 is the untrained one.
            meanwhile: what every other process does while the main one validates.
            on_step: told every step. KeyboardInterrupt or SystemExit from it leaves a checkpoint of that very step, and
                from anywhere else the last one; the next run goes on from there. (With `sync_every` above 1 only at its
                multiples: elsewhere a run that goes on would sample from other weights than an unbroken one.)
            tracker: told every step and every validation.
        """
        guard, stopped = Guard(self.config.guard), None
        for metrics in self.history:
            stopped = guard.check(metrics) or stopped
        scores = from_main(self._scores)

        def score(step: int) -> None:
            if validate is not None:
                with self.parallel.gathered(self.student.model):
                    if meanwhile is not None and not is_main():
                        meanwhile(step)
                    scores[step] = from_main(lambda: self._keep(scores, step, validate(step)))
                if tracker is not None and is_main():
                    tracker.validation(step, scores[step])

        def due(step: int) -> bool:
            """Whether a checkpoint is written here, and validated."""
            return bool(self._stays(step) or stopped)

        # nothing was trained yet, or it was killed between checkpoint and validation
        if self.start not in scores and due(self.start):
            score(self.start)
        for number in range(self.start, self.config.steps):
            if stopped:
                break
            began = time.perf_counter()
            with self.parallel.gathered(self.student.model):
                batch = self.source(number)
            metrics = self.step(batch, time.perf_counter() - began)
            self.history.append(metrics)
            stopped = guard.check(metrics)
            done = number + 1
            if on_step is not None and is_main():
                try:
                    on_step(metrics)
                except (KeyboardInterrupt, SystemExit):  # asked to stop where it costs nothing
                    if world() == 1 and done % self.config.sync_every == 0:  # others would wait for this one
                        self._save(done)
                    raise
            if tracker is not None and is_main():
                tracker.step(metrics)
            if due(done):
                self._save(done)
                score(done)
            elif from_main(partial(self._cheap_to_save, done)):
                self._save(done)
        return from_main(lambda: self._result(scores, stopped))

    def _result(self, scores: dict[int, float], stopped: str | None) -> FitResult:
        saved = {int(p.name.split("-")[1]): p for p in self.folder.glob("step-*") if (p / "manifest.json").exists()}
        last = saved[max(saved)] if saved else None
        scored = {step: score for step, score in scores.items() if step in saved}
        # of equal scores the earliest: less training, less drift
        best_step = max(scored, key=lambda s: (scored[s], -s)) if scored else max(saved, default=0)
        return FitResult(tuple(self.history), scores, last, saved.get(best_step), best_step, stopped)

    def _resumable(self) -> Path | None:
        """The newest checkpoint of this run, if its settings and what it started from are these."""
        newest = from_main(lambda: latest_resumable(self.folder))
        if newest is None:
            return None
        manifest = read_manifest(newest)
        same = (manifest.model, manifest.knowledge) == (self.base_model, self.knowledge)
        if not (same and self.config.matches(manifest.config)):
            raise CheckpointError(f"{self.folder} holds a run with other settings; give this run another folder")
        if manifest.parent != self.parent:
            held, wanted = (parent or "the base model" for parent in (manifest.parent, self.parent))
            raise CheckpointError(
                f"{self.folder} holds a run that started from {held}, not from {wanted}; give this run another folder"
            )
        return newest

    def _stays(self, step: int) -> bool:
        """Whether the checkpoint of a step outlives the next one."""
        return step % self.config.save_every == 0 or step == self.config.steps

    def _cheap_to_save(self, step: int) -> bool:
        passed = time.perf_counter() - self._saved
        return step % self.config.sync_every == 0 and self._seconds_saving < _SAVING_SHARE * passed

    def _save(self, step: int) -> None:
        started = time.perf_counter()
        folder = self.folder / f"step-{step:06d}"
        save_checkpoint(
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
        if is_main():
            tidy(self.folder, folder, self._stays)
        self._saved = time.perf_counter()
        self._seconds_saving = self._saved - started

    def _scores(self) -> dict[int, float]:
        path = self.folder / "validation.json"
        return {int(k): v for k, v in json.loads(path.read_text()).items()} if path.exists() else {}

    def _keep(self, scores: dict[int, float], step: int, score: float) -> float:
        """Write down a score beside the others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / ".validation.json"
        draft.write_text(json.dumps(scores | {step: score}))
        on_disk(draft)
        draft.replace(self.folder / "validation.json")
        return score

    def _metrics(self, batch: Batch, tally: Tally, norm: float, rate: float) -> StepMetrics:
        tally.peak_memory_bytes = peak_memory(self.parallel.device or self.student.device)
        return Tally.of_all(gather(tally)).metrics(
            batch,
            step=len(self.history) + 1,
            objective=self.config.objective,
            grad_norm=norm,
            learning_rate=rate,
            decode=self.decode,
        )


def _enable_checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
