"""Who samples, with what in the prompt, and what is trained on of it: the student, its teacher, or stored prefixes."""

from __future__ import annotations

import logging

import pytest
import torch

from agent.engines.lora import _sum, can_merge
from agent.engines.transformers import TransformersEngine
from agent.episode import SamplingParams
from agent.rollout import play
from distill.adapters import STUDENT, teacher_weights
from distill.baselines import MixedSource, TeacherSource
from distill.errors import DistillConfigError
from distill.partial import PrefixSource
from distill.refresh import RefreshedSource
from distill.source import OnPolicySource
from envs.base import Env, Observation, Split, Step, Task

SIX = SamplingParams(max_tokens=6)


class Chat(Env):
    """Three turns; crashes or succeeds if its parameters say so."""

    system = "Talk."
    max_turns = 3

    def reset(self) -> Observation:
        self.turns = 0
        return Observation(f"hello {self.task.seed}")

    def step(self, text: str) -> Step:
        self.turns += 1
        if self.task.parameters.get("crash"):
            raise RuntimeError("the env fell over")
        return Step(Observation(f"go on, {self.turns}"), 0.0, self.turns == 3)

    @property
    def score(self) -> float:
        return float(self.task.parameters.get("score", 0))


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch):
    """`chats(*parameters)`: one task each."""
    monkeypatch.setattr("envs.registry.make", Chat)
    return lambda *parameters: [Task.create("chat", Split.TRAIN, i, p) for i, p in enumerate(parameters)]


@pytest.fixture
def student(tiny_model, tiny_tokenizer, make_trainer):
    """An engine around a student whose adapter has moved far from its base."""
    engine = make_trainer().source.engine
    with torch.no_grad():
        for name, weight in engine.network.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
    return engine


def teacher_source(engine, tasks, knowledge, **options) -> TeacherSource:
    settings = {"knowledge_id": "k1", "model": engine.network, "batch_size": len(tasks), "sampling": SIX, "seed": 0}
    return TeacherSource(tasks, engine, knowledge, **settings | options)


def test_every_turn_is_masked_to_its_sampled_tokens_and_their_end(student, chats, knowledge) -> None:
    source = OnPolicySource(chats({}, {}), student, knowledge, batch_size=2, sampling=SIX, seed=0)
    batch = source(0)
    for sample, episode in zip(batch.samples, batch.episodes, strict=True):
        assert len(episode.turns) == 3
        spans = {i for turn in episode.turns for i in range(turn.start, turn.end)}
        marked = {episode.prompt_length + i for i, sampled in enumerate(sample.mask) if sampled}
        assert marked == spans
        assert sample.mask[-1]  # nothing after the last reply is read
        end = source.renderer.end_of_turn
        for turn in episode.turns:  # whether sampled or not, exactly one end of turn closes the reply
            closed = episode.token_ids[turn.start : turn.end].count(end)
            assert closed == (turn.finish_reason == "stop")
    assert len({s.teacher_prompt for s in batch.samples}) == 2


def test_all_turns_of_a_batch_are_sampled_from_weights_merged_once(student, chats, knowledge, monkeypatch) -> None:
    made = []
    monkeypatch.setattr("agent.engines.lora._sum", lambda layer, *rest: made.append(layer) or _sum(layer, *rest))
    batch = OnPolicySource(chats({}, {}), student, knowledge, batch_size=2, sampling=SIX, seed=0)(0)
    assert {len(e.turns) for e in batch.episodes} == {3}
    assert len(made) == len({id(layer) for layer in made}) == 14
    assert can_merge(student.network)


def test_a_failed_rollout_shifts_nothing(student, chats, knowledge) -> None:
    batch = OnPolicySource(chats({}, {"crash": True}, {}), student, knowledge, batch_size=3, sampling=SIX, seed=0)(0)
    assert batch.dropped == sum(e.sampled == 0 for e in batch.episodes)
    assert sum(e.error is not None for e in batch.episodes) == 1
    played = {e.id: e for e in batch.episodes}
    assert all(sample.sampled for sample in batch.samples)
    for sample in batch.samples:  # what the crashed one said before still counts, as its own
        hello = f"hello {played[sample.episode_id].task.seed}\n"
        assert all(hello in student.renderer.decode(p) for p in (sample.student_prompt, sample.teacher_prompt))
        assert (
            sample.continuation == played[sample.episode_id].token_ids[len(sample.student_prompt) :][: len(sample.mask)]
        )


