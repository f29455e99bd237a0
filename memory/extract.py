"""From episodes to lines of experience: the record a model reads, and the strict reading of what it writes."""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from agent.engines.base import Engine
from agent.episode import Episode, Message, SamplingParams, StopReason
from envs.errors import UsageError
from memory.admission import ATTEMPT, poses
from memory.prompts import PROMPT_VERSION, contrast_messages, examples_messages, own_prompt, paper_messages
from memory.reader import EngineReader, Reader
from memory.records import Extraction, digest
from memory.render import HEADER

MAX_ITEM_CHARACTERS = 400
_TERSE = ("examples", "contrastive")  # modes whose worked examples show a reply of one line

_ITEM = re.compile(r"- EXPERIENCE ITEM: (\S.*)")
_PLACEHOLDER = re.compile(r"[<\[({]?\s*(text|item|lesson|rule|experience|\.\.\.|…)\s*[>\])}]?\.?", re.IGNORECASE)
_RULE = re.compile(r"^(\s*)(=+\s*)$", re.MULTILINE)
# How lines of a record begin: a further line of foreign text that begins so would pass for one.
_LABEL = re.compile(
    r"\s*(?:(?:Attempt \d+|\[\d+ turns left out\])\s*$|"
    r"(?:Instructions|Task|Reply|Outcome|Feedback(?: on it)?|It ended early|Turn \d+ (?:answer|reply)):)"
)


@dataclass(frozen=True)
class Parsed:
    """What one output held: well-formed items in order, and the lines that tried to be one and failed."""

    items: tuple[str, ...]
    malformed: tuple[str, ...]


def parse(output: str, *, finished: bool = True, max_items: int | None = None) -> Parsed:
    """Read `- EXPERIENCE ITEM: <text>` lines; other prose is passed over.

    Malformed are lines that name an experience item in any other form; items that are empty, a mere placeholder,
    longer than 400 characters or hold control, invisible or garbled characters; items beyond `max_items`; and, when the
    output was cut off (`finished` False), a last line without its end. An item said twice counts once.
    """
    items: list[str] = []
    malformed: list[str] = []
    lines = output.split("\n")
    for number, line in enumerate(lines):
        line = line.removesuffix("\r")
        if not ATTEMPT.search(line):
            continue
        match = _ITEM.fullmatch(line.rstrip(" "))
        whole = finished or number < len(lines) - 1
        if match is None or not whole or not _admissible(match[1]):
            malformed.append(line)
        elif match[1] not in items:
            if max_items is not None and len(items) >= max_items:
                malformed.append(line)
            else:
                items.append(match[1])
    return Parsed(tuple(items), tuple(malformed))


def _admissible(text: str) -> bool:
    return (
        len(text) <= MAX_ITEM_CHARACTERS
        and not poses(text)
        and not _PLACEHOLDER.fullmatch(text)
        and any(character.isalnum() for character in text)
        and not any(c == _GARBLED or unicodedata.category(c) in _INVISIBLE for c in text)
    )


_GARBLED = "\ufffd"  # what a record shows in place of a control character
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def transcript(episode: Episode, keep: int | None = None) -> str:
    """The record of an episode as the extracting model reads it: task, replies, outcome, feedback.

    Args:
        episode: any episode, failed ones included.
        keep: how many turns to show; the first and the latest stay, and a line says how many are left out. None is all.

    Texts from the env are data: their lines cannot look like the record's borders, like its own lines or like an item,
    and control characters show as U+FFFD. Knowledge in the episode's own system message is left out.
    """
    lines = []
    if system := _own_system(episode.messages):
        lines.append(f"Instructions: {_quoted(system)}")
    turns = episode.turns
    shown = len(turns) if keep is None else max(0, min(keep, len(turns)))
    head = shown - shown // 2
    kept = [*range(head), *range(len(turns) - (shown - head), len(turns))]
    single = len(turns) == 1
    if not turns and (first := next((m for m in episode.messages if m.role == "user"), None)):
        lines.append(f"Task: {_quoted(first.content)}")
    for position, index in enumerate(kept):
        if position and kept[position - 1] != index - 1:
            lines.append(f"[{index - kept[position - 1] - 1} turns left out]")
        turn = turns[index]
        prefix = "" if single else f"Turn {index + 1} "
        lines.append(f"{'Task' if index == 0 else f'Turn {index + 1} answer'}: {_quoted(turn.observation)}")
        lines.append(f"{prefix}{'Reply' if single else 'reply'}: {_quoted(turn.action)}")
        if turn.feedback and turn.feedback not in episode.feedback:
            lines.append(f"Feedback on it: {_quoted(turn.feedback)}")
    if missing := len(turns) - (kept[-1] + 1 if kept else 0):
        lines.append(f"[{missing} turns left out]")
    lines.append(f"Outcome: {'solved' if episode.success else 'failed'} (score {episode.score:.2f})")
    if episode.stop_reason is not StopReason.DONE:
        lines.append(f"It ended early: {_ENDED.get(episode.stop_reason, episode.stop_reason.value)}")
    if episode.feedback:
        lines.append(f"Feedback: {_quoted(episode.feedback)}")
    return "\n".join(lines)


