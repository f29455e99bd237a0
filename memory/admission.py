"""Who may become knowledge: text that a world wrote cannot become an item by saying so.

Three questions, each a pure function. `suspicion`: is this line one that no item may be, whoever wrote it (orders to
the model, secrets, links)? `planted`: did the episode's world itself claim that this line is an item? `unverified`: is
there something about the episode for which what it teaches must wait, for a person or for a sound episode that
teaches the same?

The deny-list is a net, not a proof: it keeps out what is known to be bad. What it lets through still has to help on
validation tasks, keeps its source episodes, and can be retired.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from agent.episode import Episode, StopReason
from memory.normalise import normalised, similarity

#: A line that names an experience item in any spelling: what only an extraction turn may write.
ATTEMPT = re.compile(r"experience[\s_*-]*item", re.IGNORECASE)

#: Likeness from which an item counts as the line that the world planted, reworded.
_REWORDED = 0.6
#: Characters from which a planted line is recognised inside a longer item.
_TELLING = 8
#: Characters of a world's text that are searched. An attack must reach the model, which reads no more.
_SEARCHED = 100_000

#: Cyrillic and Greek letters that look like Latin ones, as far as English words can be spelled with them.
_LOOKALIKES = str.maketrans(
    "АВЕКМНОРСТУХІЅЈԚԜаеорсухіѕјԛԝһԁΑΒΕΖΗΙΚΜΝΟΡΤΥΧαιορυνχ", "ABEKMHOPCTYXISJQWaeopcyxisjqwhdABEZHIKMNOPTYXaiopuvx"
)

_SECRETS = r"(?:passwords?|passphrases?|credentials?|api[ _-]?keys?|private keys?|secret keys?|access tokens?)"


def _patterns(*pairs: tuple[str, str]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((reason, re.compile(pattern, re.IGNORECASE)) for reason, pattern in pairs)


#: Orders to the model rather than lessons about a task: in an item, and as a sign of a hostile world.
_ORDERS = _patterns(
    (
        "orders to the model",
        r"\b(?:ignore|disregard|forget|override|bypass|overrule)\b.{0,30}"
        r"\b(?:instructions?|prompts?|guidelines|polic(?:y|ies)|safety|(?:previous|prior|above|earlier|other) \w+)\b",
    ),
    (
        "orders to the model",
        r"\b(?:reveal|leak|disclose|expose|repeat|print|show|output|tell|send)\b.{0,40}"
        r"\b(?:your|system|hidden|initial|original)\b.{0,15}\b(?:prompts?|instructions|secrets?|rules)\b",
    ),
    ("orders to the model", r"\b(?:system prompt|developer mode|jailbreak\w*|new instructions)\b"),
    (
        "orders to the model",
        r"\b(?:you are now|act as|behave as|pretend to be) an? (?:\w+ )?(?:ai|assistant|model|bot)\b",
    ),
    ("orders to the model", r"\byou are (?:no longer|not) (?:bound|restricted|limited|subject)\b"),
    (
        "orders to the model",
        r"\b(?:do not|don['’]t|never|without)\b.{0,20}\b(?:tell(?:ing)?|inform(?:ing)?|warn(?:ing)?)\b.{0,15}"
        r"\b(?:user|human|operator|developers?)\b",
    ),
    ("markup of a chat", r"< ?\|[^|>\s]{1,40}\|>|\[/?INST\]|<</?SYS>>|</s>|<(?:start|end)_of_turn>"),
)
#: What a world may say but no item: links, and what must never be learned by heart.
_IN_ITEMS = _patterns(
    ("markup of a chat", r"^\s*(?:system|assistant|user|human)\s*:|^\s*#+\s*(?:system|instruction)"),
    ("orders to the model", r"\b(?:obey|trust|believe)\b.{0,20}\b(?:me|this message|this text|every order)\b"),
    (
        "orders to the model",
        rf"\b(?:reveal|leak|disclose|expose|repeat|print|show|output|tell|send|give)\b.{{0,40}}\b{_SECRETS}\b",
    ),
    ("a link", r"\b(?:https?|ftp|file|javascript|data)\s*:\s*/{0,3}\S|\bwww\.\w"),
    ("a secret", r"-----BEGIN [A-Z ]*PRIVATE KEY|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),
    (
        "a secret",
        r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bsk-[\w-]{16,}|\bgh[pousr]_\w{20,}|\bxox[a-z]-[\w-]{8,}",
    ),
    ("a secret", rf"\b(?:{_SECRETS}|passcode|secret|pin code)\s*(?:is\b|[=:]|equals\b)\s*\S"),
    ("a secret", r"\b[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]{2,}|\b[0-9a-f]{32,}\b"),
)
_LONG_WORD = re.compile(r"[A-Za-z0-9+/_=-]{40,}")
_CARD = re.compile(r"\b\d(?:[ -]?\d){12,18}\b")


def suspicion(text: str) -> str | None:
    """Why a text can be no item, whoever wrote it; None if nothing speaks against it.

    Compatibility forms, invisible characters and look-alike letters are folded first, so that full-width letters or a
    zero-width space inside a word hide nothing. A word that mixes Latin with Cyrillic letters is refused by itself.
    """
    plain = _shown(text)
    if found := _matched(_folded(text), (*_ORDERS, *_IN_ITEMS)):
        return found
    if any(_is_random(word) for word in _LONG_WORD.findall(plain)) or any(map(_is_card, _CARD.findall(plain))):
        return "a secret"
    if any({"LATIN", "CYRILLIC"} <= _scripts(word) for word in plain.split()):
        return "letters of two alphabets in one word"
    return None


def planted(text: str, episode: Episode) -> bool:
    """Whether the episode's world wrote a line that calls itself an experience item and says this."""
    wanted = normalised(text)
    for line in _claims(episode):
        claimed = normalised(line)
        if wanted in claimed or similarity(wanted, claimed) >= _REWORDED:
            return True
        if len(claimed) >= _TELLING and claimed in wanted:
            return True
    return False


