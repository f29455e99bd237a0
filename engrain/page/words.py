"""What a round's page says in words. Every sentence follows from the numbers; nothing is rounded up to a success."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engrain.gate import Gain, Rate
from engrain.page.facts import Outcome, ReportPage, Words

_HEADLINES = {
    Outcome.PROMOTED: "{model} learned something on {world} that holds on tasks it had not seen: promoted.",
    Outcome.ROLLED_BACK: "{model} was promoted after this round on {world}, and rolled back since.",
    Outcome.REJECTED: "{model} was trained on {world} and not promoted: it plays with the weights it had before.",
    Outcome.STOPPED: "{model} stopped this round on {world} early; nothing was promoted, its weights are as they were.",
    Outcome.FAILED: "The round of {model} on {world} failed; nothing was promoted.",
    Outcome.UNFINISHED: "The round of {model} on {world} is not finished: what stands here may still change.",
}


def words(page: ReportPage) -> Words:
    """The headline, what happened in the order in which it happened, and what to keep in mind."""
    headline = _HEADLINES[page.outcome].format(model=page.model, world=page.world)
    return Words(headline=headline, story=tuple(_story(page)), cautions=tuple(_cautions(page)))


def rated(rate: Rate) -> str:
    """An accuracy with its interval and count."""
    return f"{rate.accuracy:.0%} [{rate.low:.0%} to {rate.high:.0%}] of {rate.n}"


def gained(gain: Gain) -> str:
    """A difference in points of a hundred, with its interval."""
    level = f"{gain.confidence:.1%}".replace(".0%", "%")
    return f"{100 * gain.difference:+.0f} points [{100 * gain.low:+.0f} to {100 * gain.high:+.0f}, {level} interval]"


def options(given: Mapping[str, Any]) -> str:
    """World options as the command line takes them."""
    return ", ".join(f"{key}={value}" for key, value in given.items())


def _story(page: ReportPage) -> Iterator[str]:
    played = next((part for part in page.cost.parts if part.part == "playing to learn from"), None)
    if played is not None:
        how = f" ({options(page.options)})" if page.options else ""
        yield f"It played {counted(played.episodes, 'episode')} of {page.world}{how} without any knowledge."
    if page.extracted is not None:
        yield _extraction(page)
    elif page.outcome is Outcome.UNFINISHED and not page.given:
        yield "Nothing has been extracted yet."
    if page.knowledge is not None and page.gap is not None:
        text = page.knowledge
        sure = (
            ""
            if page.gap.positive
            else " That interval does not exclude zero, so training could not be expected to pay."
        )
        size = f"{counted(text.lines, 'line')} and {text.tokens} tokens"
        if page.given:
            which = f"It was given a text of {size}"
        else:
            which = f"Of {counted(len(page.candidates), 'candidate text')}, validation tasks chose one of {size}"
        yield (
            f"{which}: with it in the context accuracy on "
            f"{page.gap.n} validation tasks changes by {gained(page.gap)}.{sure}"
        )
    if page.training is not None:
        yield _training(page)
    bare, in_context, distilled = (page.rate(name) for name in ("bare", "in_context", "distilled"))
    if bare and in_context and distilled:
        yield (
            f"On test tasks, none of which it had seen: bare {rated(bare)}; with the knowledge in context "
            f"{rated(in_context)}; distilled, with nothing in the context, {rated(distilled)}."
        )
    if page.gain is not None:
        share = "" if page.recovery is None else f", {page.recovery:.0%} of what the knowledge does in the context"
        yield (
            f"Task by task against the bare student that is {gained(page.gain)}{share}: "
            f"{page.gain.gained} tasks gained, {page.gain.lost} lost (exact McNemar p = {page.gain.p_value:.2g})."
        )
    yield from _others(page)
    if page.reason:
        yield f"The round's own verdict: {page.reason}."


def _extraction(page: ReportPage) -> str:
    away = []
    if page.malformed:
        away.append(f"{counted(page.malformed, 'malformed line')} kept aside")
    if page.refused:
        away.append(f"{page.refused} refused at admission")
    besides = f" ({', '.join(away)})" if away else ""
    merged = ", before equal ones were merged" if (page.extracted or 0) > 1 else ""
    return f"From these it wrote {counted(page.extracted or 0, 'item')}{besides}{merged}."


def _training(page: ReportPage) -> str:
    training = page.training
    if training is None or training.chosen_step is None:
        steps = training.steps if training else 0
        return f"Training ({steps} steps) has begun and has not chosen a checkpoint yet."
    done = max(training.divergence, default=training.chosen_step)
    early = f" It ended early: {training.stopped}." if training.stopped else ""
    return (
        f"It was trained for {done} of {training.steps} steps by {training.objective}; validation tasks chose the "
        f"checkpoint of step {training.chosen_step}.{early}"
    )


def _others(page: ReportPage) -> Iterator[str]:
    for other in page.others:
        if other.change is not None and other.before and other.after:
            yield (
                f"On {other.world}, which it was not trained on, accuracy went from {rated(other.before)} to "
                f"{rated(other.after)}: {gained(other.change)}."
            )


def _cautions(page: ReportPage) -> Iterator[str]:
    if page.outcome is Outcome.UNFINISHED:
        yield f"The round stands at the stage “{page.stage or 'not begun'}”; this page shows what the store held then."
    if not page.measured and page.outcome is not Outcome.UNFINISHED:
        yield "No test task was played: nothing here says how the model does on tasks that chose nothing."
    if page.looks and page.looks[-1].number < page.looks[-1].of:
        yield (
            f"Judging ended at look {page.looks[-1].number} of {page.looks[-1].of}. The gain's interval allows for "
            "that; the intervals of single accuracies do not, and an estimate that ended a test early leans to the "
            "side on which it ended."
        )
    if page.measured:
        yield f"One round with one seed ({page.seed}). Another seed draws other tasks and other samples."
    if len(page.candidates) > 1:
        yield (
            "The knowledge was chosen on the validation tasks, so its accuracy there is the best of "
            f"{len(page.candidates)} and leans upwards; test tasks chose nothing."
        )
    if page.gain is not None and not page.gain.positive and page.outcome is Outcome.REJECTED:
        yield "“No clear gain” is not “no gain”: the interval holds all that these tasks could not tell apart."
    if page.training is not None and page.training.leak_rate:
        yield f"In the last step {page.training.leak_rate:.0%} of the replies cited their experience."
    yield (
        "Texts under “examples”, “knowledge” and “items” were written by a model or a world. They are shown as they "
        "are, control characters aside, and nobody has vouched for them."
    )


def counted(number: int, what: str) -> str:
    """A number with its noun."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
