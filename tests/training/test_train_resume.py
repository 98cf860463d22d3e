"""An interrupted run, resumed by the same command, ends as the uninterrupted one, bit by bit."""

import contextlib
import math
import signal
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from pocketlm.checkpoint.format import read_checkpoint
from tests.support.training import (
    LINES,
    STREAM,
    TINY,
    checkpoint_bytes,
    end_equal,
    rows_without_timing,
    run,
    run_stopped_after,
    write_text_and_config,
)

COMMAND = ("--config", "config.yaml", *TINY)
KILL_AFTER_8 = (8, signal.SIGKILL)
PADDED = "data.packing=padded"
MIXTURE = [
    "data.path=null",
    "data.mixture=[{path: text.txt, separator: line, weight: 2}, "
    "{path: other.txt, separator: blank_line, weight: 1}]",
    "data.val_share=0.2",
]


@pytest.fixture(scope="module")
def whole_folders(tmp_path_factory, finished_folder):
    """The working directory of an uninterrupted run of each optimizer. Tests only read them."""
    folder = tmp_path_factory.mktemp("adamw")
    write_text_and_config(folder)
    with contextlib.chdir(folder):
        run("training.optimizer=adamw")
    return {"muon": finished_folder, "adamw": folder}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_after_any_step_ends_as_the_uninterrupted_one(
    folder, whole_folders, optimizer, workers
):
    """With dropout, accumulation, two epochs, and stops on and off validations, saves and epochs.

    The uninterrupted run has no data workers: they do not change the order of the rows.
    """
    options = [f"training.optimizer={optimizer}", f"hardware.num_workers={workers}"]
    whole = whole_folders[optimizer]
    for step in range(1, 12) if workers == 0 and optimizer == "muon" else (5, 7):
        name = f"stopped{step}"
        run_stopped_after(step, f"run.name={name}", *options)
        assert read_checkpoint(f"checkpoints/{name}/last.ckpt")["global_step"] == step
        run(f"run.name={name}", *options)
        assert end_equal(f"checkpoints/{name}", whole / "checkpoints"), step
        resumed = rows_without_timing(f"logs/{name}/metrics.csv")
        assert resumed == rows_without_timing(whole / "logs/metrics.csv"), step


def test_a_killed_process_resumes_from_its_last_save_and_ends_the_same(
    folder, finished_folder, forked_commands
):
    """SIGKILL leaves no time for anything; the same command in a new process must be enough."""
    killed = forked_commands.run(*COMMAND, "run.name=killed", interrupt=KILL_AFTER_8)
    assert killed.returncode == -signal.SIGKILL
    again = forked_commands.run(*COMMAND, "run.name=killed")
    assert again.returncode == 0, again.stderr
    assert "resuming from checkpoints/killed/last.ckpt at step 6" in again.stderr
    assert end_equal("checkpoints/killed", finished_folder / "checkpoints")


@pytest.mark.slow
def test_a_compiled_run_is_compiled_once_and_resumes_exactly(folder, two_threads):
    """Through validations, accumulation and dropout.

    Compiled code draws dropout's masks in its own way. Two threads must not add in any order.
    """
    graphs = []
    for name, stop in (("whole", None), ("stopped", 7), ("stopped", None)):
        torch._dynamo.reset()  # as in a new process
        counters.clear()
        options = [f"run.name={name}", "hardware.compile=on", "model.n_layers=1"]
        if stop:
            run_stopped_after(stop, *options)
        else:
            run(*options)
        graphs.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"], counters
    assert graphs == [1, 1, 1]
    assert end_equal("checkpoints/stopped", "checkpoints/whole")
    stopped, whole = (
        rows_without_timing(f"logs/{name}/metrics.csv") for name in ("stopped", "whole")
    )
    assert stopped == whole


