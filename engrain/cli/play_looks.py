"""Closer looks at the agent's replies: what the knowledge does to each token, and which of its items did it.

A reply is looked at as soon as it is chosen, before a person takes it or the world hears it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.engines.base import Engine
from agent.episode import Episode
from engrain.cli.play_screen import Screen
from engrain.cli.play_views import show_gap, show_influence
from engrain.compare import Arm
from engrain.influence import MOST_ITEMS, influence, parts
from engrain.play import load
from engrain.terminal import count
from engrain.tokengap import token_gap
from envs.errors import EngrainError
from memory.records import CheckpointRecord, Knowledge

if TYPE_CHECKING:
    from engrain.scoring import Scorer

#: Is given a game as far as it went, and shows its last reply.
Look = Callable[[Episode], None]


@dataclass(frozen=True)
class Closer:
    """What is looked at.

    `against` is the text that the teacher reads and whose items are left out; `name` is what people call it.
    """

    scorer: Scorer
    against: Knowledge
    name: str
    gap: bool = False
    why: bool = False

    def look(
        self,
        screen: Screen,
        episode: Episode,
        arm: Arm,
        teacher: CheckpointRecord | None,
        *,
        who: str = "the agent",
        why: bool = True,
        last: bool = False,
        headed: bool = True,
    ) -> dict[str, Any]:
        """The views that were asked for, and what they found, for JSON.

        Args:
            screen: where they are shown.
            episode: whose replies are looked at.
            arm: what played it; its weights are loaded.
            teacher: the weights that read the knowledge; None is the base model.
            who: what its player is called.
            why: whether to ask about the items, where that was asked for at all.
            last: whether only the last reply is shown.
            headed: whether to say what the numbers are.
        """
        found: dict[str, Any] = {}
        if not any(any(episode.loss_mask[t.start : t.end]) for t in episode.turns):
            return found
        if self.gap:
            with screen.waiting("scoring with and without the knowledge, 2 forwards"):
                gaps = token_gap(
                    self.scorer,
                    episode,
                    self.against.text,
                    lambda: _teaching(self.scorer.engine, teacher, arm.checkpoint),
                )
            show_gap(screen, gaps[-1:] if last else gaps, self.name, who, headed=headed)
            found["gap"] = [gap.facts() for gap in gaps]
        if self.why and why:
            forwards = 1 + min(MOST_ITEMS, len(parts(self.against)))
            with screen.waiting(f"leaving out one item after another, {count(forwards, 'forward')}"):
                moved = influence(self.scorer, episode, self.against)
            show_influence(screen, moved, self.name, who, since=len(moved.turns) - 1 if last else 0, headed=headed)
            found["influence"] = moved.facts()
        return found

    def following(self, screen: Screen, arm: Arm, teacher: CheckpointRecord | None) -> Look:
        """Looks at a game while it goes on. Where that fails it says so once, and the game is no worse for it."""
        looked, failed = False, False

        def look(so_far: Episode) -> None:
            nonlocal looked, failed
            if failed or not any(so_far.loss_mask[so_far.turns[-1].start :]):
                return
            try:
                self.look(screen, so_far, arm, teacher, last=True, headed=not looked)
                looked = True
            except EngrainError as error:
                failed = True
                screen.facts(f"no closer look at this game: {error}", style="dim")

        return look


@contextmanager
def _teaching(engine: Engine, teacher: CheckpointRecord | None, student: CheckpointRecord | None) -> Iterator[None]:
    """A time in which the engine has the teacher's weights; the student's own afterwards."""
    load(engine, teacher)
    try:
        yield
    finally:
        load(engine, student)
