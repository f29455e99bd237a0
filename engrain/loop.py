"""One round of self-improvement: play -> extract -> curate -> select -> consolidate -> judge.

Every stage writes what it made into the store under ids that follow from the round, so that a killed round goes on
where it stopped and nothing is counted twice. `RoundRecord.state` says which stages are over and what they decided.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any

from agent.cluster import Cluster
from agent.engines.base import Engine, asleep
from agent.engines.transformers import TransformersEngine
from agent.episode import Episode
from distill.monitor import StepMetrics
from engrain.arrivals import arrivals
from engrain.coach import open_coach
from engrain.config import ImproveConfig
from engrain.consolidate import consolidate
from engrain.evaluate import outcomes
from engrain.gate import Gain, Verdict, paired_gain
from engrain.judge import MOMENTS, Judged, Student, judge
from engrain.named import find_knowledge
from engrain.playing import Playing, load
from engrain.redaction import redact
from engrain.rounds import Listener, OodResult, RoundResult, RoundTasks
from engrain.runs import begin_run, finish_run
from engrain.weigh import Change, apply_changes, given, scored, usable, weigh
from envs.base import Task
from memory.curate import admit, is_instance_bound
from memory.effect import Effect, closed, paired
from memory.embeddings import load as load_embedder
from memory.extract import Extractor, alternate
from memory.normalise import similarity
from memory.reader import EngineReader, Reader
from memory.records import (
    CheckpointRecord,
    CheckpointStatus,
    EvaluationRecord,
    Item,
    ItemStatus,
    Knowledge,
    RoundRecord,
    RoundStatus,
    digest,
)
from memory.store import Store

STAGES = ("play", "extract", "curate", "select", "consolidate", "judge")


class Round:
    """Plays one round from wherever it stands.

    Args:
        store: the one memory of it all.
        engine: the model; it is trained in place and left with the base weights.
        config: settings.
        record: the round, from `open_round`.
        folder: where its checkpoints go.
        listener: is told what happens.
        open_coach: opens the model that `config.extract.coach` names; it is closed when the episodes are read.
        sampler: another engine of the same model, that plays and reads in place of `engine`; it sleeps during
            training where it can.
        synced: what training itself samples comes from `sampler` too, which gets the weights being trained every
            `config.distill.sync_every` steps. Otherwise it comes from these weights themselves.
        players: a cluster that plays in place of `engine` or `sampler`; these still read, and sample for training.
        track: names of trackers that training logs to.
        on_result: told the result just before the round counts as over, for what must not be missing then; told
            again if the process is killed over it.
        gate: has the last word on a checkpoint: what was played for the verdict, and the verdict, to a verdict. The
            default leaves it as it is. It is asked once a round; a round that was killed over its answer asks again.
    """

    def __init__(
        self,
        store: Store,
        engine: TransformersEngine,
        config: ImproveConfig,
        record: RoundRecord,
        folder: Path,
        listener: Listener,
        open_coach: Callable[[str], AbstractContextManager[Reader]] = open_coach,
        sampler: Engine | None = None,
        synced: bool = False,
        players: Cluster | None = None,
        track: Sequence[str] = (),
        on_result: Callable[[RoundResult], object] = lambda result: None,
        gate: Callable[[Judged], Verdict] = attrgetter("verdict"),
    ) -> None:
        self.sampler: Engine = sampler or engine
        self.player: Engine | Cluster = players or self.sampler
        self.synced = synced
        self.store, self.engine, self.config, self.record = store, engine, config, record
        self.folder, self.listener, self.open_coach = folder, listener, open_coach
        self.tasks, self.track, self.on_result = RoundTasks.draw(config), track, on_result
        self.gate = gate
        self.playing = Playing(store, self.player, config, record.id, listener)
        self.state: dict[str, Any] = dict(record.state)
        self._started = time.monotonic() - float(self.state.get("seconds", 0.0))
        self.parent = self._parent()

    def run(self) -> RoundResult:
        """All six stages, or with `config.knowledge` the last three; ends early, and says why, if nothing can pay."""
        items: list[Item] = []
        if self.config.knowledge is None:
            self.extract(self.play())
            items = self.curate()
            if "select" not in self.state and not usable(items, self.config.extract, self.engine.tokenizer):
                reason = "no usable experience was extracted, or none that fits the budget"
                return self._finish(RoundStatus.STOPPED, reason)
        knowledge, gap = self.select(items)
        if not gap.positive:
            best = "best" if self.config.knowledge is None else "given"
            reason = f"in context the {best} knowledge gains {gap} on validation tasks: training cannot pay"
            return self._finish(RoundStatus.STOPPED, reason, knowledge=knowledge, gap=gap)
        checkpoint = self.consolidate(knowledge)
        return self.judge(knowledge, gap, checkpoint)

    # -- the stages ---------------------------------------------------------------------------------------------

    def play(self) -> list[Episode]:
        """Training tasks, played by the current checkpoint without knowledge."""
        tasks = self.tasks.play
        self._begin("play", f"{len(tasks)} training tasks of {self.config.world.env}, no knowledge")
        load(self.player, self.parent)
        episodes = self.playing.play("play", tasks, sampling=self.config.play.sampling)
        self.listener.note(f"{sum(e.success for e in episodes)} of {len(episodes)} solved")
        return episodes

    def extract(self, episodes: Sequence[Episode]) -> None:
        """The model looks back at its episodes and writes items."""
        if "extract" in self.state:
            return
        settings = self.config.extract
        own, others = alternate(episodes, settings.episodes, self.config.seed), self._arrived()
        who = redact(settings.coach) if settings.coach else "the model"
        besides = f" and {len(others)} from elsewhere" if others else ""
        self._begin("extract", f"{who} reads {len(own)} of its episodes{besides} ({settings.mode})")
        if settings.coach is None:
            load(self.sampler, self.parent)
        with self.open_coach(settings.coach) if settings.coach else nullcontext(EngineReader(self.sampler)) as reader:
            extractions = Extractor(reader, settings.mode).extract([*own, *others], self.config.seed)
        for extraction in extractions:
            self.store.add_extraction(extraction, self.record.id)
        items, malformed = sum(len(e.items) for e in extractions), sum(len(e.malformed) for e in extractions)
        self.listener.note(f"{items} items, {malformed} malformed lines kept aside")
        self._done("extract", {"items": items, "malformed": malformed})

    def curate(self) -> list[Item]:
        """This round's items: what admission lets in, duplicates merged, marks set."""
        self._begin("curate", "admitting items, merging duplicates")
        settings = self.config.extract
        extractions = self.store.extractions(round_id=self.record.id)
        embedder = load_embedder(settings.embeddings)
        items = admit(
            self.store,
            extractions,
            self.record.id,
            most=settings.max_items,
            likeness=embedder.likeness if embedder else similarity,
        )
        refused = sum(len(self.store.events(subject=e.id, action="refused")) for e in extractions)
        for count, what in (
            (refused, "lines refused: `engrain memory` says why"),
            (sum(i.status is ItemStatus.QUARANTINED for i in items), "items in quarantine, their episodes unverified"),
            (sum(is_instance_bound(i) for i in items), "items quote their own task and come last"),
        ):
            if count:
                self.listener.note(f"{count} {what}")
        return items

    def select(self, items: Sequence[Item]) -> tuple[Knowledge, Gain]:
        """The text that helps most on validation tasks, and its gap to the bare model; what each item adds."""
        tasks, settings, named = self.tasks.validation, self.config.extract, self.config.knowledge
        if "select" not in self.state:
            texts = f"up to {settings.candidates} candidates" if named is None else f"knowledge {named}"
            self._begin("select", f"{texts} on {len(tasks)} validation tasks, in context")
            load(self.player, self.parent)
            bare = self.playing.evaluate("validation/bare", tasks, self.parent)
            self.listener.note(f"bare {bare.accuracy:.2f}")

            def score(text: Knowledge) -> list[bool]:
                kept = self._keep_knowledge(text)
                return outcomes(self.playing.evaluate("validation/in_context", tasks, self.parent, kept))

            if named is not None:
                weighed = given(find_knowledge(named, self.store), self.engine.tokenizer, score)
                self.listener.note(scored(weighed.best))
            else:
                weighed = weigh(
                    items,
                    outcomes(bare),
                    settings,
                    seed=self.config.seed,
                    tokenizer=self.engine.tokenizer,
                    score=score,
                    play=lambda k, places: self._some("validation/randomised", [tasks[p] for p in places], k, bare),
                    note=self.listener.note,
                )
            gap = paired_gain(outcomes(bare), weighed.best.outcomes)
            self.listener.note(f"gap {gap}")
            chosen = weighed.best.knowledge.id
            for effect in weighed.records(self.record, self.config, self.parent):
                self.store.record_effect(effect)
            changes = [change.model_dump(mode="json") for change in weighed.changes]
            self._done("select", {"knowledge": chosen, "gap": gap.model_dump(), "changes": changes})
        found = self.state["select"]
        apply_changes(self.store, self.record, found.get("changes", ()))
        return self.store.knowledge(found["knowledge"]), Gain.model_validate(found["gap"])

    def consolidate(self, knowledge: Knowledge) -> CheckpointRecord:
        """OPCD, with the checkpoint chosen on validation tasks."""
        config = self.config.distill
        held_out = self.tasks.validation
        if "consolidate" in self.state:
            return self.store.checkpoint(self.state["consolidate"]["checkpoint"])
        self._begin("consolidate", f"OPCD, {config.objective}, {config.steps} steps of {config.batch_size} episodes")

        def validate(sampler: Engine, step: int) -> float:
            name = f"validation/step-{step:06d}"
            episodes = self.playing.play(name, held_out, engine=sampler)
            accuracy = sum(e.success for e in episodes) / len(episodes)
            self.listener.note(f"validation after {step} steps: {accuracy:.2f}")
            return accuracy

        def step_over(metrics: StepMetrics) -> None:
            self.store.settle()  # before a checkpoint of this step is: no weights without their episodes
            self.listener.step(metrics, config.steps)

        run = begin_run(
            self.store,
            self._run_id,
            config,
            model=self.config.model,
            knowledge=knowledge,
            folder=self.folder,
            parent=self.parent,
            round_id=self.record.id,
        )
        with nullcontext() if self.synced else asleep(self.sampler):
            fit = consolidate(
                self.engine,
                self.tasks.pool,
                knowledge,
                config,
                self.folder,
                parent=self.parent,
                on_step=step_over,
                validate=validate,
                on_episode=self._keep_training_episode,
                sampler=self.sampler if self.synced else None,
                track=self.track,
            )
        if fit.stopped:
            self.listener.note(f"stopped early: {fit.stopped}")
        record = finish_run(self.store, run, fit)
        self._done(
            "consolidate",
            {
                "checkpoint": record.id,
                "step": fit.best_step,
                "validation": fit.validation,
                "history": [metrics.model_dump() for metrics in fit.history],
                "stopped": fit.stopped,
            },
        )
        return record

    def judge(self, knowledge: Knowledge, gap: Gain, checkpoint: CheckpointRecord) -> RoundResult:
        """Bare, in context and distilled on test tasks and other worlds, until it is clear; promote or reject."""
        settings, others = self.config.evaluation, self.tasks.ood
        upto = f"{len(self.tasks.test)} test tasks never seen before, and {len(others)} other worlds"
        self._begin("judge", upto if settings.looks == 1 else f"up to {upto}, in {settings.looks} looks")
        texts = {Student.IN_CONTEXT: knowledge}
        weights = {Student.DISTILLED: checkpoint}

        def play(student: Student, name: str, tasks: Sequence[Task]) -> list[Episode]:
            load(self.player, weights.get(student, self.parent))
            return self.playing.play(name, tasks, texts.get(student))

        def record(student: Student, name: str, episodes: Sequence[Episode]) -> EvaluationRecord:
            return self.playing.keep(name, episodes, weights.get(student, self.parent), texts.get(student))

        judged = judge(self.tasks, settings, play, self.listener.note)
        evaluations = {
            student.value: record(student, f"test/{student.value}", judged.test[student]) for student in Student
        }
        found = {
            world: {
                MOMENTS[student]: record(student, f"ood/{MOMENTS[student]}/{world}", played[student])
                for student in Student
            }
            for world, played in judged.ood.items()
        }
        if "judge" not in self.state:  # asked once: a person may have answered
            self._done("judge", self.gate(judged).model_dump(mode="json"))
        verdict = Verdict.model_validate(self.state["judge"])
        if verdict.promoted:
            self._decide(checkpoint, CheckpointStatus.PROMOTED, verdict.reason)
            load(self.player, checkpoint)
            self._absorb(knowledge, gap, checkpoint)
        else:
            self._decide(checkpoint, CheckpointStatus.REJECTED, verdict.reason)
        return self._finish(
            RoundStatus.FINISHED,
            verdict.reason,
            knowledge=knowledge,
            gap=gap,
            verdict=verdict,
            checkpoint=self.store.checkpoint(checkpoint.id),
            evaluations=evaluations,
            ood={world: OodResult(**moments) for world, moments in found.items()},
        )

    # -- what the stages share ----------------------------------------------------------------------------------

    def _decide(self, checkpoint: CheckpointRecord, status: CheckpointStatus, reason: str) -> None:
        """Promote or reject, once: what a person did to the checkpoint since then stays."""
        why = f"round {self.record.number}: {reason}"
        if all(event.why != why for event in self.store.events(subject=checkpoint.id)):
            self.store.set_checkpoint_status(checkpoint.id, status, "engrain", why)

    def _arrived(self) -> list[Episode]:
        """Episodes from elsewhere that this round reads: the same ones however often it is begun."""
        if "arrivals" not in self.state:
            self._done("arrivals", arrivals(self.store, self.config, self.record, self.tasks.pool))
        left = self.store.has_episodes(self.state["arrivals"])  # one may have been forgotten
        return [self.store.episode(id_) for id_ in self.state["arrivals"] if id_ in left]

    def _absorb(self, knowledge: Knowledge, gap: Gain, checkpoint: CheckpointRecord) -> None:
        """Retire the items of a knowledge whose gap has closed: the weights know it now."""
        if "absorb" not in self.state:
            tasks = self.tasks.validation
            bare = outcomes(self.playing.evaluate("validation/distilled", tasks, checkpoint))
            helped = outcomes(self.playing.evaluate("validation/distilled_in_context", tasks, checkpoint, knowledge))
            left, first = paired(bare, helped), Effect(gap.difference, gap.low, gap.high, gap.n)
            self.listener.note(f"left of the gap on validation tasks: {left}")
            why = f"checkpoint {checkpoint.id} knows it: in its context the knowledge adds {left}, before: {first}"
            gone = [item.id for item in knowledge.items] if closed(first, left) else []
            changes = [Change(item=id_, status=ItemStatus.ABSORBED, why=why).model_dump(mode="json") for id_ in gone]
            self._done("absorb", changes)
        apply_changes(self.store, self.record, self.state["absorb"])

    def _keep_knowledge(self, knowledge: Knowledge) -> Knowledge:
        return self.store.add_knowledge(knowledge, self.record.id, self.parent.knowledge if self.parent else None)

    def _some(
        self, name: str, tasks: Sequence[Task], knowledge: Knowledge | None, bare: EvaluationRecord
    ) -> list[bool]:
        """Outcomes of some tasks with a knowledge; without one they were measured already."""
        if knowledge is None:
            known = {result.task_id: result.success for result in bare.results}
            return [known[task.id] for task in tasks]
        kept = self._keep_knowledge(knowledge)
        return [episode.success for episode in self.playing.play(name, tasks, kept)]

    def _parent(self) -> CheckpointRecord | None:
        """The checkpoint the round began with, also when it promoted another before it was killed."""
        if "parent" not in self.state:
            current = self.store.current_checkpoint(self.config.model)
            self._done("parent", current.id if current else None)
        identity = self.state["parent"]
        return self.store.checkpoint(identity) if identity else None

    @property
    def _run_id(self) -> str:
        """The id of the round's one training."""
        return digest("run", self.record.id)

    def _keep_training_episode(self, episode: Episode) -> None:
        self.store.add_episodes([episode], round_id=self.record.id, stage="train", run_id=self._run_id)

    def _begin(self, stage: str, text: str) -> None:
        self.record = self.store.update_round(self.record.id, stage=stage)
        self.listener.stage(stage, text)

    def _done(self, key: str, value: Any) -> None:
        self.state[key] = value
        self.state["seconds"] = time.monotonic() - self._started
        self.record = self.store.update_round(self.record.id, state=self.state)

    def _finish(self, status: RoundStatus, reason: str, **found: Any) -> RoundResult:
        trained = self.state.get("consolidate", {})
        self._done("finished", True)
        result = RoundResult(
            round=self.record.model_copy(update={"status": status.value, "verdict": reason}),
            status=status.value,
            reason=reason,
            validation={int(step): score for step, score in trained.get("validation", {}).items()},
            history=tuple(StepMetrics.model_validate(metrics) for metrics in trained.get("history", ())),
            seconds=self.state["seconds"],
            **found,
        )
        self.on_result(result)
        self.record = self.store.update_round(self.record.id, status=status, verdict=reason)
        return result
