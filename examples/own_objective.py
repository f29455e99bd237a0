"""An objective of your own, trained for two steps. Run it: python examples/own_objective.py [MODEL]

`engrain improve WORLD --objective hellinger` uses it too, once the entry point in pyproject.toml is installed.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from engrain import (
    DistillConfig,
    Knowledge,
    LoraSettings,
    SamplingParams,
    Split,
    TransformersEngine,
    from_value,
    register_objective,
    resolve,
    world,
)
from engrain.consolidate import consolidate

TEXT = "Experience from earlier tasks. Follow it:\n- Always write the answer in this form: <answer>12</answer>"


def squared_hellinger(logp_s_PV: Tensor, logp_t_PV: Tensor) -> Tensor:
    """1 - sum_v sqrt(s t), one value a position: bounded, and symmetric in student and teacher."""
    return 1 - (0.5 * (logp_s_PV + logp_t_PV)).exp().sum(-1)


# `from_value` lets autograd find the derivative. To write it out is faster: return (d_P, g_PV) with g = p dd/dp,
# as `distill.objective` does.
hellinger = register_objective("hellinger", from_value(squared_hellinger))


def main(model: str = "smollm2-135m") -> None:
    engine = TransformersEngine(resolve(model), name=model)
    config = DistillConfig(
        objective="hellinger",
        steps=2,
        batch_size=2,
        lora=LoraSettings(rank=4, alpha=8),
        sampling=SamplingParams(max_tokens=8),
    )
    tasks = world("math", {"convention": "answer_tag"}).tasks(Split.TRAIN, 4)
    knowledge = Knowledge(id="by-hand", items=(), text=TEXT, tokens=0)
    with TemporaryDirectory() as folder:
        fit = consolidate(engine, tasks, knowledge, config, Path(folder) / "run")
        for step in fit.history:
            print(f"step {step.step}: {step.objective} {step.divergence:.4f} a token")
        print(f"checkpoint: {fit.last.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