_ENDED = {
    StopReason.MAX_TURNS: "no turns were left",
    StopReason.LENGTH: "there was no room for more text",
    StopReason.ERROR: "the world broke down",
}


def _own_system(messages: Sequence[Message]) -> str:
    """The env's own system text, without a block of knowledge before it."""
    text = "\n\n".join(m.content for m in messages if m.role == "system")
    if not text.startswith(HEADER):
        return text
    lines = text.removeprefix(HEADER).lstrip("\n").split("\n")
    while lines and lines[0].startswith("- "):
        lines.pop(0)
    return "\n".join(lines).strip("\n")


def _quoted(text: str) -> str:
    """Foreign text, made unable to pass for anything but text."""
    text = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)
    text = _RULE.sub(r"\1> \2", text)
    lines = text.strip().split("\n")
    forged = [poses(line) or (number > 0 and _LABEL.match(line)) for number, line in enumerate(lines)]
    return "\n".join(f"> {line}" if bad else line for line, bad in zip(lines, forged, strict=True))


class Extractor:
    """Lets a model look back at episodes: the one that played them, or a coach.

    Args:
        engine: the model that writes, or a reader of any other kind; it is recorded with its checkpoint as the items'
            origin.
        mode: `examples` (default; small models need it), `paper`, `contrastive`: several episodes at once, or the name
            of a registered prompt (`memory.prompts.register_prompt`).
        max_items: most items taken from one output; more are kept as malformed.
        sampling: how to sample; its seed is replaced by one per extraction.
        group: how many episodes `contrastive` shows side by side.

    Raises:
        UsageError: there is no such mode, or a group of fewer than 2.
        BadPluginError: the registered prompt does not import.
    """

    def __init__(
        self,
        engine: Engine | Reader,
        mode: str = "examples",
        max_items: int = 4,
        sampling: SamplingParams | None = None,
        group: int = 3,
    ) -> None:
        if group < 2:
            raise UsageError(f"contrastive extraction compares at least 2 episodes, not {group}")
        self._reader: Reader = engine if isinstance(engine, Reader) else EngineReader(engine)
        self._mode, self._own = mode, own_prompt(mode)
        # another text under the same name is another prompt
        self._version = PROMPT_VERSION if self._own is None else digest(*(str(m) for m in self._own("")))
        self._max_items = max_items
        self._group = group
        self._sampling = sampling or SamplingParams(temperature=0.7, max_tokens=96 if mode in _TERSE else 512)

    def extract(self, episodes: Sequence[Episode], seed: int) -> list[Extraction]:
        """One extraction an episode, in order; an episode given several times is read with as many seeds.

        In `contrastive` mode one extraction a group (see `contrast`). All are asked in one call. What
        does not fit the model's context even without its turns yields an extraction without output.
        """
        groups = contrast(episodes, self._group) if self._mode == "contrastive" else [(e,) for e in episodes]
        seeds = _seeds([group[0] for group in groups], seed)
        asked = [self._fitting(group) for group in groups]
        fitting = [i for i, messages in enumerate(asked) if messages is not None]
        samplings = [self._sampling.model_copy(update={"seed": seeds[i]}) for i in fitting]
        replies = dict(zip(fitting, self._reader.reply([asked[i] or [] for i in fitting], samplings), strict=True))
        extractions = []
        for i, group in enumerate(groups):
            output, parsed = "", Parsed((), ())
            if reply := replies.get(i):
                output = reply.text
                parsed = parse(output, finished=reply.finished, max_items=self._max_items)
            extractions.append(self._extraction(group, seeds[i], output, parsed))
        return extractions

    def messages(self, group: Sequence[Episode], keep: int | None = None) -> list[Message]:
        """What the model is asked about one episode or several, `keep` turns of each (None: all)."""
        records = [transcript(episode, keep) for episode in group]
        if self._mode == "contrastive":
            return contrast_messages(records)
        if self._own is not None:
            return list(self._own(records[0]))
        if self._mode == "paper":
            return paper_messages(records[0], single_turn=len(group[0].turns) <= 1)
        return examples_messages(records[0])

    def _fitting(self, group: Sequence[Episode]) -> list[Message] | None:
        """The longest messages that leave room for the answer, whole turns being left out; None if none do."""
        if self._reader.fits(messages := self.messages(group), self._sampling.max_tokens):
            return messages
        best, low, high = None, 0, max(len(episode.turns) for episode in group) - 1
        while low <= high:
            keep = (low + high) // 2
            messages = self.messages(group, keep)
            if self._reader.fits(messages, self._sampling.max_tokens):
                best, low = messages, keep + 1
            else:
                high = keep - 1
        return best

    def _extraction(self, group: Sequence[Episode], seed: int, output: str, parsed: Parsed) -> Extraction:
        reader = self._reader
        ids = [episode.id for episode in group]
        origin = (*ids, reader.model, reader.checkpoint, self._mode, self._version, seed)
        return Extraction(
            id=digest(*origin, self._sampling.model_dump_json(exclude={"seed"})),
            episode_id=ids[0],
            others=tuple(ids[1:]),
            model=reader.model,
            checkpoint=reader.checkpoint,
            mode=self._mode,
            prompt_version=self._version,
            seed=seed,
            output=output,
            items=parsed.items,
            malformed=parsed.malformed,
        )


