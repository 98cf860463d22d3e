"""`training.dropout_from`: dropout begins at a step, and a resumed run agrees."""

import torch

from tests.support.training import (
    are_equal,
    end_equal,
    run,
    run_stopped_after,
    weights_and_optimizer,
)

KEPT = ("training.save_every_steps=1", "training.keep_checkpoints=0")
LATE = ("model.dropout=0.3", "training.dropout_from=0.5")


def at_step(step: int, name: str) -> list[torch.Tensor]:
    return weights_and_optimizer(f"checkpoints/{name}/step-{step:08d}.ckpt")


def test_until_its_step_a_run_is_one_without_dropout_and_then_it_is_not(folder):
    run(*KEPT, *LATE, "run.name=late")
    run(*KEPT, "model.dropout=0", "run.name=without")
    same = [are_equal(at_step(n, "late"), at_step(n, "without")) for n in range(1, 13)]
    assert same == [True] * 6 + [False] * 6


def test_a_run_resumes_on_either_side_of_the_step_exactly(folder):
    run(*LATE, "run.name=whole")
    for step in (3, 6, 8):
        run_stopped_after(step, *LATE, f"run.name=stopped{step}")
        run(*LATE, f"run.name=stopped{step}")
        assert end_equal("checkpoints/whole", f"checkpoints/stopped{step}")
