"""A gate of your own, in a round of your own. Run it: python examples/own_gate.py [MODEL]"""

import sys
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from rich.console import Console

import engrain
from engrain import DistillConfig, EvaluationConfig, ImproveConfig, Judged, PlayConfig, SamplingParams, Student, Verdict


def brief(judged: Judged) -> Verdict:
    """Promote what the statistics promote, unless replies grew by more than a tenth.

    `judged.verdict` is what would hold without you; `judged.test` and `judged.ood` hold every episode behind it.
    """
    before, after = (
        fmean(episode.sampled for episode in judged.test[student]) for student in (Student.BARE, Student.DISTILLED)
    )
    if judged.verdict.promoted and after > 1.1 * before:
        reason = f"replies grew from {before:.0f} to {after:.0f} tokens, although: {judged.verdict.reason}"
        return judged.verdict.model_copy(update={"promoted": False, "reason": reason})
    return judged.verdict


def main(model: str = "smollm2-135m") -> None:
    # As small as a gate can be reached with. smollm2-135m learns nothing here, and its round ends before the gate;
    # qwen2.5-coder-0.5b gets there, in some minutes on two cores.
    short = SamplingParams(max_tokens=16)
    config = ImproveConfig(
        model=model,
        world=engrain.WorldSpec(env="math", options={"convention": "answer_tag"}),
        play=PlayConfig(tasks=8, episodes=4, sampling=short),
        evaluation=EvaluationConfig(validation_tasks=8, test_tasks=8, sampling=short),
        distill=DistillConfig(objective="forward_kl", steps=1, batch_size=4, sampling=short),
    )
    engine = engrain.TransformersEngine(engrain.resolve(model), name=model)
    with (
        TemporaryDirectory() as folder,
        engrain.Store.open(f"{folder}/book.db") as store,
        engrain.ConsoleListener(Console(stderr=True)) as listener,
    ):
        record = engrain.open_round(store, config)
        result = engrain.Round(store, engine, config, record, Path(folder, "run"), listener, gate=brief).run()
    print(f"{result.status}: {result.reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])
