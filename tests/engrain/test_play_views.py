"""The token gap, the items' influence and the comparison: numbers against the model itself, and how they are drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from rich.console import Console

from agent.engines.transformers import TransformersEngine
from agent.episode import Episode, SamplingParams
from agent.game import Plan
from agent.renderer import Renderer
from agent.rollout import play
from engrain.cli.play_looks import Closer
from engrain.cli.play_screen import Labelled, Plain
from engrain.cli.play_views import painted, show_comparison, show_gap, show_influence
from engrain.compare import Arm, arms_of, newest_checkpoint, newest_knowledge, parting
from engrain.errors import NothingSampledError, NothingToCompareError
from engrain.influence import influence, parts
from engrain.match import AgentMatch, Match
from engrain.play import play_match
from engrain.scoring import Scorer
from engrain.tokengap import ReplyGap, TokenGap, pieces, token_gap
from envs.base import Env, Observation, Split, Step, Task
from memory.records import CheckpointRecord, Item, Knowledge, digest
from memory.render import compose
from memory.store import Store


class Chat(Env):
    """Two turns."""

    system = "Talk."
    max_turns = 2

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.heard = 0

    def reset(self) -> Observation:
        return Observation("hello")

    def step(self, text: str) -> Step:
        self.heard += 1
        return Step(Observation("and then?"), 0.0, self.heard == 2)

    @property
    def score(self) -> float:
        return 0.0


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> TransformersEngine:
    return TransformersEngine(tiny_model(), tiny_tokenizer, name="tiny")


@pytest.fixture(scope="module")
def knowledge(tiny_tokenizer: Any) -> Knowledge:
    texts = ("Say yes.", "Never say no.", "Be brief.")
    return compose([Item(id=digest(text), text=text) for text in texts], 500, tiny_tokenizer)


def played(engine: TransformersEngine, knowledge: Knowledge | None = None, choose: Any = None) -> Episode:
    (episode,) = play(
        [Task.create("chat", Split.TRAIN, 1, {})],
        engine,
        sampling=SamplingParams(max_tokens=6),
        namespace="n",
        knowledge=knowledge.text if knowledge else None,
        knowledge_id=knowledge.id if knowledge else None,
        make_env=Chat,
    )
    return episode


@torch.no_grad()
def direct(engine: TransformersEngine, episode: Episode, knowledge: str | None) -> list[list[float]]:
    """Log-probabilities of each reply's tokens from the model's own logits, after another first prompt."""
    messages = episode.messages[: 2 if episode.messages[0].role == "system" else 1]
    prompt = Renderer(engine.tokenizer).prompt(messages, knowledge)
    ids = [*prompt, *episode.token_ids[episode.prompt_length :]]
    logprobs = engine.network(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    shift = len(prompt) - episode.prompt_length
    return [
        [float(logprobs[place + shift - 1, ids[place + shift]]) for place in range(turn.start, turn.end)]
        for turn in episode.turns
    ]


def test_the_gap_is_that_of_the_models_own_logits(engine: TransformersEngine, knowledge: Knowledge) -> None:
    bare, taught = played(engine), played(engine, knowledge)
    for episode in (bare, taught):
        scorer = Scorer(engine)
        gaps = token_gap(scorer, episode, knowledge.text)
        assert scorer.forwards == 2
        assert [gap.turn for gap in gaps] == [1, 2]
        student, teacher = direct(engine, episode, None), direct(engine, episode, knowledge.text)
        for gap, s, t in zip(gaps, student, teacher, strict=True):
            assert [token.student for token in gap.tokens] == pytest.approx(s, abs=1e-4)
            assert [token.teacher for token in gap.tokens] == pytest.approx(t, abs=1e-4)
            assert gap.total == pytest.approx(sum(t) - sum(s), abs=1e-3)
        assert any(abs(gap.total) > 1e-4 for gap in gaps)
    sampled = [p for p, mark in zip(bare.logprobs, bare.loss_mask, strict=True) if mark]
    scored = [token.student for gap in token_gap(Scorer(engine), bare, knowledge.text) for token in gap.tokens]
    assert scored == pytest.approx(sampled, abs=1e-3)  # what was noted when it was sampled


def test_the_teacher_may_have_weights_of_its_own(engine: TransformersEngine, knowledge: Knowledge) -> None:
    inside = []

    @contextmanager
    def weights() -> Iterator[None]:
        inside.append("in")
        with torch.no_grad():
            weight = engine.network.model.layers[0].mlp.down_proj.weight
            kept = weight.clone()
            weight.mul_(3)
            try:
                yield
            finally:
                weight.copy_(kept)

    episode = played(engine)
    plain, other = (token_gap(Scorer(engine), episode, knowledge.text, w) for w in (lambda: _same(), weights))
    assert inside == ["in"]
    assert [t.student for t in plain[0].tokens] == [t.student for t in other[0].tokens]
    assert [t.teacher for t in plain[0].tokens] != [t.teacher for t in other[0].tokens]


@contextmanager
def _same() -> Iterator[None]:
    yield


def test_nothing_sampled_is_one_line(engine: TransformersEngine, knowledge: Knowledge) -> None:
    episode = played(engine)
    stranger = episode.model_copy(update={"model": "another"})
    mute = episode.model_copy(update={"loss_mask": (False,) * len(episode.loss_mask)})
    for unusable in (stranger, mute):
        with pytest.raises(NothingSampledError, match="holds no token that tiny sampled"):
            token_gap(Scorer(engine), unusable, knowledge.text)


def test_the_influence_of_an_item_is_the_replys_change_without_it(
    engine: TransformersEngine, knowledge: Knowledge
) -> None:
    episode = played(engine, knowledge)
    told: list[tuple[int, int]] = []
    found = influence(Scorer(engine), episode, knowledge, progress=lambda *at: told.append(at))
    assert (found.forwards, found.untried, found.turns) == (4, 0, (1, 2))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    whole = [sum(reply) for reply in direct(engine, episode, knowledge.text)]
    assert found.logprobs == pytest.approx(whole, abs=1e-3)
    for item, rest in zip(
        found.items, ("Never say no.\n- Be brief.", "Say yes.\n- Be brief.", "Say yes.\n- Never say no."), strict=True
    ):
        text = f"Experience from earlier tasks. Follow it:\n- {rest}"
        without = [sum(reply) for reply in direct(engine, episode, text)]
        assert item.changes == pytest.approx([a - b for a, b in zip(whole, without, strict=True)], abs=1e-3)
    sizes = [abs(change) for _, change in found.of(1)]
    assert sizes == sorted(sizes, reverse=True)
    bounded = influence(Scorer(engine), episode, knowledge, most=2)
    assert (bounded.forwards, bounded.untried, len(bounded.items)) == (3, 1, 2)


def test_a_reply_is_looked_at_before_it_is_said(engine: TransformersEngine, knowledge: Knowledge) -> None:
    out = io.StringIO()
    screen = Labelled(Console(file=out, width=80))
    closer = Closer(Scorer(engine), knowledge, "knowledge 3", gap=True, why=True)
    look = closer.following(screen, Arm("bare"), None)
    before = []

    def choose(match: Match) -> Any:
        assert isinstance(match, AgentMatch)
        suggestion = match.suggest()
        supposed = match.supposing(suggestion)
        before.append(
            (token_gap(closer.scorer, supposed, knowledge.text), influence(closer.scorer, supposed, knowledge))
        )
        with match.aside():
            look(supposed)
        return suggestion

    plan = Plan(engine, Renderer(engine.tokenizer), SamplingParams(max_tokens=6))
    match = AgentMatch(Task.create("chat", Split.TRAIN, 1, {}), plan, "n", Chat)
    kept: list[Episode] = []
    play_match(match, choose, screen, kept.append)
    gaps, moved = token_gap(closer.scorer, kept[0], knowledge.text), influence(closer.scorer, kept[0], knowledge)
    assert [seen[0][-1].turn for seen in before] == [gap.turn for gap in gaps] == [1, 2]
    for place, (seen_gaps, seen_moved) in enumerate(before):
        assert [token.text for token in seen_gaps[-1].tokens] == [token.text for token in gaps[place].tokens]
        assert [token.gap for token in seen_gaps[-1].tokens] == pytest.approx(
            [token.gap for token in gaps[place].tokens], abs=1e-4
        )
        assert [item.changes[-1] for item in seen_moved.items] == pytest.approx(
            [item.changes[place] for item in moved.items], abs=1e-3
        )
    shown = out.getvalue()
    assert shown.count("token by token") == shown.count("item by item") == 1
    assert [shown.count(f"log p with all {logprob:.2f}") >= 1 for logprob in moved.logprobs] == [True, True]
    assert shown.index("reply 1") < shown.index("and then?") < shown.index("reply 2")


def test_a_look_that_fails_says_so_once_and_the_game_goes_on(engine: TransformersEngine) -> None:
    out = io.StringIO()
    text = "Say yes. " * 1000
    closer = Closer(Scorer(engine), Knowledge(id="x", items=(), text=text, tokens=0), "rules.txt", gap=True)
    look = closer.following(Plain(Console(file=out)), Arm("bare"), None)
    episode = played(engine)
    look(episode)
    look(episode)
    assert out.getvalue().count("No closer look at this game: the teacher would read") == 1


def test_what_is_left_without_an_item(knowledge: Knowledge) -> None:
    assert [line.text for line in parts(knowledge)] == ["Say yes.", "Never say no.", "Be brief."]

    def of(text: str) -> list[tuple[str, str | None]]:
        return [(line.text, line.rest) for line in parts(Knowledge(id="x", items=(), text=text, tokens=0))]

    assert of("Rules:\n- a\n2. b") == [("a", "Rules:\n2. b"), ("b", "Rules:\n- a")]
    assert of("first\n\nsecond") == [("first", "second"), ("second", "first")]
    assert of("Rules:\n- only") == [("only", None)]  # a heading alone is no knowledge


def test_pieces_spell_the_reply(tiny_tokenizer: Any) -> None:
    renderer = Renderer(tiny_tokenizer)
    ids = tiny_tokenizer("aé€ b", add_special_tokens=False)["input_ids"]
    assert pieces([*ids, renderer.end_of_turn], renderer) == ["a", "", "é", "", "", "€", " ", "b", "<end>"]
    broken = pieces([ids[3], ids[0]], renderer)  # the first byte of three, then another character
    assert "".join(broken).endswith("a")


GAP = ReplyGap(
    1,
    (
        TokenGap(1, "no", -0.1, -4.0),
        TokenGap(2, " way", -1.0, -1.1),
        TokenGap(3, "\n", -1.0, -0.2),
        TokenGap(4, "yes", -5.0, -1.0),
        TokenGap(5, "<end>", -0.5, -1.2),
    ),
)


def drawn(*, colour: bool, width: int = 80, plain: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=colour, color_system="standard" if colour else None, _environ={}
    )
    show_gap(Plain(console) if plain else Labelled(console), [GAP], "knowledge 3", "the agent")
    return out.getvalue()


def test_the_gap_is_colour_or_marks_and_numbers_always() -> None:
    marked = drawn(colour=False)
    lines = marked.splitlines()
    assert "reply 1  no way\\n" in lines
    assert lines[lines.index("reply 1  no way\\n") + 1] == "         ==    ++"
    assert "         yes<end>" in lines
    assert lines[lines.index("         yes<end>") + 1] == "         ###-----"
    assert "\x1b" not in marked
    coloured = drawn(colour=True)
    assert "\x1b[1;7;31mno" in coloured
    assert "\x1b[1;7;36myes" in coloured
    assert "==" not in coloured
    for shown in (marked, coloured, drawn(colour=False, plain=True)):
        for number in ("-3.90", "+4.00", "+0.80", "-0.70", "+0.10 nats over 5 tokens", "90.5%"):
            assert number in shown, number
    assert "90.5% -> 1.8%" in marked
    assert '-3.90: "no", from 90.5% to 1.8%' in drawn(colour=False, plain=True)
    assert all(len(line) <= 40 for line in drawn(colour=False, width=40).splitlines() if "nats" not in line)
    narrow = painted(GAP, Console(file=io.StringIO(), color_system=None), 3).plain.split("\n")
    assert narrow[:4] == ["no ", "==", "way", "\\n"]


def test_an_items_influence_is_drawn_with_what_was_not_tried(engine: TransformersEngine, knowledge: Knowledge) -> None:
    out = io.StringIO()
    found = influence(Scorer(engine), played(engine, knowledge), knowledge, most=2)
    show_influence(Labelled(Console(file=out, width=80)), found, "knowledge 3", "the agent")
    assert "the first 2 of 3 items left out in turn, 3 forwards" in out.getvalue()
    assert out.getvalue().count("Say yes.") == 2  # once a reply


def test_arms_stand_side_by_side_only_where_there_is_room(engine: TransformersEngine) -> None:
    episode = played(engine)
    other = episode.model_copy(
        update={"turns": (episode.turns[0], episode.turns[1].model_copy(update={"action": "something else"}))}
    )
    assert parting([episode, other]) == 1
    assert parting([episode, episode]) is None
    shown = {}
    for width in (80, 120):
        out = io.StringIO()
        show_comparison(
            Labelled(Console(file=out, width=width)),
            [("bare", episode), ("with knowledge", other), ("distilled", other)],
        )
        shown[width] = out.getvalue().splitlines()
        assert max(map(len, shown[width])) <= width
        assert any("they part at turn 2" in line for line in shown[width])
    assert any(line.split() == ["bare", "with", "knowledge", "distilled"] for line in shown[120])
    assert not any("bare" in line and "distilled" in line for line in shown[80])


def test_what_is_compared_comes_from_the_worlds_own_rounds(
    engrain_home: Any, tmp_path: Any, knowledge: Knowledge
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    with Store.open(str(engrain_home / "engrain.db")) as store:
        assert newest_knowledge(store, "tiny", "chat", {"level": "1"}) is None
        assert newest_checkpoint(store, "tiny", "chat", {"level": "1"}) is None
        record = store.create_round({"world": {"env": "chat", "options": {"level": 1}}}, 0, "tiny")
        store.add_knowledge(knowledge, record.id)
        store.update_round(record.id, state={"select": {"knowledge": knowledge.id}})
        for name, path in (("a", folder), ("b", tmp_path / "gone")):
            store.add_checkpoint(CheckpointRecord(id=name * 8, model="tiny", path=str(path), round_id=record.id))
        found = newest_knowledge(store, "tiny", "chat", {"level": "1"})
        assert found is not None
        assert found.text == knowledge.text
        weights = newest_checkpoint(store, "tiny", "chat", {"level": "1"})
        assert weights is not None
        assert weights.id == "a" * 8  # the other one's folder is gone
        assert newest_knowledge(store, "tiny", "chess", {"level": "1"}) is None
        assert newest_knowledge(store, "tiny", "chat", {"level": "2"}) is None
    assert [arm.name for arm in arms_of(found, weights, None)] == ["bare", "with knowledge", "distilled"]
    with pytest.raises(NothingToCompareError, match="pass --knowledge"):
        arms_of(None, None, None)
