"""Ways for a run to end early: stop signals, a reader of stderr that has gone, Slurm's warning."""

import ast
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.trainer.connectors import callback_connector

from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.config.loading import load_config
from pocketlm.errors import UserError
from pocketlm.hardware.devices import Hardware
from pocketlm.startup import STOP_SIGNALS, StopSignals, fast_imports
from pocketlm.training.loop import make_trainer
from pocketlm.training.signals import requeue
from tests.support.training import TINY, run, signal_after

ROOT = Path(__file__).parents[2]
COMMAND = ["--config", "config.yaml", *TINY]
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NODELIST": "here",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stub of scontrol on the PATH; the file has the arguments of its calls."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls.txt\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return tmp_path / "calls.txt"


# ---- signals to a run ----


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU])
def test_a_stop_signal_saves_the_step_and_is_the_exit_status(folder, forked_commands, number):
    """SIGINT and SIGTERM are in test_train_resume.py, SIGUSR1 is below."""
    done = forked_commands.run(*COMMAND, interrupt=(4, number))
    assert done.returncode == 128 + number
    assert read_checkpoint("checkpoints/last.ckpt")["global_step"] == 4


def test_sigusr1_under_slurm_saves_the_step_and_requeues_once(
    folder, forked_commands, scontrol, monkeypatch
):
    """Lightning wrote hpc_ckpt_1.ckpt within the step, and every later new run began with it."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    (folder / "hpc_ckpt_1.ckpt").write_text("not a checkpoint")
    done = forked_commands.run(*COMMAND, interrupt=(4, signal.SIGUSR1))
    assert done.returncode == 128 + signal.SIGUSR1, done.stderr
    assert scontrol.read_text() == "requeue 77\n"
    assert read_checkpoint("checkpoints/last.ckpt")["global_step"] == 4
    assert [path.name for path in folder.glob("hpc_ckpt*")] == ["hpc_ckpt_1.ckpt"]


@pytest.mark.parametrize(
    "environment, call",
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7; rm"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "1"}, None),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "7_2"),
    ],
    ids=["outside Slurm", "no number", "second process", "job of an array"],
)
def test_the_job_that_is_requeued(environment, call, scontrol, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    requeue()
    calls = scontrol.read_text() if scontrol.exists() else None
    assert calls == (call and f"requeue {call}\n")


def test_a_requeue_that_fails_is_said(scontrol, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (scontrol.parent / "bin/scontrol").write_text("#!/bin/sh\necho no such job >&2\nexit 1\n")
    requeue()
    message = "scontrol requeue 7 failed (no such job): submit the job again yourself"
    assert message in capsys.readouterr().err


def test_a_signal_in_the_last_step_leaves_a_finished_run(folder):
    with signal_after(12):
        run()
    assert Path("checkpoints/loss.png").exists()


# ---- stderr ----


@pytest.mark.parametrize(
    "stderr, status, step", [("pipe", 141, 2), ("closed", 0, 12), ("full", 0, 12)]
)
def test_a_stderr_that_fails_costs_no_step(folder, forked_commands, stderr, status, step):
    """A pipe without a reader is noticed at the next line, which is that of step 2."""
    program = "tests/programs/train_with_stderr.py"
    done = forked_commands.run(stderr, *COMMAND, program=program)
    assert done.returncode == status
    assert read_checkpoint("checkpoints/last.ckpt")["global_step"] == step


# ---- before the training ----


def test_the_handler_is_installed_before_the_long_imports():
    statements = ast.parse((ROOT / "train.py").read_text()).body
    first, start = statements[1:3]  # after the docstring
    assert isinstance(first, ast.ImportFrom) and first.module == "pocketlm.startup"
    assert ast.unparse(start) == "if __name__ == '__main__':\n    begin_run()"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_imports_ends_the_command_without_a_traceback(number):
    program = (
        "import sys, time; from pocketlm.startup import begin_run\n"
        "begin_run(); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == 128 + number
    assert stderr == f"stopped by {signal.Signals(number).name}\n"


def test_ctrl_c_during_the_imports_of_another_command_is_status_130(capsys):
    with pytest.raises(SystemExit) as stop, fast_imports():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


# ---- the handler ----


@pytest.fixture
def signals(monkeypatch):
    """A handler that is not installed, and whose immediate exits are exceptions."""

    def leave(status):
        raise SystemError(status)

    monkeypatch.setattr("pocketlm.startup.os._exit", leave)
    return StopSignals()


def test_a_signal_before_the_first_step_ends_the_command_and_a_second_one_at_once(signals):
    signals.phase = "preparing"
    with pytest.raises(SystemExit) as stop:
        signals.receive(signal.SIGTERM)
    assert stop.value.code == 143
    with pytest.raises(SystemError, match="130"):
        signals.receive(signal.SIGINT)


def test_a_closed_terminal_and_a_batch_system_may_repeat_themselves(signals):
    """A shell and the kernel both send SIGHUP; Slurm sends SIGTERM after its warning."""
    signals.phase = "training"
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        signals.receive(number)
    assert signals.received == signal.SIGHUP
    with pytest.raises(SystemError, match="143"):
        signals.receive(signal.SIGTERM)


def test_a_signal_after_the_work_is_done_changes_nothing(signals):
    with signals.listening():
        pass
    signals.receive(signal.SIGTERM)
    assert signals.phase == "finished" and not signals.urgent > 1


def test_a_worker_process_ends_with_its_run_and_asks_for_nothing(signals):
    signals.process = -1  # the handler was installed by another process
    signals.phase = "preparing"
    with pytest.raises(SystemError, match="143"):
        signals.receive(signal.SIGTERM)
    signals.phase = "training"
    signals.receive(signal.SIGTERM)
    assert not signals.received


def test_the_handlers_are_as_before_after_a_run(signals):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with signals.listening():
        assert signal.getsignal(signal.SIGTERM) == signals._handle
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_run_under_nohup_keeps_to_ignore_sighup(signals):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.listening():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- what Lightning does by itself ----


def trainer_of(folder: Path, callbacks: list[L.Callback]) -> L.Trainer:
    config = load_config(folder / "config.yaml", TINY)
    return make_trainer(config, Hardware("cpu", "32-true", False, {}), callbacks)


def test_lightning_installs_no_handler(folder):
    trainer = trainer_of(folder, [])
    before = signal.getsignal(signal.SIGTERM)
    trainer._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_installed_package_adds_no_callback(folder, monkeypatch):
    monkeypatch.setattr(callback_connector, "_load_external_callbacks", lambda _: [L.Callback()])
    own = L.Callback()
    assert trainer_of(folder, [own]).callbacks == [own]


def test_a_variable_that_would_change_the_trainer_is_refused(folder, monkeypatch):
    monkeypatch.setenv("PL_TRAINER_MAX_TIME", "00:00:00:01")
    with pytest.raises(UserError, match="PL_TRAINER_MAX_TIME would change"):
        trainer_of(folder, [])