def test_a_task_that_is_dealt_twice_is_sampled_twice(student, chats, knowledge) -> None:
    batch = OnPolicySource(chats({}), student, knowledge, batch_size=3, sampling=SIX, seed=0)(0)
    assert len({s.continuation for s in batch.samples}) == 3
    assert len({e.id for e in batch.episodes}) == 3


def test_the_teacher_plays_with_its_own_weights_and_the_knowledge(student, tiny_model, tiny_tokenizer, tasks) -> None:
    knowledge = "Be brief."
    source = teacher_source(student, tasks[:3], knowledge)
    before = {n: w.clone() for n, w in student.network.named_parameters()}
    batch = source(0)
    base = TransformersEngine.wrap(tiny_model(initializer_range=0.2), tiny_tokenizer, name="tiny")
    alone = teacher_source(base, tasks[:3], knowledge, model=None)(0)
    assert [s.continuation for s in batch.samples] == [s.continuation for s in alone.samples]
    student_samples = OnPolicySource(tasks[:3], student, knowledge, batch_size=3, sampling=SIX, seed=0)(0).samples
    assert {s.continuation for s in batch.samples}.isdisjoint(s.continuation for s in student_samples)
    for sample, episode in zip(batch.samples, batch.episodes, strict=True):
        assert sample.teacher_prompt == episode.token_ids[: episode.prompt_length]
        assert knowledge in source.renderer.decode(sample.teacher_prompt)
        assert knowledge not in source.renderer.decode(sample.student_prompt)
        assert episode.knowledge == "k1"
    after = dict(student.network.named_parameters())
    assert all(torch.equal(w, after[n]) for n, w in before.items())
    assert student.network.base_model.active_adapters == [STUDENT]


def test_bare_prompts_are_the_same_whoever_plays(student, tasks, knowledge) -> None:
    mine = OnPolicySource(tasks[:3], student, knowledge, batch_size=3, sampling=SIX, seed=0)(0).samples
    theirs = teacher_source(student, tasks[:3], knowledge)(0).samples
    assert {(s.student_prompt, s.teacher_prompt) for s in mine} == {
        (s.student_prompt, s.teacher_prompt) for s in theirs
    }


def test_only_successes_are_kept_and_none_is_an_error(student, chats, knowledge) -> None:
    source = teacher_source(student, chats({"score": 1}, {}, {}), knowledge, only_successes=True)
    batch = source(0)
    assert (len(batch.samples), len(batch.episodes), batch.dropped) == (1, 3, 2)
    with pytest.raises(DistillConfigError, match="none of the teacher's 4 episodes"):
        teacher_source(student, chats({}), knowledge, only_successes=True)(0)


