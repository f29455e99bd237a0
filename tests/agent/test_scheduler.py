"""Engines that take requests at any time, and envs in worker processes that crash, hang or dawdle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.engines.base import Completion, StreamingEngine
from agent.episode import Episode, FinishReason, SamplingParams, StopReason
from agent.errors import ContextLengthError, EngineFailedError, ServerFailedError
from agent.game import Game, Plan
from agent.renderer import Renderer
from agent.rollout import RolloutStats, play
from agent.scheduler import Scheduler
from agent.workers import Workers, shared_workers
from envs import registry
from envs.base import Env, Observation, Split, Step, Task
from envs.errors import EngrainError

SAMPLING = SamplingParams(max_tokens=16)


class Calls:
    """An engine of whole calls that answers each prompt with its length and seed."""

    model, checkpoint, max_context = "fake", None, 100_000

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.batches: list[list[SamplingParams]] = []

    def answer(self, prompt: Sequence[int], params: SamplingParams) -> Completion:
        text = f"{len(prompt)} {params.seed}"
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end][: params.max_tokens]
        return Completion(tuple(ids), (-0.5,) * len(ids), FinishReason.STOP, cached_tokens=len(prompt) - 1)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
        self.batches.append(list(sampling))
        return [self.answer(prompt, params) for prompt, params in zip(prompts, sampling, strict=True)]

    def load(self, checkpoint: Path | None) -> None: ...

    def close(self) -> None: ...


class Stream(Calls):
    """An engine that takes requests at any time; each needs as many polls as `cost` says."""

    def __init__(self, tokenizer: Any, cost: Callable[[int], int] = lambda number: 1) -> None:
        super().__init__(tokenizer)
        self.cost = cost
        self.running: dict[int, list[Any]] = {}
        self.submitted = 0
        self.seen: list[int] = []
        self.cancelled: list[int] = []
        self.fails: dict[int, EngrainError] = {}
        self.breaks_at: int | None = None
        self.refuse_beyond: int | None = None

    @property
    def pending(self) -> int:
        return len(self.running)

    def submit(self, prompt: Sequence[int], sampling: SamplingParams) -> int:
        if self.refuse_beyond is not None and len(prompt) > self.refuse_beyond:
            raise ContextLengthError(f"{len(prompt)} tokens are too many")
        self.submitted += 1
        self.running[self.submitted] = [self.cost(self.submitted), list(prompt), sampling]
        return self.submitted

    def poll(self, timeout: float = 0.0) -> list[tuple[int, Completion | EngrainError]]:
        self.seen.append(len(self.running))
        if len(self.seen) == self.breaks_at:
            raise EngineFailedError("gone")
        time.sleep(0.001)
        done: list[tuple[int, Completion | EngrainError]] = []
        for number, request in list(self.running.items()):
            request[0] -= 1
            if request[0] <= 0:
                del self.running[number]
                done.append((number, self.fails.get(number) or self.answer(request[1], request[2])))
        return done

    def cancel(self, requests: Sequence[int]) -> None:
        self.cancelled += requests
        for number in requests:
            self.running.pop(number, None)


@pytest.fixture
def engine(tiny_tokenizer: Any) -> Calls:
    return Calls(tiny_tokenizer)


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[str]:
    """This folder is where modules are looked for: worker processes import `breaking_envs`."""
    sys.path.insert(0, str(Path(__file__).parent))
    yield sys.path[0]
    sys.path.remove(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def workers(here: str) -> Iterator[Workers]:
    found = Workers(2, "breaking_envs:make")
    yield found
    found.close()


def tasks_of(count: int, first: int = 0, **parameters: Any) -> list[Task]:
    return [Task.create("breaking", Split.TRAIN, first + seed, parameters) for seed in range(count)]


def run(tasks: Sequence[Task], engine: Any, **options: Any) -> list[Episode]:
    return play(tasks, engine, **{"sampling": SAMPLING, "namespace": "test", **options})


def in_threads(tasks: Sequence[Task], engine: Any, **options: Any) -> list[Episode]:
    import breaking_envs

    return run(tasks, engine, make_env=breaking_envs.make, **options)


def outcome(episode: Episode) -> dict[str, Any]:
    """All of an episode that must not depend on where and when it was played."""
    facts = episode.model_dump(exclude={"seconds", "started_at"})
    for turn in facts["turns"]:
        del turn["seconds"]
    return facts


# -- engines that take requests at any time ---------------------------------------------------------------------------


def test_a_streaming_engine_plays_the_same_episodes(engine: Calls, tiny_tokenizer: Any) -> None:
    stream = Stream(tiny_tokenizer, lambda number: 1 + number % 4)
    assert isinstance(stream, StreamingEngine)
    assert not isinstance(engine, StreamingEngine)
    stats = RolloutStats()
    episodes = in_threads(tasks_of(9), stream, seed=3, stats=stats)
    assert [outcome(e) for e in episodes] == [outcome(e) for e in in_threads(tasks_of(9), engine, seed=3)]
    assert not stream.batches
    assert not stream.pending
    assert (stats.requests, stats.episodes) == (27, 9)
    later = [turn.start for e in episodes for turn in e.turns[1:]]
    assert (stats.later_prompt_tokens, stats.later_cached_tokens) == (sum(later), sum(later) - len(later))
    assert stats.prompt_tokens == sum(turn.start for e in episodes for turn in e.turns)
    assert stats.prefix_hit_rate == pytest.approx(1 - 27 / stats.prompt_tokens)
    assert 0 < stats.engine_share <= 1


def test_a_long_reply_does_not_hold_up_the_others(tiny_tokenizer: Any) -> None:
    stream = Stream(tiny_tokenizer, lambda number: 400 if number == 1 else 1)
    order: list[int] = []
    in_threads(tasks_of(12), stream, batch=4, on_episode=lambda episode: order.append(episode.task.seed))
    assert order[-1] == 0
    assert len(order) == 12
    assert max(stream.seen) == 4


def test_the_engine_is_full_while_there_is_work(tiny_tokenizer: Any) -> None:
    stream = Stream(tiny_tokenizer, lambda number: 20)
    in_threads(tasks_of(40), stream, batch=8)
    busy = stream.seen[5:-60]
    assert sum(busy) / len(busy) > 7


def test_in_lockstep_a_streaming_engine_gets_whole_calls(tiny_tokenizer: Any) -> None:
    stream = Stream(tiny_tokenizer)
    in_threads(tasks_of(5), stream, lockstep=True)
    assert [len(batch) for batch in stream.batches] == [5, 5, 5]
    assert not stream.submitted


def test_a_request_that_fails_costs_its_episode(tiny_tokenizer: Any) -> None:
    stream = Stream(tiny_tokenizer)
    stream.fails[2] = ServerFailedError("the server said no")
    stream.fails[4] = ContextLengthError("too long after all")
    stats = RolloutStats()
    episodes = in_threads(tasks_of(6, turns=2), stream, stats=stats)
    broken = {episode.error: episode for episode in episodes if episode.error}
    assert broken["the server said no"].stop_reason is StopReason.ERROR
    assert broken["too long after all"].stop_reason is StopReason.LENGTH
    assert sum(episode.stop_reason is StopReason.DONE for episode in episodes) == 4
    assert stats.failed == 1


def test_a_refused_prompt_ends_its_episode(tiny_tokenizer: Any) -> None:
    stream = Stream(tiny_tokenizer)
    stream.refuse_beyond = 120
    long = Task.create("breaking", Split.TRAIN, 10**80, {})
    short, refused = in_threads([*tasks_of(1, turns=1), long], stream)
    assert short.stop_reason is StopReason.DONE
    assert (refused.stop_reason, refused.turns) == (StopReason.LENGTH, ())
    assert "too many" in (refused.error or "")


def test_an_engine_that_fails_ends_the_run_and_leaves_no_request(tiny_tokenizer: Any) -> None:
    stream = Stream(tiny_tokenizer, lambda number: 1 if number == 1 else 50)
    stream.breaks_at = 20
    kept: list[Episode] = []
    with pytest.raises(EngineFailedError, match="gone"):
        in_threads(tasks_of(3, turns=1), stream, on_episode=kept.append)
    assert len(kept) == 1
    assert sorted(stream.cancelled) == [2, 3]
    assert not stream.pending


def test_an_episode_that_waits_too_long_for_the_engine_is_given_up(tiny_tokenizer: Any) -> None:
    stream = Stream(tiny_tokenizer, lambda number: 10**9 if number == 1 else 1)
    episodes = in_threads(tasks_of(3), stream, episode_seconds=2.0)
    assert [e.error for e in episodes if e.error] == ["the episode took longer than its limit of 2 s"]
    assert stream.cancelled == [1]


def test_replies_can_be_restricted_to_what_the_env_lists(engine: Calls) -> None:
    sampling = SAMPLING.model_copy(update={"admissible_only": True})
    episode = in_threads(tasks_of(1, turns=2), engine, sampling=sampling)[0]
    assert [batch[0].choices for batch in engine.batches] == [("go on", "stop"), None]
    assert [turn.choices for turn in episode.turns] == [("go on", "stop"), None]
    in_threads(tasks_of(1), engine)
    assert engine.batches[2][0].choices is None


def test_games_can_be_added_while_it_serves(tiny_tokenizer: Any) -> None:
    import breaking_envs

    for engine in (Calls(tiny_tokenizer), Stream(tiny_tokenizer)):
        plan = Plan(engine, Renderer(tiny_tokenizer), SAMPLING)
        ended: dict[int, threading.Event] = {number: threading.Event() for number in range(4)}
        scheduler = Scheduler(
            plan, on_end=lambda game, episode, ended=ended: ended[game.order].set(), make_env=breaking_envs.make
        )
        thread = threading.Thread(target=scheduler.serve)
        thread.start()
        for number, task in enumerate(tasks_of(4)):
            scheduler.add(Game(plan, number, str(number), task, 0))
            if number % 2:
                assert ended[number].wait(30)
        scheduler.stop()
        thread.join(30)
        assert not thread.is_alive()
        assert all(event.is_set() for event in ended.values())


# -- envs in worker processes -----------------------------------------------------------------------------------------


def test_worker_processes_play_what_threads_play(engine: Calls, workers: Workers, tmp_path: Path) -> None:
    tasks = [*tasks_of(5, closes=str(tmp_path / "closed")), *tasks_of(1, 9, does="raise", at=2)]
    tasks += [*tasks_of(1, 10, does="fail", at=0), *tasks_of(1, 11, does="exit", at=1)]
    tasks += tasks_of(1, 12, does="no text", at=1)
    episodes = run(tasks, engine, processes=workers, seed=1)
    assert [e.stop_reason for e in episodes] == [StopReason.DONE] * 5 + [StopReason.ERROR] * 4
    assert "object is not JSON serializable" in str(episodes[8].error)
    assert [e.error for e in episodes[5:8]] == [
        "RuntimeError: went wrong",
        "a fault of the world",
        "SystemExit: enough",
    ]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and len((tmp_path / "closed").read_text().split()) < 5:
        time.sleep(0.02)
    assert sorted((tmp_path / "closed").read_text().split()) == list("01234")
    same = in_threads(tasks[:7], engine, seed=1)
    assert [outcome(e) for e in episodes[:7]] == [outcome(e) for e in same]
    assert all(0 < turn.seconds < 60 for e in episodes for turn in e.turns)


def test_workers_are_reused_and_import_no_model_library(engine: Calls, workers: Workers) -> None:
    first = run(tasks_of(4, does="tell", at=1), engine, processes=workers)
    pids = set(workers.pids)
    again = run(tasks_of(4, does="tell", at=1), engine, processes=workers)
    assert set(workers.pids) == pids
    for episode in [*first, *again]:
        modules, _, pid = episode.turns[1].observation.split("'")[-1].strip().rpartition(" ")
        assert modules == "[]"
        assert int(pid) in pids
        assert int(pid) != os.getpid()


@pytest.mark.parametrize(
    ("does", "says"), [("kill", "(SIGKILL)"), ("segfault", "(SIGSEGV)"), ("leave", "(exit code 3)")]
)
@pytest.mark.parametrize("at", [0, 2])
def test_a_crash_costs_one_episode(engine: Calls, workers: Workers, does: str, says: str, at: int) -> None:
    tasks = [*tasks_of(6), *tasks_of(1, 66, does=does, at=at), *tasks_of(6, 6)]
    *episodes, crashed = sorted(run(tasks, engine, processes=workers), key=lambda e: e.task.seed)
    assert (crashed.stop_reason, len(crashed.turns)) == (StopReason.ERROR, max(0, at - 1))
    assert crashed.error is not None
    assert crashed.error.endswith(f"its process died {says}")
    assert [outcome(e) for e in episodes] == [outcome(e) for e in in_threads(tasks_of(12), engine)]


@pytest.mark.parametrize("does", ["hang", "hang deaf"])
def test_a_hang_costs_one_episode(engine: Calls, workers: Workers, does: str) -> None:
    tasks = [*tasks_of(3), *tasks_of(1, 50, does=does, at=1), *tasks_of(3, 3)]
    *episodes, hung = sorted(run(tasks, engine, processes=workers, turn_seconds=2.0), key=lambda e: e.task.seed)
    assert hung.stop_reason is StopReason.ERROR
    assert "gave no answer within its limit of 2 s" in (hung.error or "")
    assert [outcome(e) for e in episodes] == [outcome(e) for e in in_threads(tasks_of(6), engine)]


def test_an_episode_has_a_time_limit_too(engine: Calls, workers: Workers) -> None:
    slow, fine = run([*tasks_of(1, wait=0.4, turns=20), *tasks_of(1, 1)], engine, processes=workers, episode_seconds=3)
    assert slow.stop_reason is StopReason.ERROR
    assert "limit" in (slow.error or "")
    assert 0 < len(slow.turns) < 9
    assert fine.stop_reason is StopReason.DONE


def test_a_slow_env_does_not_hold_up_those_in_its_process(engine: Calls, workers: Workers) -> None:
    order: list[int] = []
    slow = tasks_of(1, 99, wait=4.0, turns=1)
    run([*slow, *tasks_of(8)], engine, processes=workers, on_episode=lambda episode: order.append(episode.task.seed))
    assert order[-1] == 99


def test_an_env_that_does_not_go_the_same_way_again_fails(engine: Calls, here: str) -> None:
    drifting = tasks_of(4, 20, does="drift", at=99, turns=6, wait=0.1)
    crashing = tasks_of(2, does="kill", at=3, turns=6, wait=0.1)
    alone = Workers(1, "breaking_envs:make")  # all in one process, so that a crash hits envs that are under way
    try:
        episodes = run([*drifting, *crashing], engine, processes=alone)
    finally:
        alone.close()
    lost = [e for e in episodes[:4] if e.error]
    assert lost
    assert all("went another way" in (e.error or "") for e in lost)


def test_what_a_game_prints_and_reads_does_not_disturb(engine: Calls, workers: Workers) -> None:
    episode = run(tasks_of(1, does="chatter", at=1), engine, processes=workers)[0]
    assert episode.stop_reason is StopReason.DONE
    assert episode.turns[1].observation.endswith("''")


def test_lockstep_does_not_depend_on_where_envs_live(engine: Calls, workers: Workers) -> None:
    tasks = tasks_of(7)
    expected = in_threads(tasks, engine, seed=2, batch=3, lockstep=True)
    sizes = [[params.seed for params in batch] for batch in engine.batches]
    engine.batches.clear()
    episodes = run(tasks, engine, seed=2, batch=3, lockstep=True, processes=workers)
    assert [outcome(e) for e in episodes] == [outcome(e) for e in expected]
    assert [[params.seed for params in batch] for batch in engine.batches] == sizes


def test_workers_that_cannot_start_fail_their_episodes(engine: Calls) -> None:
    broken = Workers(1, "no_such_module:make")
    episode = run(tasks_of(1), engine, processes=broken)[0]
    broken.close()
    assert episode.stop_reason is StopReason.ERROR
    assert "did not start" in (episode.error or "")


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys, threading
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
from agent.workers import RemoteEnv, Workers
from envs.base import Split, Task
workers, started = Workers(1, "breaking_envs:make"), threading.Event()
env = RemoteEnv(Task.create("breaking", Split.TRAIN, 0, {{}}), 60)
workers.submit(env, lambda: (env.reset(), started.set()))
started.wait()
print(workers.pids[0], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and _runs(int(done.stdout)):
        time.sleep(0.05)
    assert not _runs(int(done.stdout))


def _runs(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_textworld_games_survive_the_loss_of_their_process(engine: Calls) -> None:
    """The real thing: killed between two steps, the processes are replaced, and all games end as without the loss."""
    world = registry.world("textworld", {"max_turns": 6})
    tasks = world.tasks(Split.TRAIN, 2)
    assert registry.isolated(tasks[0])

    class Reader(Calls):
        kills = 0

        def answer(self, prompt: Sequence[int], params: SamplingParams) -> Completion:
            """Takes the last command of those that are listed."""
            listed = self.tokenizer.decode(list(prompt)).rpartition("<|im_end|>")[0].splitlines()
            ids = [*self.tokenizer(listed[-1], add_special_tokens=False)["input_ids"], self.end]
            return Completion(tuple(ids), (-0.5,) * len(ids), FinishReason.STOP)

        def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
            if self.kills and len(self.batches) == 3:  # all envs wait for their replies then
                for pid in shared_workers().pids:
                    os.kill(pid, signal.SIGKILL)
                while shared_workers().pids:
                    time.sleep(0.01)
            return super().generate(prompts, sampling)

    sampling = SamplingParams(max_tokens=64)
    plain = run(tasks, Reader(engine.tokenizer), sampling=sampling, lockstep=True)
    assert shared_workers().pids
    disturbed = Reader(engine.tokenizer)
    disturbed.kills = 1
    episodes = run(tasks, disturbed, sampling=sampling, lockstep=True)
    assert [outcome(e) for e in episodes] == [outcome(e) for e in plain]
    assert all(e.error is None and len(e.turns) > 3 for e in episodes)


def test_custom_envs_play_in_threads_of_this_process(engine: Calls) -> None:
    class Here(Env):
        max_turns = 1

        def reset(self) -> Observation:
            return Observation(str(os.getpid()))

        def step(self, text: str) -> Step:
            return Step(Observation(""), 1.0, True)

        @property
        def score(self) -> float:
            return 1.0

    episode = run(tasks_of(1), engine, make_env=Here)[0]
    assert episode.turns[0].observation == str(os.getpid())
