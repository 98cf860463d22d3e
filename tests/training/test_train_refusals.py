"""Runs that cannot be: each is refused in one sentence, and no file of an earlier run is lost."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.checkpoint.runs import Run
from pocketlm.errors import UserError
from pocketlm.hardware import memory
from pocketlm.hardware.memory import Room
from tests.support.training import (
    STREAM,
    TINY,
    checkpoint_bytes,
    end_equal,
    run,
    run_stopped_after,
    write_text_and_config,
)

ROOT = Path(__file__).parents[2]
CUDA = ["hardware.accelerator=cuda", "data.path=text.txt", "data.tokenizer=byte"]
MISTAKES = {
    "no config": (["--config", "none.yaml"], "there is no config none.yaml"),
    "misspelt key": (["--config", "config.yaml", "training.lrr=1"], "did you mean lr"),
    "no data": (["--config", "config.yaml", "data.path=missing.txt"], "missing.txt is not a file"),
    "misspelt corpus": (["--config", "config.yaml", "data.source=wikki"], "did you mean wiki"),
    "no device": (["--config", "config.yaml", *CUDA], "this machine has cpu"),
}


def assert_one_sentence(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_status_2(folder, forked_commands, mistake):
    arguments, message = MISTAKES[mistake]
    if mistake == "no device" and torch.cuda.is_available():
        arguments, message = [a.replace("cuda", "mps") for a in arguments], "this machine has"
    assert_one_sentence(forked_commands.run(*arguments), message)


def test_the_script_itself_exits_with_the_sentence_and_status_2(folder):
    arguments, message = MISTAKES["no config"]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments], capture_output=True, text=True
    )
    assert_one_sentence(done, message)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["hardware.num_workers=60"],
            "error: text.txt has too few documents to train on for 60 workers; "
            "lower hardware.num_workers",
        ),
        (["data.mixture=[{path: text.txt}]"], "path 'text.txt' and mixture are both set"),
    ],
    ids=["too many workers", "path and mixture"],
)
def test_a_stream_that_cannot_be_is_refused_in_one_sentence(
    folder, forked_commands, options, message
):
    done = forked_commands.run("--config", "config.yaml", *TINY, *STREAM, *options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert not list(Path("checkpoints").glob("*.ckpt"))


def test_a_finished_run_and_one_with_another_config_are_refused_and_left_alone(finished):
    before = checkpoint_bytes()
    message = r"finished: 12 of 12 steps; raise training.max_steps.*--fresh.*run.name=NAME"
    with pytest.raises(UserError, match=message):
        run()
    with pytest.raises(UserError, match=r"another config \(training.lr: 0.004 -> 0.001\).*--fresh"):
        run("training.lr=1e-3")
    assert checkpoint_bytes() == before


def test_a_run_does_not_resume_on_a_text_that_has_changed(folder):
    run_stopped_after(4)
    (folder / "text.txt").write_text("something else. " * 100)
    with pytest.raises(UserError, match=r"another config \(the tokens to train on\)"):
        run()


LINE_STREAM = ["data.streaming=true", "data.separator=line"]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["data.eos=false", "sampling.prompts=['']"],
            "sampling.prompts holds ''.*no token begins a document",
        ),
        (["training.max_epochs=1", *LINE_STREAM], "max_epochs is 1.*stream"),
        (["data.tokenizer=seen-bytes", *LINE_STREAM], "streaming.*seen-bytes"),
    ],
    ids=["empty prompt", "epochs of a stream", "vocabulary of a stream"],
)
def test_a_run_that_no_data_allows_is_refused_in_a_sentence(folder, options, message):
    with pytest.raises(UserError, match=message):
        run(*options)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_a_run_cannot_have_the_name_of_a_folder_of_tensorboard_files(folder, name):
    with pytest.raises(UserError, match=f"'{name}' is the name of a folder of TensorBoard files"):
        run(f"run.name={name}")


@pytest.mark.parametrize(
    "path, message",
    [("gone.yaml", "cannot read the cases gone.yaml"), ("long.yaml", "'a' has 36 tokens")],
)
def test_probe_cases_that_cannot_be_scored_are_refused_before_the_first_step(folder, path, message):
    Path("long.yaml").write_text(
        "[{name: a, prompt: much longer than a row of sixteen, target: ' x'}]"
    )
    with pytest.raises(UserError, match=message):
        run(f"training.probe_cases=[{path}]")
    assert not list(Path("checkpoints").glob("*.ckpt"))


def test_a_second_process_in_the_same_folder_is_refused(folder):
    with (
        Run("").lock(),
        pytest.raises(UserError, match="process .* is training in checkpoints"),
    ):
        run()


@pytest.mark.parametrize(
    "option, message",
    [
        (
            "hardware.compile=on",
            r"hardware.compile: False -> True.*--change hardware.compile=VALUE",
        ),
        ("training.precision=bf16-mixed", r"training.precision: '32-true' -> 'bf16-mixed'"),
        ("model.dropout=0.2", r"model.dropout: 0.1 -> 0.2"),
    ],
)
def test_a_run_does_not_resume_as_another(stopped_folder, monkeypatch, option, message):
    """Each of these ended with status 0 and other weights than the uninterrupted run."""
    monkeypatch.chdir(stopped_folder)
    before = checkpoint_bytes()
    with pytest.raises(UserError, match=message):
        run(option)
    assert checkpoint_bytes() == before


@pytest.fixture(scope="module")
def stopped_folder(tmp_path_factory):
    """The working directory of a run that was stopped at step 4. Tests only read it."""
    path = tmp_path_factory.mktemp("stopped")
    write_text_and_config(path)
    with contextlib.chdir(path):
        run_stopped_after(4)
    return path


def test_auto_is_what_it_was_however_fast_the_machine_is_now(
    folder, finished_folder, monkeypatch, capsys
):
    """compile=auto depends on a timed matmul, which busy neighbours slow down."""
    run_stopped_after(4, "training.precision=auto")
    precision = read_checkpoint("checkpoints/last.ckpt")["kit"]["hardware"]["precision"]
    other = {"32-true": "bf16-mixed", "bf16-mixed": "32-true"}[precision]
    monkeypatch.setattr(
        "pocketlm.hardware.devices.multiplies_bfloat16", lambda _: other != "32-true"
    )
    monkeypatch.setattr("pocketlm.checkpoint.changes.multiplies_bfloat16", lambda _: True)
    monkeypatch.setattr("train.compilable_seconds", lambda *_: 1e9)
    run("training.precision=auto")
    assert f"{precision}: as when this run began" in capsys.readouterr().err
    resolved = read_checkpoint("checkpoints/final.ckpt")["kit"]["hardware"]
    assert (resolved["precision"], resolved["compile"]) == (precision, False)
    if precision == "32-true":
        assert end_equal("checkpoints", finished_folder / "checkpoints")


def test_a_micro_batch_that_was_chosen_is_kept_whatever_is_free_now(folder, monkeypatch):
    auto = "training.micro_batch_size=auto"
    run_stopped_after(2, auto)
    chosen = read_checkpoint("checkpoints/last.ckpt")["kit"]["config"]["training"]
    monkeypatch.setattr(memory, "available_memory", lambda _: Room(10**12, 1, "this machine has"))
    run_stopped_after(4, auto)
    again = read_checkpoint("checkpoints/last.ckpt")["kit"]["config"]["training"]
    for key in ("micro_batch_size", "grad_accum_steps"):
        assert again[key] == chosen[key]


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_goes_on_with_its_threads_or_says_that_it_does_not(
    folder, monkeypatch, capsys, two_threads, asked
):
    run_stopped_after(2)
    torch.set_num_threads(1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_stopped_after(3)
    expected = "threads 2 -> 1" if asked else "using 2 threads, as the run did"
    assert expected in capsys.readouterr().err
    assert torch.get_num_threads() == 1 + (not asked)


def test_memory_is_looked_at_again_once_the_vocabulary_is_known(folder, monkeypatch):
    sizes = []

    def run_bytes(config, *_):
        sizes.append(config.model.vocab_size)
        return 10**18 * (sizes[-1] > 1)

    monkeypatch.setattr(memory, "run_bytes", run_bytes)
    with pytest.raises(UserError, match=r"needs about 1,000,000,000 GB of memory"):
        run()
    assert sizes[0] == 1 and not Path("checkpoints").exists()


def test_memory_that_runs_out_in_a_step_ends_in_advice(folder, monkeypatch):
    def training_step(self, *_):
        raise MemoryError

    monkeypatch.setattr(train.LitTransformer, "training_step", training_step)
    with pytest.raises(UserError, match=r"memory has run out .*training\.micro_batch_size=2"):
        run()


def test_the_same_text_by_another_path_is_the_same_run(folder, finished_folder):
    run_stopped_after(4)
    Path("elsewhere").mkdir()
    Path("text.txt").rename("elsewhere/text.txt")
    run("data.path=./elsewhere/text.txt")
    assert end_equal("checkpoints", finished_folder / "checkpoints")


def test_a_warm_up_that_never_ends_gets_a_sentence(folder, capsys):
    run("training.max_steps=2", "training.warmup_steps=3")
    message = "training.warmup_steps is 3 and the run has 2 steps: the learning rate never reaches"
    assert message in capsys.readouterr().err
