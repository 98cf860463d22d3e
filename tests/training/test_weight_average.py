"""`training.ema_decay`: the average of the weights is validated, saved and resumed exactly."""

import contextlib

import pytest
import torch
from torch import Tensor

from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.data.loaders import build_rows
from pocketlm.data.prepare import prepare
from pocketlm.model.loss import batch_loss
from pocketlm.optim import WeightAverage
from tests.support.training import (
    end_equal,
    rows_without_timing,
    run,
    run_stopped_after,
    write_text_and_config,
)

AVERAGED = ("training.ema_decay=0.4", "model.dropout=0")


def weights(path: str = "checkpoints/final.ckpt") -> list[Tensor]:
    """Return the weights that a checkpoint is loaded with."""
    return [*read_checkpoint(path)["state_dict"].values()]


def optimizer_states(path: str = "checkpoints/final.ckpt") -> list[dict[str, Tensor]]:
    return [*read_checkpoint(path)["optimizer_states"][0]["state"].values()]


@pytest.fixture(scope="module")
def averaged_folder(tmp_path_factory):
    """The folder of an uninterrupted run. Tests only read it."""
    folder = tmp_path_factory.mktemp("averaged")
    write_text_and_config(folder)
    with contextlib.chdir(folder):
        run(*AVERAGED)
    return folder


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_the_average_of_a_worked_example(optimizer):
    """A step without a gradient comes first: AdamW begins its state only if there is none.

    The decay is (1 + step) / (10 + step) until that is above the given one.
    """
    p = torch.nn.Parameter(torch.ones(1))
    stepper, average = optimizer([p], lr=0.1), WeightAverage(0.2)
    for step, weight in enumerate([1.0, 2.0, 4.0]):
        p.grad = torch.ones(1) if step else None
        stepper.step()
        p.data.fill_(weight)
        average.update(stepper, step)
    # 2 after step 1, whether there was an average of 1 with a decay of 2 / 11 or not
    before = 2.0 if optimizer is torch.optim.AdamW else 2 / 11 * 1 + 9 / 11 * 2
    expected = 0.2 * before + 0.8 * 4
    assert stepper.state[p][WeightAverage.STATE].item() == pytest.approx(expected, rel=1e-6)
    average.place(stepper, in_model=True)
    assert p.item() == pytest.approx(expected, rel=1e-6)
    average.place(stepper, in_model=False)
    assert p.item() == 4


def test_the_validation_loss_is_that_of_the_weights_in_the_checkpoint(averaged_folder, monkeypatch):
    monkeypatch.chdir(averaged_folder)
    checkpoint = load_checkpoint("checkpoints/final.ckpt")
    data = prepare(checkpoint.config.data)
    rows = build_rows(checkpoint.config, data, "val")
    with torch.no_grad():
        loss = batch_loss(checkpoint.model, rows.__getitems__(range(len(rows))), 0)
    saved = read_checkpoint("checkpoints/final.ckpt")["kit"]["val_loss"]
    assert saved == pytest.approx(loss.item() / (data.val.n_tokens - 1), rel=1e-5)


def test_averaging_changes_nothing_in_training(averaged_folder, folder):
    """The weights to go on with are those of a run without an average."""
    run("model.dropout=0")
    plain = weights()
    with contextlib.chdir(averaged_folder):
        goes_on_with = [state[WeightAverage.STATE] for state in optimizer_states()]
        averages = weights()
    assert not any(torch.equal(a, b) for a, b in zip(plain, averages, strict=True))
    assert {tuple(p.flatten().tolist()) for p in plain} == {
        tuple(p.flatten().tolist()) for p in goes_on_with
    }


@pytest.mark.parametrize("step", [5, 6, 7])
def test_a_stopped_run_ends_as_the_uninterrupted_one(averaged_folder, folder, step):
    """After a validation, a save, and neither."""
    run_stopped_after(step, *AVERAGED)
    run(*AVERAGED)
    assert end_equal("checkpoints", averaged_folder / "checkpoints")
    uninterrupted = rows_without_timing(averaged_folder / "logs/metrics.csv")
    assert rows_without_timing("logs/metrics.csv") == uninterrupted
