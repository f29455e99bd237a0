from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.episode import SamplingParams, StopReason
from envs.base import Split, Task
from memory.errors import ConflictError, UnknownIdError
from memory.schema import TextRow
from memory.store import Store


def test_an_episode_comes_back_equal(store, make_episode):
    episode = make_episode(
        turns=[("a\0b", "\ud800 \\boxed{1} \x1a0000"), ("again", "")],
        system="be \u202e kind",
        logprobs=[0.0, 0.0, 0.0, -(2.0**-40), -3.5, 0.0, 0.0, float("-inf"), -0.5],
        seed=2**63 + 5,
        checkpoint="c",
        knowledge="k",
        error="boom",
        stop_reason=StopReason.ERROR,
        human=True,
        score=1 / 3,
        reward=-0.1,
        sampling=SamplingParams(temperature=0.3, top_p=0.9, top_k=5, max_tokens=7, seed=2**63),
    )
    assert store.add_episodes([episode]) == 1
    found = store.episode(episode.id)
    assert found == episode
    assert hash(found.task) == hash(episode.task)
    assert store.episodes() == [episode]


def test_an_episode_without_turns_or_tokens(store, make_episode):
    episode = make_episode(
        turns=[], token_ids=[], loss_mask=[], logprobs=[], prompt_length=0, started_at=datetime(2026, 1, 1)
    )
    store.add_episodes([episode])
    assert store.episode("e1") == episode


def test_storing_twice_is_storing_once(store, make_episode):
    first, second = make_episode("e1"), make_episode("e2", turns=[("a", "b"), ("c", "d")])
    assert store.add_episodes([first, first]) == 1
    assert store.add_episodes(e for e in [first, second]) == 1
    assert store.add_episodes([]) == 0
    assert store.has_episodes(["e2", "e9", "e1"]) == {"e1", "e2"}
    assert store.episode("e2") == second


def test_equal_texts_are_one_row(store, make_episode):
    long = "rules " * 100
    store.add_episodes(make_episode(f"e{i}", system=long, turns=[("o", "a")] * 3) for i in range(10))
    with store._read() as connection:
        bodies = connection.execute(sa.select(TextRow.body)).scalars().all()
    assert sorted(bodies) == sorted({long, "o", "a", ""})


def test_filters_order_and_paging(store, make_episode):
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    round_ = store.create_round({}, 0, "tiny")
    for i in range(6):
        episode = make_episode(
            f"e{i}",
            success=i % 2 == 0,
            split=Split.TEST if i > 3 else Split.TRAIN,
            seed=i,
            checkpoint="c" if i == 1 else None,
            knowledge="k" if i == 2 else None,
            started_at=begin + timedelta(seconds=-i),
        )
        store.add_episodes([episode], round_id=round_.id if i < 3 else None, stage="play" if i < 2 else "")

    def ids(**filters):
        rows = [row.id for row in store.episode_rows(**filters)]
        assert [episode.id for episode in store.episodes(**filters)] == rows
        return rows

    assert ids() == ["e5", "e4", "e3", "e2", "e1", "e0"]
    assert ids(newest_first=True, limit=2) == ["e0", "e1"]
    assert ids(limit=2, offset=1) == ["e4", "e3"]
    assert ids(offset=4) == ["e1", "e0"]
    assert ids(success=False) == ["e5", "e3", "e1"]
    assert ids(split=Split.TEST) == ids(split="test") == ["e5", "e4"]
    assert ids(round_id=round_.id) == ["e2", "e1", "e0"]
    assert ids(round_id=round_.id, stage="play") == ["e1", "e0"]
    assert ids(checkpoint="c") == ["e1"]
    assert ids(knowledge="k") == ["e2"]
    assert ids(knowledge="", checkpoint="") == ["e5", "e4", "e3", "e0"]
    assert ids(env="other") == []
    with pytest.raises(TypeError):
        store.episodes(outcome="good")


def test_rows_say_what_the_episode_was(store, make_episode):
    store.add_episodes([make_episode(turns=[("a", "b"), ("c", "d")])])
    row = store.episode_rows()[0]
    assert (row.turns, row.tokens, row.sampled, row.env) == (2, 9, 4, "sums")


def test_what_is_not_there_is_said(store, make_episode):
    with pytest.raises(UnknownIdError, match="no episode 'nope'"):
        store.episode("nope")
    with pytest.raises(UnknownIdError, match="no round 'r9'"):
        store.add_episodes([make_episode()], round_id="r9")
    assert store.episode_rows() == []


def test_one_task_id_cannot_stand_for_two_tasks(store, make_episode):
    def episode(id, value, split=Split.TRAIN):
        return make_episode(id, task=Task(id="t", env="sums", split=split, seed=1, parameters={"v": value}))

    store.add_episodes([episode("e1", 1)])
    assert store.add_episodes([episode("e2", 1, Split.TEST)]) == 1
    assert store.episode("e2").task.split is Split.TEST
    with pytest.raises(ConflictError):
        store.add_episodes([episode("e3", 2)])
    assert store.has_episodes(["e3"]) == set()


def test_a_batch_is_kept_whole_or_not_at_all(store, make_episode):
    with pytest.raises(OverflowError):
        store.add_episodes([make_episode("e1"), make_episode("e2", token_ids=[5, 6, 7, 2**40, 1])])
    assert store.has_episodes(["e1", "e2"]) == set()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.tuples(st.text(), st.text()), max_size=4),
    score=st.floats(0, 1),
    seed=st.integers(),
    feedback=st.text(),
)
def test_round_trip_of_anything(make_episode, texts, score, seed, feedback):
    episode = make_episode(turns=texts, score=score, seed=seed, feedback=feedback)
    with Store.open(":memory:") as store:
        store.add_episodes([episode])
        assert store.episode("e1") == episode