def test_another_try_samples_anew(student, chats, knowledge, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    monkeypatch.setattr(Chat, "success", property(lambda self: len(tries) > 1))
    source = teacher_source(student, chats({}), knowledge, only_successes=True, on_episode=tries.append)
    batch = source(0)
    assert len(batch.episodes) == len({e.token_ids for e in batch.episodes}) == len(tries) == 3


def test_a_mixed_batch_holds_both_and_is_as_stale_as_its_stalest(student, tasks, knowledge) -> None:
    mine = OnPolicySource(tasks, student, knowledge, batch_size=1, sampling=SIX, seed=0)
    theirs = teacher_source(student, tasks, knowledge, batch_size=2)
    batch = MixedSource(mine, theirs)(1)
    assert batch.samples == mine(1).samples + theirs(1).samples
    assert [e.knowledge for e in batch.episodes] == [None, "k1", "k1"]


@pytest.mark.parametrize("played_with_knowledge", [False, True])
def test_prefixes_are_cut_before_a_reply_and_only_the_reply_counts(
    student, chats, knowledge, played_with_knowledge: bool
) -> None:
    old = {"knowledge": "An older rule.", "knowledge_id": "k0"} if played_with_knowledge else {}
    episodes = play(chats({}, {}), student, sampling=SIX, namespace="old", **old)
    source = PrefixSource(episodes, student, knowledge, batch_size=6, sampling=SIX, seed=0)
    batch = source(0)
    assert len(batch.samples) == 6
    assert batch.episodes == ()
    assert batch.dropped == 0
    by_id = {e.id: e for e in episodes}
    for sample in batch.samples:
        name, number = sample.episode_id.split("/")
        episode, turn = by_id[name], by_id[name].turns[int(number)]
        said = episode.token_ids[episode.prompt_length : turn.start]
        assert sample.student_prompt[len(sample.student_prompt) - len(said) :] == said
        assert sample.teacher_prompt[len(sample.teacher_prompt) - len(said) :] == said
        bare, taught = student.renderer.decode(sample.student_prompt), student.renderer.decode(sample.teacher_prompt)
        assert knowledge in taught
        assert taught.count("Talk.") == bare.count("Talk.") == 1
        for text in (knowledge, "An older rule."):
            assert text not in bare
        assert "An older rule." not in taught
        assert all(sample.mask)
        assert 0 < len(sample.mask) <= 6
    assert source(0) == batch
    assert source(1) != batch


def test_prefixes_that_do_not_fit_are_counted_and_strangers_refused(
    student, chats, knowledge, caplog: pytest.LogCaptureFixture
) -> None:
    episodes = play(chats({}), student, sampling=SIX, namespace="old")
    options = {"batch_size": 1, "sampling": SIX, "seed": 0}
    prefixes = PrefixSource(episodes, student, knowledge, **options).prefixes
    bound = max(len(p.teacher_prompt) for p in prefixes)
    with caplog.at_level(logging.WARNING):
        source = PrefixSource(episodes, student, knowledge, max_context=bound, **options)
    assert len(source.prefixes) == 2
    assert "1 of 3 prefixes" in caplog.text
    assert all(len(s.teacher_prompt) + len(s.continuation) <= bound for step in range(4) for s in source(step).samples)
    with pytest.raises(DistillConfigError, match="no prefix"):
        PrefixSource(episodes, student, knowledge, max_context=5, **options)
    stranger = episodes[0].model_copy(update={"model": "another"})
    with pytest.raises(DistillConfigError, match="another"):
        PrefixSource([stranger], student, knowledge, **options)


def test_an_engine_of_its_own_is_refreshed_and_says_how_stale_it_is(
    student, tiny_model, tiny_tokenizer, tasks, knowledge, tmp_path
) -> None:
    copy = TransformersEngine(tiny_model(initializer_range=0.2), tiny_tokenizer, name="tiny", dtype="float32")
    options = {"batch_size": 2, "sampling": SIX, "seed": 0}
    fresh = OnPolicySource(tasks, student, knowledge, **options)
    lagging = RefreshedSource(
        OnPolicySource(tasks, copy, knowledge, **options), copy, student.network, tmp_path / "run", every=2
    )
    ids = lambda batch: [s.continuation for s in batch.samples]  # noqa: E731
    first = fresh(1)
    assert (ids(lagging(0)), lagging.synced) == (ids(fresh(0)), 0)
    with torch.no_grad():
        for name, weight in student.network.named_parameters():
            if "lora_B" in name:
                weight.neg_()
    stale = lagging(1)
    assert stale.staleness == 1
    assert ids(stale) == ids(first) != ids(fresh(1))
    assert stale.episodes[0].checkpoint == "sync-000000"
    again = lagging(2)
    assert again.staleness == 0
    assert ids(again) == ids(fresh(2))
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["sync-000002"]


def test_the_teachers_adapter_samples_where_there_is_one(make_trainer, tasks, knowledge) -> None:
    engine = make_trainer(teacher_kind="ema").source.engine
    before = teacher_source(engine, tasks[:2], knowledge)(0).samples
    with torch.no_grad():
        for name, weight in engine.network.named_parameters():
            if "lora_B.teacher" in name:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(4))
    assert teacher_source(engine, tasks[:2], knowledge)(0).samples != before
    with teacher_weights(engine.network):
        assert engine.network.base_model.active_adapters == ["teacher"]
    assert engine.network.base_model.active_adapters == [STUDENT]
