"""Examples before and after: the same task by the bare student, with the knowledge in context, and distilled.

Which tasks are shown is not a matter of taste: the first ones of each kind in the order in which they were played, and
beside them how many there are of that kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent.episode import Episode, Message
from engrain.page.facts import Example, Examples, Played, Reply
from memory.records import EvaluationRecord, EvaluationResult
from memory.store import Store

#: Kinds of tasks by who solved them, and how many of each are shown.
KINDS = {"gained": 2, "lost": 2, "solved before and after": 1, "solved by neither": 1}
_REPLIES = 8  # of an episode
_CHARACTERS = 1200  # of a text


def examples(store: Store, evaluations: Sequence[EvaluationRecord], knowledge: str | None) -> Examples:
    """Of test tasks where the round was judged; of validation tasks, bare and in context, where it ended before."""
    named = {e.name: e for e in evaluations if e.name.startswith("test/")}
    students = {name: named[f"test/{name}"] for name in ("bare", "in_context", "distilled") if f"test/{name}" in named}
    if "distilled" not in students:
        students = {
            e.name.partition("/")[2]: e
            for e in evaluations
            if e.name == "validation/bare" or (e.name == "validation/in_context" and e.knowledge == knowledge)
        }
    after = "distilled" if "distilled" in students else "in_context"
    if not {"bare", after} <= set(students):
        return Examples()
    outcomes = {name: {result.task_id: result for result in e.results} for name, e in students.items()}
    common = [result.task_id for result in students["bare"].results if result.task_id in outcomes[after]]
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for task in common:
        kinds[_kind(outcomes["bare"][task].success, outcomes[after][task].success)].append(task)
    shown = [
        example
        for kind, most in KINDS.items()
        for task in kinds[kind][:most]
        if (example := _example(store, kind, task, outcomes))
    ]
    return Examples(
        split=students["bare"].split,
        after=after,
        counts={kind: len(tasks) for kind, tasks in kinds.items()},
        shown=tuple(shown),
    )


def _kind(before: bool, after: bool) -> str:
    if before:
        return "solved before and after" if after else "lost"
    return "gained" if after else "solved by neither"


def _example(
    store: Store, kind: str, task: str, outcomes: Mapping[str, Mapping[str, EvaluationResult]]
) -> Example | None:
    """One task's episodes; None where all of them were forgotten."""
    ids = {name: results[task].episode_id for name, results in outcomes.items() if task in results}
    stored = store.has_episodes([id_ for id_ in ids.values() if id_])
    episodes = {name: store.episode(id_) for name, id_ in ids.items() if id_ in stored and id_}
    if not episodes:
        return None
    first = next(iter(episodes.values()))
    return Example(
        kind=kind,
        task=task,
        prompt=shortened("\n\n".join(message.content for message in _prompt(first))),
        played=tuple(_played(name, episode) for name, episode in episodes.items()),
    )


def _prompt(episode: Episode) -> list[Message]:
    """The messages before the first reply; the knowledge is never among them."""
    before = []
    for message in episode.messages:
        if message.role == "assistant":
            break
        before.append(message)
    return before


def _played(student: str, episode: Episode) -> Played:
    answers = [turn.observation for turn in episode.turns[1:]]
    shown = episode.turns[:_REPLIES]
    return Played(
        student=student,
        solved=episode.success,
        score=episode.score,
        replies=tuple(
            Reply(action=shortened(turn.action), answer=shortened(answers[place]) if place < len(answers) else "")
            for place, turn in enumerate(shown)
        ),
        more=len(episode.turns) - len(shown),
        feedback=shortened(episode.feedback),
        error=shortened(episode.error) if episode.error else None,
    )


def shortened(text: str) -> str:
    """A text of at most `_CHARACTERS` characters, and how many more there are."""
    left = len(text) - _CHARACTERS
    return text if left <= 0 else f"{text[:_CHARACTERS]} … ({left} more characters)"
