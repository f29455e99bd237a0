"""The demo's round: small enough for two cores, real in every part.

The world is two-term sums whose answer counts only as `<answer>12</answer>`; the prompt does not say so, the feedback
after an episode does. The objective is forward KL on the student's own samples, because the student gives the
teacher's opening token almost no mass: reverse KL (the paper's, `--objective reverse_kl`) weighs each token by the
student's own probability and finds nothing to pull on. Settings were chosen on validation tasks.
"""

from __future__ import annotations

from agent.episode import SamplingParams
from distill.config import DistillConfig, LoraSettings, ObjectiveName
from engrain.config import EvaluationConfig, ExtractConfig, ImproveConfig, OodSpec, PlayConfig, WorldSpec
from envs.base import Split

MODEL = "qwen2.5-coder-0.5b"


def demo_config(*, model: str = MODEL, objective: ObjectiveName = "forward_kl", seed: int = 0) -> ImproveConfig:
    """Settings of `engrain improve --demo`."""
    return ImproveConfig(
        model=model,
        world=WorldSpec(env="math", options={"convention": "answer_tag"}),
        seed=seed,
        play=PlayConfig(tasks=256, episodes=12, sampling=SamplingParams(temperature=0.7, max_tokens=32)),
        extract=ExtractConfig(mode="examples", episodes=12, budget_tokens=128, candidates=4),
        evaluation=EvaluationConfig(
            validation_tasks=32,
            test_tasks=96,
            looks=1,  # its figures are published: all tasks are played, and intervals are plain ones
            sampling=SamplingParams(temperature=0.0, max_tokens=32),
            ood=(
                OodSpec(env="math", options={"convention": "answer_tag"}, split=Split.OOD, tasks=48),
                OodSpec(
                    env="textworld",
                    options={"game": "coin_collector", "level": 1, "max_turns": 5},
                    split=Split.TEST,
                    tasks=16,
                ),
            ),
            ood_margin=0.1,
        ),
        distill=DistillConfig(
            objective=objective,
            steps=12,
            batch_size=16,
            learning_rate=2e-4,
            warmup_steps=2,
            lora=LoraSettings(rank=16, alpha=32),
            sampling=SamplingParams(temperature=1.0, max_tokens=32),
            save_every=4,
            seed=seed,
        ),
    )
