"""A hundred short instructions whose obedience code can check, in the spirit of IF-Eval (arXiv 2311.07911).

Written here: 25 kinds of constraint, four prompts each. They measure what training on something else costs: whether a
model still does as it is told. Only the constraint counts, not whether what is said is true. Importing this module
registers the world `instructions` in this process; its one split is `test`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from envs.base import Env, Observation, Split, Step, Task, World
from envs.errors import UsageError
from envs.registry import register_world

Check = Callable[..., bool]


def words(text: str) -> list[str]:
    """Words, with what is inside them: `don't` is one."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?]+(?=\s|$)", text.strip()))


def bare(text: str) -> str:
    """The text without quotation marks and a full stop around it, its spaces made one."""
    return " ".join(text.split()).strip("\"'“”`.").strip()


def json_keys(text: str, *keys: str) -> bool:
    inner = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        found = json.loads(inner)
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == set(keys)


def numbered(text: str, _: str, count: int) -> bool:
    found = lines(text)
    return len(found) == count and all(line.startswith(f"{n}.") for n, line in enumerate(found, 1))


def bulleted(text: str, _: str, count: int) -> bool:
    found = lines(text)
    return len(found) == count and all(line.startswith("- ") for line in found)


def parts(text: str, _: str) -> bool:
    found = re.split(r"^\s*\*\*\*\s*$", text, flags=re.MULTILINE)
    return len(found) == 2 and all(words(part) for part in found)


def question(text: str, _: str) -> bool:
    return text.strip().endswith("?") and sentences(text) == 1


def counting(text: str, first: int, last: int) -> bool:
    return bare(text).replace(" ", "") == ",".join(map(str, range(first, last + 1)))


def postscript(text: str, _: str) -> bool:
    return len(lines(text)) > 1 and lines(text)[-1].startswith("P.S.")


