"""Which process gets which prompt. That processes answer as one does is in test_distributed."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.episode import SamplingParams
from agent.options import BATCH, scheduled
from distill.replicas import ReplicatedEngine

IDS = st.lists(st.integers(0, 2**31), min_size=1, max_size=6)


class Dealt(ReplicatedEngine):
    """One of three, without the other two."""

    def __init__(self) -> None:
        self.copies, self._places, self._lengths = 3, {}, set()

    def shares(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        return self._deal(prompts)


@given(st.lists(IDS, max_size=12, unique_by=tuple))
def test_every_prompt_goes_to_one_process_and_new_ones_evenly(prompts: list[list[int]]) -> None:
    shares = Dealt().shares(prompts)
    assert sorted(index for share in shares for index in share) == list(range(len(prompts)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.lists(IDS, min_size=1, max_size=12, unique_by=tuple), st.data())
def test_a_conversation_goes_on_where_it_began(openings: list[list[int]], data: st.DataObject) -> None:
    openings = [[*ids, 7] for ids in openings]
    openings = [ids for ids in openings if not any(other != ids and ids == other[: len(ids)] for other in openings)]
    engine, prompts = Dealt(), openings
    home = {tuple(prompts[i]): place for place, share in enumerate(engine.shares(prompts)) for i in share}
    for _ in range(3):  # turns; some games are over, the others come in another order
        left = data.draw(st.lists(st.sampled_from(range(len(prompts))), unique=True, min_size=1))
        prompts = [prompts[i] + data.draw(IDS) for i in left]
        openings = [openings[i] for i in left]
        for place, share in enumerate(engine.shares(prompts)):
            assert all(home[tuple(openings[i])] == place for i in share)


def test_many_conversations_that_began_alike_are_spread() -> None:
    engine = Dealt()
    engine.shares([[1, 2]] * 60)
    shares = engine.shares([[1, 2, 3 + number] for number in range(60)])
    assert sorted(map(len, shares)) == [10, 10, 40]  # where they began, up to twice an even share
    assert sum(map(len, engine.shares([[1, 2, 3 + number, 1] for number in range(60)]))) == 60


def test_a_play_asks_for_as_many_at_a_time_as_there_are_copies(tiny_tokenizer: Any) -> None:
    def batch(engine: Any, **options: Any) -> int:
        plan: Any = {"sampling": SamplingParams(), "namespace": "n", **options}
        return scheduled(engine, plan, on_end=lambda game, episode: None)._batch

    assert batch(SimpleNamespace(tokenizer=tiny_tokenizer)) == BATCH
    assert batch(SimpleNamespace(tokenizer=tiny_tokenizer, copies=3)) == 3 * BATCH
    assert batch(SimpleNamespace(tokenizer=tiny_tokenizer, copies=3), batch=5) == 5