def alternate(episodes: Sequence[Episode], count: int, seed: int) -> list[Episode]:
    """Which episodes to read: failed and solved ones in turn, shuffled by seed; those that broke teach nothing."""
    usable = [episode for episode in episodes if episode.turns and episode.error is None]
    random.Random(seed).shuffle(usable)  # noqa: S311 - repeatable on purpose
    failed, solved = [e for e in usable if not e.success], [e for e in usable if e.success]
    return [e for pair in zip_longest(failed, solved) for e in pair if e is not None][:count]


def contrast(episodes: Sequence[Episode], size: int) -> list[tuple[Episode, ...]]:
    """Groups of at most `size` episodes of one world, failed ones first, the solved ones dealt out evenly.

    Every episode is in one group; where there are as many solved episodes as groups, each group has one of either kind.
    """
    worlds: dict[str, list[Episode]] = {}
    for episode in episodes:
        worlds.setdefault(episode.task.env, []).append(episode)
    groups: list[list[Episode]] = []
    for family in worlds.values():
        dealt: list[list[Episode]] = [[] for _ in range(math.ceil(len(family) / size))]
        for place, episode in enumerate(sorted(family, key=lambda e: e.success)):
            dealt[place % len(dealt)].append(episode)
        groups += dealt
    return [tuple(group) for group in groups]


def _seeds(episodes: Sequence[Episode], seed: int) -> list[int]:
    """A 31-bit seed for each, fixed by its task and how often that stood earlier: not by its neighbours, and not by the
    episode's id, which another run of the same seed does not share."""
    seen: Counter[str] = Counter()
    seeds = []
    for episode in episodes:
        seeds.append(int(digest(seed, episode.task.id, seen[episode.task.id]), 16) % 2**31)
        seen[episode.task.id] += 1
    return seeds
