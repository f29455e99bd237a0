"""Players on a Ray cluster of several machines, all of them here: the same episodes, also when a machine is lost."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.cluster import Cluster
from agent.episode import Episode, SamplingParams, StopReason
from agent.errors import ClusterError, ModelLoadError
from agent.player import Job, Player
from agent.rollout import RolloutStats, play
from envs.base import Split, Task
from envs.errors import UsageError

ray = pytest.importorskip("ray")

SAMPLING = SamplingParams(max_tokens=16)


def add(machines: Any) -> Any:
    """One more machine with room for one player. Ray gives up after 30 s; a busy computer needs another try."""
    for tries in range(5):
        try:
            return machines.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        except Exception:
            if tries == 4:
                raise
    return None


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A head that plays nothing, and two machines with room for one player each."""
    from ray.cluster_utils import Cluster as Machines

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}:{Path(__file__).parent}")
        patch.syspath_prepend(str(Path(__file__).parent))
        memory = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
        found = Machines(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
        found.nodes = [add(found) for _ in range(2)]
        yield found
        ray.shutdown()
        found.shutdown()
        sys.modules.pop("standin_engine", None)


@pytest.fixture
def tasks(machines: Any) -> list[Task]:
    return [Task.create("breaking", Split.TRAIN, seed, {}) for seed in range(24)]


@pytest.fixture
def on(machines: Any, tiny_tokenizer: Any) -> Iterator[Any]:
    """Makes clusters of players with stand-in engines, and closes them."""
    from standin_engine import StandIn

    made: list[Cluster] = []

    def make(players: int = 2, **engine: Any) -> Cluster:
        made.append(Cluster(partial(StandIn, tiny_tokenizer, **engine), address=machines.address, players=players))
        return made[-1]

    yield make
    for cluster in reversed(made):
        cluster.close()


def outcome(episode: Episode) -> dict[str, Any]:
    facts = episode.model_dump(exclude={"seconds", "started_at"})
    for turn in facts["turns"]:
        del turn["seconds"]
    return facts


def alone(tasks: Sequence[Task], tokenizer: Any, **options: Any) -> list[dict[str, Any]]:
    """The same episodes by one engine in this process."""
    from breaking_envs import make
    from standin_engine import StandIn

    engine = StandIn(tokenizer)
    played = play(tasks, engine, sampling=SAMPLING, namespace="test", make_env=make, **options)
    return [outcome(episode) for episode in played]


def test_a_cluster_plays_what_one_machine_plays(
    on: Any, tasks: list[Task], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from breaking_envs import make

    cluster, stats, seen = on(), RolloutStats(), []
    common = {"sampling": SAMPLING, "namespace": "test", "make_env": make}
    options = {**common, "knowledge": "Know.", "knowledge_id": "k1", "samples": 2, "seed": 3}
    episodes = cluster.play(tasks, **options, stats=stats, progress=lambda s: seen.append(s.episodes))
    options.pop("make_env"), options.pop("sampling"), options.pop("namespace")
    assert [outcome(e) for e in episodes] == alone(tasks, tiny_tokenizer, **options)
    assert (stats.total, stats.episodes, stats.successes, stats.requests) == (48, 48, 48, 144)
    assert stats.sampled_tokens == sum(e.sampled for e in episodes)
    assert 0 < stats.cached_tokens < stats.prompt_tokens
    assert seen[-1] == 48
    rest = cluster.play(tasks, **common, skip={e.id for e in cluster.play(tasks[:20], **common)})
    assert [e.task.seed for e in rest] == [20, 21, 22, 23]
    assert cluster.play([], **common) == []
    trained = tmp_path / "ck-1"
    trained.mkdir()
    cluster.load(trained)
    assert {e.checkpoint for e in cluster.play(tasks[:6], **common)} == {"ck-1"}
    cluster.load(None)
    assert {e.checkpoint for e in cluster.play(tasks[:6], **common)} == {None}
    cluster.load(tmp_path / "gone")
    with pytest.raises(ModelLoadError, match="no checkpoint at"):
        cluster.play(tasks[:6], **common)


def test_checkpoints_of_one_folder_name_are_told_apart(on: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Every run names its folders step-000010 and so on."""
    from standin_engine import StandIn

    first, second, third = (tmp_path / run / "step-000010" for run in ("a", "b", "c"))
    for folder in (first, second, third):
        folder.mkdir(parents=True)
    (third / "manifest.json").write_text('{"id": "3f"}')
    cluster, engine, loaded = on(), StandIn(tiny_tokenizer), []
    player = Player(lambda: engine)
    engine.load = loaded.append  # type: ignore[method-assign]
    scheduler: Any = SimpleNamespace(plan=SimpleNamespace(engine=engine), serve=lambda: None)
    for folder in (None, first, first, second, third, None):
        cluster.load(folder)
        player._serve(scheduler, Job(0, {}, cluster._folder, cluster.checkpoint))  # type: ignore[typeddict-item]
        assert engine.checkpoint == {None: None, third: "3f"}.get(folder, "step-000010")
    assert loaded == [first, second, third, None]


def test_a_machine_that_is_lost_costs_no_episode_and_none_is_kept_twice(
    on: Any, machines: Any, tasks: list[Task], tiny_tokenizer: Any
) -> None:
    from breaking_envs import make

    kept: list[str] = []

    def keep(episode: Episode) -> None:
        kept.append(episode.id)
        if len(kept) == 6:
            machines.remove_node(machines.nodes.pop(), allow_graceful=False)

    cluster = on(seconds=0.3)
    options = {"sampling": SAMPLING, "namespace": "test", "make_env": make, "batch": 4}
    episodes = cluster.play(tasks, **options, on_episode=keep)
    assert [outcome(e) for e in episodes] == alone(tasks, tiny_tokenizer)
    assert len(kept) == len(set(kept)) == 24
    assert not cluster.complete
    machines.nodes.append(add(machines))
    machines.wait_for_nodes()
    deadline = time.monotonic() + 300
    while not cluster.complete and time.monotonic() < deadline:
        cluster.play(tasks[:4], **options)
    assert cluster.complete  # a new machine is taken in while others play


def test_a_player_that_dies_is_replaced(on: Any, tasks: list[Task], tiny_tokenizer: Any, tmp_path: Path) -> None:
    from breaking_envs import make

    cluster, kept = on(seconds=0.1), []

    def keep(episode: Episode) -> None:
        kept.append(episode.id)
        if len(kept) == 4:
            ray.kill(cluster._seats[0].actor)

    options = {"sampling": SAMPLING, "namespace": "test", "make_env": make, "batch": 2}
    episodes = cluster.play(tasks, **options, on_episode=keep)
    assert [outcome(e) for e in episodes] == alone(tasks, tiny_tokenizer)
    assert len(kept) == len(set(kept)) == 24


def test_a_task_that_costs_every_player_is_written_off(
    on: Any, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.cluster._TRIES", 2)
    from breaking_envs import make

    deadly = Task.create("breaking", Split.TRAIN, 99, {"does": "leave", "at": 1})
    *fine, lost = on(seconds=0.1).play(
        [*tasks[:2], *tasks[2:], deadly], sampling=SAMPLING, namespace="test", make_env=make, batch=1
    )
    assert all(e.stop_reason is StopReason.DONE for e in fine)
    assert (lost.stop_reason, lost.error) == (StopReason.ERROR, "2 players were lost while it was played")


def test_faults_of_engines_end_the_play(on: Any, tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.cluster._LOSSES", 1)
    with pytest.raises(ModelLoadError, match="no weights here"):
        on(fault="load").play(tasks, sampling=SAMPLING, namespace="test")
    from breaking_envs import make

    with pytest.raises(ClusterError, match="lost 2 times in a row, the last to: out of numbers"):
        on(fault="run").play(tasks, sampling=SAMPLING, namespace="test", make_env=make)


def test_an_address_without_a_cluster_is_refused(machines: Any, tiny_tokenizer: Any) -> None:
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(UsageError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        Cluster(lambda: None, address="127.0.0.1:1")  # type: ignore[arg-type,return-value]
