"""An extraction prompt of your own. Run it: python examples/own_extraction.py [MODEL]

`engrain improve WORLD --extraction short` uses it too, once the entry point in pyproject.toml is installed.
"""

import sys

from agent.rollout import play
from engrain import (
    MARKER,
    Extractor,
    Message,
    SamplingParams,
    Split,
    TransformersEngine,
    fence,
    register_prompt,
    resolve,
    world,
)


def short(record: str) -> list[Message]:
    """One worked example, then the record; the lesson must be short.

    The reply is read line by line: only lines that begin with MARKER become items. The fence keeps a world's own text
    from passing for yours.
    """
    shown = "Task: Close the box.\nReply: I close it.\nOutcome: failed (score 0.00)\nFeedback: Turn the key as well."
    return [
        Message(role="system", content="You turn what went wrong into one rule of at most ten words."),
        Message(role="user", content=fence(shown)),
        Message(role="assistant", content=f"{MARKER} After you close a box, always turn the key."),
        Message(role="user", content=fence(record)),
    ]


register_prompt("short", short)


def main(model: str = "smollm2-135m") -> None:
    engine = TransformersEngine(resolve(model), name=model)
    tasks = world("math", {"convention": "answer_tag"}).tasks(Split.TRAIN, 2)
    episodes = play(tasks, engine, sampling=SamplingParams(temperature=0.7, max_tokens=32), namespace="own")
    for found in Extractor(engine, "short").extract(episodes, seed=0):
        print(f"{found.mode}, prompt version {found.prompt_version}")
        print(f"  the model wrote:   {found.output!r}")
        print(f"  items:             {list(found.items)}")
        print(f"  malformed lines:   {list(found.malformed)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