def unverified(episode: Episode) -> str | None:
    """Why what this episode teaches must wait; None if its record holds together.

    An episode is unverified when it broke off (an error, an interruption) or has no turn, so that its outcome says
    nothing; when its outcome is none (a score that is not in [0, 1], a success without a point); when its tokens are
    not those of its turns; or when its world gives orders to the model or poses as an experience item.
    """
    if episode.error is not None or episode.stop_reason in (StopReason.ERROR, StopReason.INTERRUPTED):
        return f"it broke off: {' '.join((episode.error or episode.stop_reason.value).split())[:120]}"
    if not episode.turns:
        return "it has no turn"
    if not (math.isfinite(episode.score) and 0 <= episode.score <= 1 and math.isfinite(episode.reward)):
        return f"its score {episode.score:g} or reward {episode.reward:g} cannot be"
    if episode.success and episode.score <= 0:
        return "it counts as solved with a score of 0"
    if not _tokens_hold(episode):
        return "its tokens are not those of its turns"
    if next(_claims(episode), None) is not None:
        return "its world poses as an experience item"
    for text in world_texts(episode):
        if found := _matched(_folded(text[:_SEARCHED]), _ORDERS):
            return f"its world writes {found}"
    return None


def world_texts(episode: Episode) -> Iterator[str]:
    """All that the world said in an episode, the system message and feedback included."""
    yield from dict.fromkeys(
        [
            *(message.content for message in episode.messages if message.role != "assistant"),
            *(turn.observation for turn in episode.turns),
            *(turn.feedback for turn in episode.turns),
            episode.feedback,
        ]
    )


@dataclass(frozen=True)
class Refusal:
    """A line that an extraction wrote and that became no item, with the reason."""

    text: str
    why: str


def _claims(episode: Episode) -> Iterator[str]:
    """What the world's lines say after calling themselves an experience item; the words may stand on two lines."""
    for text in world_texts(episode):
        before = ""
        for line in map(_folded, text[:_SEARCHED].splitlines()):
            both = f"{before} {line}" if before and not ATTEMPT.search(line) else line
            if found := ATTEMPT.search(both):
                yield both[found.end() :].lstrip(" :*_-0123456789.").strip()
            before = line if both is line or not found else ""


def poses(line: str) -> bool:
    """Whether a line calls itself an experience item, in whatever letters."""
    return ATTEMPT.search(line) is not None or ATTEMPT.search(_folded(line)) is not None


def _folded(text: str) -> str:
    """A text in the letters it is meant to be read in."""
    return _shown(text).translate(_LOOKALIKES)


def _shown(text: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    return " ".join(plain.split())


def _matched(text: str, patterns: tuple[tuple[str, re.Pattern[str]], ...]) -> str | None:
    return next((reason for reason, pattern in patterns if pattern.search(text)), None)


def _tokens_hold(episode: Episode) -> bool:
    """Whether every turn's span lies after the last one's and is sampled from end to end."""
    if episode.human:
        return True  # nothing was sampled
    position = episode.prompt_length
    for turn in episode.turns:
        if not position <= turn.start <= turn.end <= len(episode.token_ids):
            return False
        if not all(episode.loss_mask[turn.start : turn.end]):
            return False
        position = turn.end
    return sum(turn.end - turn.start for turn in episode.turns) == episode.sampled


def _is_random(word: str) -> bool:
    """Whether a long word looks drawn rather than written: digits and both cases, or many different characters."""
    kinds = (any(c.isdigit() for c in word), any(c.islower() for c in word), any(c.isupper() for c in word))
    return all(kinds) and len(set(word)) >= 16


def _is_card(digits: str) -> bool:
    """Luhn's check of a payment card number."""
    values = [int(c) for c in digits if c.isdigit()][::-1]
    return sum(sum(divmod(2 * v, 10)) if place % 2 else v for place, v in enumerate(values)) % 10 == 0


def _scripts(word: str) -> set[str]:
    return {unicodedata.name(c, "").split(" ")[0] for c in word if c.isalpha()}
