"""Many games at once: batching, append-only ids, masks, and failures that cost one episode."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.engines.base import Completion
from agent.engines.transformers import TransformersEngine
from agent.episode import Episode, FinishReason, SamplingParams, StopReason, episode_id
from agent.errors import ContextLengthError, EngineFailedError
from agent.renderer import Renderer
from agent.rollout import RolloutStats, play, request_seed
from envs.base import Env, Observation, Split, Step, Task

SAMPLING = SamplingParams(max_tokens=16)


class QueueEngine:
    """Replies what `reply` says; counts its batches; may be slow, and may refuse long prompts late."""

    model = "fake"
    checkpoint = "ck-7"

    def __init__(self, tokenizer: Any, reply: Callable[[str, SamplingParams], str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_context = 100_000
        self.reply = reply or (lambda prompt, params: f"go {params.seed}")
        self.batches: list[int] = []
        self.seeds: list[int | None] = []
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.refuse_beyond: int | None = None

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
        self.batches.append(len(prompts))
        completions = []
        for prompt, params in zip(prompts, sampling, strict=True):
            if self.refuse_beyond is not None and len(prompt) > self.refuse_beyond:
                raise ContextLengthError(f"{len(prompt)} tokens are too many")
            self.seeds.append(params.seed)
            text = self.reply(self.tokenizer.decode(list(prompt)), params)
            ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]
            finish = FinishReason.STOP if len(ids) <= params.max_tokens else FinishReason.LENGTH
            ids = ids[: params.max_tokens]
            completions.append(Completion(tuple(ids), tuple(-0.5 for _ in ids), finish))
        return completions

    def load(self, checkpoint: Path | None) -> None: ...

    def close(self) -> None: ...


class Echo(Env):
    """Says back what it hears for `turns` turns; its parameters make it fail, wait or stop early."""

    system = "Echo."
    max_turns = 20
    closed: list[str] = []  # noqa: RUF012 - shared on purpose: tests read it

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.turn = 0
        self.options = dict(task.parameters)
        self.max_turns = self.options.get("max_turns", 20)

    def reset(self) -> Observation:
        if self.options.get("fail_at") == 0:
            raise OSError("no such\ngame")
        time.sleep(self.options.get("wait", 0.0))
        return Observation(f"start {self.task.seed}")

    def step(self, text: str) -> Step:
        self.turn += 1
        time.sleep(self.options.get("wait", 0.0))
        if self.turn == self.options.get("fail_at"):
            raise RuntimeError("crashed")
        done = self.turn >= self.options.get("turns", 3)
        return Step(Observation(f"heard {text!r}"), 0.5, done, feedback="well done" if done else "")

    @property
    def score(self) -> float:
        return 1.0 if self.turn >= self.options.get("turns", 3) else 0.0

    def close(self) -> None:
        Echo.closed.append(self.task.id)


def tasks_of(count: int, **parameters: Any) -> list[Task]:
    return [Task.create("echo", Split.TRAIN, seed, parameters) for seed in range(count)]


@pytest.fixture
def engine(tiny_tokenizer: Any) -> QueueEngine:
    return QueueEngine(tiny_tokenizer)


def run(tasks: Sequence[Task], engine: Any, **options: Any) -> list[Episode]:
    return play(tasks, engine, **{"sampling": SAMPLING, "namespace": "test", "make_env": Echo, **options})


def assert_consistent(episode: Episode, renderer: Renderer, knowledge: str | None = None) -> None:
    """Ids are the first prompt, sampled spans and bridges, each rendered once; the mask covers the spans only."""
    first = next(i for i, message in enumerate(episode.messages) if message.role == "user") + 1
    ids = renderer.prompt(episode.messages[:first], knowledge)
    assert len(ids) == episode.prompt_length
    mask = [False] * len(ids)
    before = list(episode.messages[:first])
    for number, turn in enumerate(episode.turns):
        sampled = list(episode.token_ids[turn.start : turn.end])
        assert turn.start == len(ids)
        assert renderer.decode(sampled) == turn.action == episode.messages[first + 2 * number].content
        assert before[-1].content == turn.observation
        ids += sampled
        mask += [True] * len(sampled)
        if number + 1 < len(episode.turns):
            then = episode.turns[number + 1].observation
            bridge = renderer.bridge(before, then, ended=sampled[-1] == renderer.end_of_turn)
            ids += bridge
            mask += [False] * len(bridge)
            before += episode.messages[first + 2 * number : first + 2 * number + 2]
    assert tuple(ids) == episode.token_ids
    assert tuple(mask) == episode.loss_mask
    assert all((logprob < 0) == sampled for logprob, sampled in zip(episode.logprobs, mask, strict=True))


def test_every_field_of_an_episode(engine: QueueEngine) -> None:
    tasks = tasks_of(2)
    stats = RolloutStats()
    episodes = run(tasks, engine, knowledge="Know.", knowledge_id="k1", seed=5, stats=stats)
    episode = episodes[1]
    assert episode.id == episode_id("test", tasks[1])
    assert episode.task == tasks[1]
    assert [m.role for m in episode.messages] == ["system", "user", *["assistant", "user"] * 3]
    assert "Know." not in episode.messages[0].content
    assert engine.tokenizer.decode(list(episode.token_ids)).startswith("<|im_start|>system\nKnow.\n\nEcho.")
    assert (episode.reward, episode.score, episode.success) == (1.5, 1.0, True)
    assert episode.feedback == "well done"
    assert episode.stop_reason is StopReason.DONE
    assert episode.error is None
    assert (episode.model, episode.checkpoint, episode.knowledge) == ("fake", "ck-7", "k1")
    assert episode.sampling == SAMPLING.model_copy(update={"seed": 5})
    assert episode.seconds > 0
    assert episode.started_at.tzinfo is not None
    assert not episode.human
    assert_consistent(episode, Renderer(engine.tokenizer), "Know.")
    assert (stats.episodes, stats.successes, stats.requests) == (2, 2, 6)
    assert stats.sampled_tokens == sum(e.sampled for e in episodes)
    assert 0 < stats.engine_seconds <= stats.wall_seconds


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.integers(1, 4),
    max_tokens=st.integers(1, 12),
    text=st.text(st.characters(codec="ascii", exclude_categories=("Cc",)), max_size=14),
    knowledge=st.none() | st.just("Know this."),
    limit=st.none() | st.integers(1, 150),
)
def test_ids_only_grow_and_masks_cover_what_was_sampled(
    engine: QueueEngine, turns: int, max_tokens: int, text: str, knowledge: str | None, limit: int | None
) -> None:
    engine.reply = lambda prompt, params: text
    episodes = run(
        tasks_of(2, turns=turns),
        engine,
        knowledge=knowledge,
        sampling=SamplingParams(max_tokens=max_tokens),
        max_tokens_per_episode=limit,
    )
    for episode in episodes:
        assert_consistent(episode, Renderer(engine.tokenizer), knowledge)
        if limit is not None:
            assert len(episode.token_ids) - episode.prompt_length <= limit
        if episode.stop_reason is StopReason.LENGTH:
            assert "leaves no room" in (episode.error or "")
        else:
            assert len(episode.turns) == turns


def test_results_come_in_the_order_of_the_tasks(engine: QueueEngine) -> None:
    tasks = [Task.create("echo", Split.TRAIN, n, {"wait": 0.03 * (n % 3), "turns": 1 + n % 2}) for n in range(9)]
    episodes = run(tasks, engine, samples=2)
    assert [episode.task for episode in episodes] == [task for task in tasks for _ in range(2)]
    assert len({episode.id for episode in episodes}) == 18


def test_ready_games_share_an_engine_call(engine: QueueEngine) -> None:
    run(tasks_of(10), engine)
    assert sum(engine.batches) == 30
    assert len(engine.batches) < 10  # how many are ready together is a matter of time
    engine.batches.clear()
    run(tasks_of(10), engine, batch=4)
    assert max(engine.batches) == 4
    assert sum(engine.batches) == 30


def test_a_slow_env_does_not_stall_the_others(engine: QueueEngine) -> None:
    slow = Task.create("echo", Split.TRAIN, 99, {"wait": 0.6, "turns": 1})
    order: list[int] = []
    run([slow, *tasks_of(5)], engine, on_episode=lambda episode: order.append(episode.task.seed))
    assert order[-1] == 99
    assert len(order) == 6


def test_a_failing_env_costs_its_own_episode(engine: QueueEngine) -> None:
    tasks = [
        *tasks_of(2),
        Task.create("echo", Split.TRAIN, 50, {"fail_at": 0}),
        Task.create("echo", Split.TRAIN, 51, {"fail_at": 2}),
    ]
    stats = RolloutStats()
    Echo.closed.clear()
    fine, _, never, midway = run(tasks, engine, stats=stats)
    assert fine.stop_reason is StopReason.DONE
    assert (never.stop_reason, never.error) == (StopReason.ERROR, "OSError: no such game")
    assert (never.token_ids, never.prompt_length) == ((), 0)
    assert (midway.stop_reason, midway.error) == (StopReason.ERROR, "RuntimeError: crashed")
    assert len(midway.turns) == 1
    assert midway.score == 0.0
    assert stats.failed == 2
    assert sorted(Echo.closed) == sorted(task.id for task in tasks)


def test_max_turns_ends_an_episode(engine: QueueEngine) -> None:
    episode = run(tasks_of(1, turns=9, max_turns=2), engine)[0]
    assert episode.stop_reason is StopReason.MAX_TURNS
    assert len(episode.turns) == 2
    assert not episode.success


def test_a_prompt_beyond_the_context_ends_an_episode(engine: QueueEngine) -> None:
    engine.max_context = 40
    episode = run(tasks_of(1), engine, knowledge="k" * 50)[0]
    assert episode.stop_reason is StopReason.LENGTH
    assert "leaves no room" in (episode.error or "")
    assert episode.turns == ()


def test_an_engine_that_refuses_a_length_does_not_stop_the_others(engine: QueueEngine) -> None:
    engine.refuse_beyond = 120
    long = Task.create("echo", Split.TRAIN, 10**80, {})
    short, refused = run([*tasks_of(1, turns=1), long], engine)
    assert short.stop_reason is StopReason.DONE
    assert refused.stop_reason is StopReason.LENGTH
    assert "too many" in (refused.error or "")


def test_an_engine_that_fails_ends_the_run_and_keeps_what_is_finished(engine: QueueEngine) -> None:
    kept: list[Episode] = []

    def reply(prompt: str, params: SamplingParams) -> str:
        if kept:
            raise EngineFailedError("gone")
        return "a"

    engine.reply = reply
    tasks = [*tasks_of(1, turns=1), *tasks_of(1, turns=3)]
    with pytest.raises(EngineFailedError, match="gone"):
        run(tasks, engine, on_episode=kept.append)
    assert [episode.stop_reason for episode in kept] == [StopReason.DONE]


def test_an_interrupt_keeps_what_is_finished_and_skip_goes_on_from_there(engine: QueueEngine) -> None:
    kept: list[Episode] = []

    def keep(episode: Episode) -> None:
        kept.append(episode)
        if len(kept) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tasks_of(8), engine, batch=2, on_episode=keep)
    rest = run(tasks_of(8), engine, skip={episode.id for episode in kept})
    assert len(rest) == 5
    whole = {episode.id: episode.token_ids for episode in run(tasks_of(8), engine)}
    assert whole == {episode.id: episode.token_ids for episode in [*kept, *rest]}


def test_seeds_depend_on_task_sample_and_turn_only(engine: QueueEngine) -> None:
    tasks = tasks_of(4)
    first = run(tasks, engine, seed=1, batch=3, workers=2)
    again = run(tasks[::-1], engine, seed=1)
    assert [e.token_ids for e in first] == [e.token_ids for e in again[::-1]]
    other = run(tasks, engine, seed=2)
    assert all(a.token_ids != b.token_ids for a, b in zip(first, other, strict=True))
    assert len({request_seed(1, e.task.id, k, turn) for e in first for k in range(2) for turn in range(3)}) == 24


def test_envs_run_outside_the_calling_thread_and_callbacks_inside(engine: QueueEngine) -> None:
    seen: set[str] = set()

    class Where(Echo):
        def step(self, text: str) -> Step:
            seen.add(threading.current_thread().name)
            return super().step(text)

    callers: set[str] = set()
    run(
        tasks_of(3),
        engine,
        make_env=Where,
        on_episode=lambda episode: callers.add(threading.current_thread().name),
        progress=lambda stats: callers.add(threading.current_thread().name),
    )
    assert callers == {threading.current_thread().name}
    assert not seen & callers


def test_a_task_that_stands_there_twice_is_played_twice(engine: QueueEngine) -> None:
    one, other = tasks_of(2)
    episodes = run([one, other, one], engine)
    assert [episode.task.id for episode in episodes] == [one.id, other.id, one.id]
    assert len({episode.id for episode in episodes}) == 3
    assert episodes[0].turns[0].action != episodes[2].turns[0].action  # another seed, so another sample
    assert [episode.id for episode in episodes[::2]] == [episode.id for episode in run([one], engine, samples=2)]


def test_nothing_to_play(engine: QueueEngine) -> None:
    assert run([], engine) == []
    assert engine.batches == []


def test_a_real_tiny_model_plays(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    engine = TransformersEngine(tiny_model(), tiny_tokenizer, name="tiny")
    episodes = run(tasks_of(3), engine, sampling=SamplingParams(max_tokens=6), knowledge="Know.")
    renderer = Renderer(tiny_tokenizer)
    for episode in episodes:
        first = list(episode.token_ids[: episode.prompt_length])
        assert first == renderer.prompt(episode.messages[:2], "Know.")
        assert len(episode.turns) == 3
    small = TransformersEngine(tiny_model(), tiny_tokenizer, name="tiny", max_batch=1, reuse_tokens=0)
    again = run(tasks_of(3), small, sampling=SamplingParams(max_tokens=6), knowledge="Know.", batch=1)
    assert [e.token_ids for e in again] == [e.token_ids for e in episodes]


@pytest.mark.model
def test_smollm2_plays_with_consistent_ids(smollm2: Path) -> None:
    engine = TransformersEngine(smollm2, name="smollm2-135m")
    for episode in run(tasks_of(3), engine, knowledge="Be brief."):
        assert_consistent(episode, engine.renderer, "Be brief.")


def test_in_lockstep_batches_do_not_depend_on_timing(engine: QueueEngine) -> None:
    tasks = tasks_of(7)

    class Dawdling(Echo):
        def step(self, text: str) -> Step:
            time.sleep(random.random() / 50)
            return super().step(text)

    def batches() -> list[list[tuple[int, ...]]]:
        seen: list[list[tuple[int, ...]]] = []
        generate = engine.generate

        def spy(prompts, sampling):
            seen.append([tuple(prompt) for prompt in prompts])
            return generate(prompts, sampling)

        engine.generate = spy
        try:
            run(tasks, engine, seed=1, batch=3, workers=4, lockstep=True, make_env=Dawdling)
        finally:
            engine.generate = generate
        return seen

    first = batches()
    assert all(batches() == first for _ in range(3))