#: (prompt, check of the reply and the prompt's four sets of values)
KINDS: tuple[tuple[str, Check, tuple[tuple[Any, ...], ...]], ...] = (
    (
        "Describe {0} in exactly {1} words.",
        lambda t, _, n: len(words(t)) == n,
        (("the sea", 3), ("a winter morning", 5), ("fresh bread", 4), ("a bicycle", 6)),
    ),
    (
        "Write one sentence about {0} that has at most {1} words.",
        lambda t, _, n: 0 < len(words(t)) <= n,
        (("cats", 8), ("rain", 6), ("a train journey", 10), ("the moon", 7)),
    ),
    (
        "Name one {0}. Reply with a single word.",
        lambda t, _: len(words(t)) == 1,
        (("colour",), ("animal",), ("fruit",), ("country",)),
    ),
    (
        "Write one sentence about {0} that contains the word '{1}'.",
        lambda t, _, word: word in map(str.lower, words(t)),
        (("a garden", "lantern"), ("the city", "silver"), ("music", "window"), ("a river", "button")),
    ),
    (
        "Write one sentence about {0} without using the letter '{1}'.",
        lambda t, _, letter: bool(words(t)) and letter not in t.lower(),
        (("dogs", "z"), ("the sun", "x"), ("a book", "q"), ("tea", "v")),
    ),
    (
        "Write one sentence about {0} in capital letters only.",
        lambda t, _: t.isupper(),
        (("the weather",), ("a mountain",), ("football",), ("breakfast",)),
    ),
    (
        "Write one sentence about {0} in lowercase letters only, without any capital letter.",
        lambda t, _: t.islower(),
        (("the wind",), ("a forest",), ("cooking",), ("an old house",)),
    ),
    (
        "List {1} {0}, one a line. Each line must begin with '- '. Write nothing else.",
        bulleted,
        (("vegetables", 3), ("kinds of weather", 4), ("tools", 3), ("sports", 5)),
    ),
    (
        "List {1} {0} as a numbered list that begins with '1.'. Write nothing else.",
        numbered,
        (("trees", 3), ("drinks", 4), ("rivers", 3), ("musical instruments", 4)),
    ),
    (
        "{0} Answer with yes or no and nothing else.",
        lambda t, _: bare(t).lower() in {"yes", "no"},
        (("Is ice cold?",), ("Can fish fly aeroplanes?",), ("Is seven a number?",), ("Do stones sleep?",)),
    ),
    (
        "Reply with the word '{0}' and nothing else.",
        lambda t, word: bare(t).lower() == word,
        (("harbour",), ("yellow",), ("seventeen",), ("understood",)),
    ),
    (
        "Repeat this sentence exactly and write nothing else: {0}",
        lambda t, said: bare(t) == bare(said),
        (
            ("The boat left at noon.",),
            ("Nobody had seen the key.",),
            ("Two birds sat on the roof.",),
            ("We will meet at the bridge.",),
        ),
    ),
    (
        "Write one sentence about {0}. End your reply with the words '{1}'.",
        lambda t, _, end: bare(t).lower().endswith(end),
        (("travel", "and so it goes"), ("snow", "that is all"), ("a clock", "at last"), ("friends", "every day")),
    ),
    (
        "Say something about {0}. The first word of your reply must be '{1}'.",
        lambda t, _, first: [w.lower() for w in words(t)[:1]] == [first.lower()],
        (("winter", "Slowly"), ("school", "Perhaps"), ("the market", "Today"), ("a dream", "Once")),
    ),
    (
        "Give a JSON object with the keys '{0}' and '{1}' and nothing else.",
        json_keys,
        (("name", "age"), ("city", "country"), ("title", "year"), ("red", "green")),
    ),
    (
        "Say something about {0}. Put your whole reply in double quotation marks.",
        lambda t, _: len(t.strip()) > 2 and t.strip()[0] in '"“' and t.strip()[-1] in '"”',
        (("courage",), ("the stars",), ("a long road",), ("silence",)),
    ),
    (
        "Write exactly two sentences about {0}.",
        lambda t, _: sentences(t) == 2,
        (("horses",), ("the desert",), ("a museum",), ("lunch",)),
    ),
    (
        "Write one long sentence about {0} without using any comma.",
        lambda t, _: bool(words(t)) and "," not in t,
        (("a bridge",), ("autumn",), ("a shop",), ("honey",)),
    ),
    (
        "Write a title for a story about {0}, in double square brackets such as [[title]]. Write nothing else.",
        lambda t, _: re.fullmatch(r"\[\[[^\[\]\n]+\]\]", t.strip()) is not None,
        (("a lost dog",), ("a lighthouse",), ("two brothers",), ("a storm",)),
    ),
    (
        "Write the numbers from {0} to {1}, separated by commas. Write nothing else.",
        counting,
        ((1, 5), (3, 9), (10, 14), (6, 12)),
    ),
    (
        "Write the word '{0}' {1} times, separated by spaces. Write nothing else.",
        lambda t, word, n: [w.lower() for w in words(t)] == [word] * n,
        (("drum", 3), ("apple", 4), ("north", 5), ("lamp", 2)),
    ),
    (
        "Write two very short paragraphs about {0}. Separate them by a line that holds only ***.",
        parts,
        (("a lake",), ("work",), ("an island",), ("letters",)),
    ),
    (
        "Ask one question about {0}. Your whole reply must be that question.",
        question,
        (("space",), ("bees",), ("the past",), ("glass",)),
    ),
    (
        "Say something about {0} and use exactly {1} exclamation marks.",
        lambda t, _, n: t.count("!") == n,
        (("a party", 3), ("winning", 2), ("the sea", 1), ("a birthday", 4)),
    ),
    (
        "Write one sentence about {0}. After it write a last line that begins with 'P.S.'.",
        postscript,
        (("a journey",), ("a gift",), ("the garden",), ("a letter",)),
    ),
)


class InstructionsEnv(Env):
    """One instruction, one reply: 1 where the constraint is kept."""

    max_turns = 1

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._kept = False

    def reset(self) -> Observation:
        return Observation(str(self.task.parameters["prompt"]))

    def step(self, text: str) -> Step:
        _, check, values = KINDS[self.task.parameters["kind"]]
        self._kept = bool(check(text, *values[self.task.parameters["place"]]))
        return Step(Observation(""), float(self._kept), done=True)

    @property
    def score(self) -> float:
        return float(self._kept)


@register_world
class InstructionsWorld(World):
    """The hundred instructions, always the same ones in the same order."""

    name: ClassVar[str] = "instructions"
    isolated: ClassVar[bool] = False

    @classmethod
    def configure(cls, options: Mapping[str, Any]) -> InstructionsWorld:
        if options:
            raise UsageError(f"env 'instructions' has no options, and was given {', '.join(options)}")
        return cls()

    def tasks(self, split: Split, count: int, seed: int = 0) -> list[Task]:
        found = [
            Task.create(
                self.name, Split.TEST, 0, {"kind": kind, "place": place, "prompt": KINDS[kind][0].format(*values)}
            )
            for place in range(4)
            for kind in range(len(KINDS))
            for values in [KINDS[kind][2][place]]
        ]
        if split is not Split.TEST or count > len(found):
            raise UsageError(f"env 'instructions' has {len(found)} tasks in split 'test' and no others")
        return found[:count]

    @classmethod
    def make(cls, task: Task) -> InstructionsEnv:
        return InstructionsEnv(task)
