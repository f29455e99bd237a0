"""A world made for a tiny random model: a task is solved by the very reply that the model gives with an item in its
context, so that the in-context gap is real. It is a plugin, for processes that know nothing of the tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from agent.engines.transformers import TransformersEngine
from agent.episode import Message, SamplingParams
from distill.monitor import GuardConfig
from memory.render import render_knowledge

ROOT = Path(__file__).parents[2]
QUESTIONS = 128
ITEM = "Answer in the way of the old masters."
WORLD = """
import json
import os

from envs.base import Env, Observation, Split, Step, Task, World


class MimicEnv(Env):
    max_turns = 1

    def reset(self):
        self.won = False
        return Observation(self.task.parameters["question"])

    def step(self, text):
        self.won = text == self.task.parameters["answer"]
        return Step(Observation(""), float(self.won), True, "Counted." if self.won else "Not counted.")

    @property
    def score(self):
        return float(self.won)


class MimicWorld(World):
    name = "mimic"
    isolated = False

    @classmethod
    def configure(cls, options):
        return cls()

    def tasks(self, split, count, seed=0):
        with open(os.environ["MIMIC_ANSWERS"]) as file:
            answers = json.load(file)
        first = 32 * list(Split).index(split)
        names = [f"q{first + number}" for number in range(count)]
        return [Task.create("mimic", split, n, {"question": q, "answer": answers[q]}) for n, q in enumerate(names)]

    @classmethod
    def make(cls, task):
        return MimicEnv(task)
"""


def install(folder: Path, model: Path) -> dict[str, str]:
    """Put the plugin into a folder, with this model's answers; the environment in which it is found."""
    about = folder / "plugins" / "mimic-0.dist-info"
    about.mkdir(parents=True)
    (folder / "plugins" / "mimic_world.py").write_text(WORLD)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mimic\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[engrain.envs]\nmimic = mimic_world:MimicWorld\n")
    engine = TransformersEngine(model, name=str(model))
    questions, known = [f"q{number}" for number in range(QUESTIONS)], render_knowledge([ITEM])
    prompts = [engine.renderer.prompt([Message(role="user", content=q)], known) for q in questions]
    replies = engine.generate(prompts, [SamplingParams(temperature=0.0, max_tokens=2)] * QUESTIONS)
    engine.close()
    answers = {q: engine.renderer.decode(reply.token_ids) for q, reply in zip(questions, replies, strict=True)}
    (folder / "answers.json").write_text(json.dumps(answers))
    path = os.pathsep.join([str(ROOT), str(folder / "plugins")])
    return {"PYTHONPATH": path, "MIMIC_ANSWERS": str(folder / "answers.json")}


def settings(model: Path, steps: int) -> dict[str, Any]:
    """A small round of this world, as `ImproveConfig` takes it; nothing that is measured stops it early."""
    greedy = {"temperature": 0.0, "max_tokens": 2}
    return {
        "model": str(model),
        "world": {"env": "mimic"},
        "play": {"tasks": 12, "episodes": 8, "sampling": greedy},
        "evaluation": {
            "validation_tasks": 6,
            "test_tasks": 16,
            "sampling": greedy,
            "ood": [{"env": "mimic", "tasks": 4}],
            "ood_margin": 1.0,
        },
        "distill": {
            "objective": "forward_kl",
            "steps": steps,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "save_every": 2,
            "sampling": {"temperature": 1.0, "max_tokens": 2},
            "lora": {"rank": 8},
            "guard": {name: None for name in GuardConfig.model_fields if name != "warmup_steps"},
        },
    }