def stream_positions(name: str) -> list[dict]:
    """Return the saved position in the stream of each data worker."""
    loops = read_checkpoint(f"checkpoints/{name}.ckpt")["loops"]
    [loader] = loops["fit_loop"]["state_dict"]["combined_loader"]
    return loader["ranks"][0]["places"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        STREAM,
        [*STREAM, PADDED, "hardware.num_workers=2"],
        [*LINES, PADDED],
        MIXTURE,
        [*MIXTURE, PADDED, "hardware.num_workers=2"],
    ],
    ids=["stream", "padded stream, 2 workers", "padded", "mixture", "padded mixture, 2 workers"],
)
def test_a_killed_run_on_any_kind_of_rows_ends_as_the_uninterrupted_one(
    folder, forked_commands, options, capsys
):
    """Across the end of an epoch, and from the middle of a shuffled block.

    Another process resumes the run than the one that was killed.
    """
    (folder / "other.txt").write_text("".join(f"{i} and {i}\nare {i + i}.\n\n" for i in range(20)))
    run("run.name=whole", *options)
    killed = forked_commands.run(*COMMAND, "run.name=killed", *options, interrupt=KILL_AFTER_8)
    assert killed.returncode == -signal.SIGKILL
    capsys.readouterr()
    if "data.streaming=true" in options:
        before, after = stream_positions("killed/last"), stream_positions("whole/final")
        assert [position["epoch"] for position in before] < [
            position["epoch"] for position in after
        ]
        assert any(0 < position["row"] < 5 for position in before)
    doubled = {"weight: 2": "weight: 4", "weight: 1": "weight: 2"}
    for weight, twice in doubled.items():  # the same shares, and so the same run
        options = [option.replace(weight, twice) for option in options]
    run("run.name=killed", *options)
    assert "resuming from checkpoints/killed/last.ckpt at step 6" in capsys.readouterr().err
    assert end_equal("checkpoints/killed", "checkpoints/whole")


@pytest.mark.slow
def test_a_stream_with_other_workers_is_refused_and_nothing_is_lost(folder, forked_commands):
    """The original command then still resumes and comes to the same end."""
    options = [*STREAM, "hardware.num_workers=2"]
    run("run.name=whole", *options)
    killed = forked_commands.run(*COMMAND, "run.name=killed", *options, interrupt=KILL_AFTER_8)
    assert killed.returncode == -signal.SIGKILL
    before = checkpoint_bytes("checkpoints/killed")
    refused = forked_commands.run(*COMMAND, "run.name=killed", *STREAM)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert refused.stderr.splitlines()[-1] == (
        "error: a stream resumes only with the workers that it began with: "
        "set hardware.num_workers to 2, not 0"
    )
    assert checkpoint_bytes("checkpoints/killed") == before
    run("run.name=killed", *options)
    assert end_equal("checkpoints/killed", "checkpoints/whole")
    killed_rows, whole_rows = (
        rows_without_timing(f"logs/{name}/metrics.csv") for name in ("killed", "whole")
    )
    assert killed_rows == whole_rows


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(folder, capsys):
    run_stopped_after(8)
    for name in ("last.ckpt", "step-00000008.ckpt"):
        path = Path("checkpoints") / name
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[: len(data) // 2])
    run()
    output = capsys.readouterr().err
    assert "checkpoints/last.ckpt is truncated" in output
    assert "resuming from checkpoints/step-00000006.ckpt at step 6" in output


def test_a_finished_run_resumes_with_a_larger_max_steps(folder, capsys):
    run("training.max_steps=6")
    run("training.max_steps=12")
    assert "training.max_steps 6 -> 12" in capsys.readouterr().err
    assert read_checkpoint("checkpoints/final.ckpt")["global_step"] == 12


def test_epochs_are_the_steps_of_so_many_passes_and_may_be_raised(folder):
    text = Path("text.txt").read_bytes()
    # a byte is a token, with an eos at both ends; the last twentieth is validation
    tokens = len(text) - len(text) // 20 + 2
    steps = [math.ceil(epochs * math.ceil((tokens - 1) / 16) / 8) for epochs in (0.5, 2)]
    run("run.name=epochs", "training.max_epochs=0.5", "training.schedule=constant")
    assert read_checkpoint("checkpoints/epochs/final.ckpt")["global_step"] == steps[0] < steps[1]
    run("run.name=epochs", "training.max_epochs=2", "training.schedule=constant")
    run("run.name=steps", f"training.max_steps={steps[1]}", "training.schedule=constant")
    assert end_equal("checkpoints/epochs", "checkpoints/steps")
