"""A training that is asked to stop between two checkpoints loses no step."""

import pytest
import torch

from distill.checkpoint import latest_resumable, read_manifest


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_no_step_is_repeated_after_a_polite_stop(make_trainer, weights, error) -> None:
    unbroken = make_trainer("whole")
    whole = unbroken.fit(validate=float)

    def leave(metrics) -> None:
        if metrics.step == 3:  # a checkpoint is due after steps 2 and 4
            raise error

    first = make_trainer("stopped")
    with pytest.raises(error):
        first.fit(validate=float, on_step=leave)
    assert latest_resumable(first.folder).name == "step-000003"

    steps = []
    second = make_trainer("stopped")
    resumed = second.fit(validate=float, on_step=lambda metrics: steps.append(metrics.step))
    assert steps == [4]
    assert resumed.validation == whole.validation == {0: 0.0, 2: 2.0, 4: 4.0}
    assert read_manifest(resumed.best).id == read_manifest(whole.best).id
    ours, theirs = weights(second), weights(unbroken)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_error_keeps_no_checkpoint_of_its_step(make_trainer) -> None:
    def fail(metrics) -> None:
        if metrics.step == 3:
            raise ValueError("broken")

    trainer = make_trainer("broken")
    with pytest.raises(ValueError, match="broken"):
        trainer.fit(on_step=fail)
    assert latest_resumable(trainer.folder).name == "step-000002"
