"""sweep.py: which runs it starts, and what it makes of stops, failures and mistakes.

Runs are those of a stand-in for train.py, whose losses are known; one test has real ones.
"""

import csv
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import optuna
import pytest

import sweep
import train
from pocketlm.checkpoint.runs import Run
from pocketlm.errors import UserError
from pocketlm.sweeps import runs
from pocketlm.sweeps.search import Search, Watch
from tests.support.training import end_equal, read_events

BASE = ["--config", "tiny.yaml", "training.max_steps=40"]


def rows() -> list[dict[str, str]]:
    with Path("sweeps/tiny/runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def trained() -> Counter[str]:
    """How often each step of each run was taken."""
    return Counter(Path("trained.txt").read_text().splitlines())


def trials() -> list[optuna.trial.FrozenTrial]:
    backend = optuna.storages.journal.JournalFileBackend("sweeps/tiny/study.journal")
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name="tiny", storage=storage).trials


def test_a_grid_trains_every_combination_with_every_seed_and_names_the_winner(
    reporting_folder, capsys
):
    assert sweep.main([*BASE, "training.lr=1e-3,1e-2", "model.d_ff=16,32", "--seeds", "2"]) == 0
    assert len(rows()) == 8 and set(trained().values()) == {1} and len(trained()) == 8 * 40
    out = capsys.readouterr().out
    # log10 of the rate + 2 is -1 and 0; + seed/1000 + 1/40, of seeds 42 and 43: 0.0675 ± 0.0005
    assert "0.0675 ± 0.0005" in out and "1.0675 ± 0.0005" in out
    assert "No winner" in out and "training.lr=1e-2 model.d_ff=32 [+0.0000, +0.0000]" in out
    assert "training.lr=1e-2 is the largest value tried" in out
    assert Path("sweeps/tiny/loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_tie_the_winner_is_named(folder, capsys):
    assert sweep.main([*BASE, "training.lr=1e-3,1e-2,1e-1", "--seeds", "3"]) == 0
    assert "winner: training.lr=1e-2, below every other" in capsys.readouterr().out


def test_hyper_parameters_go_to_tensorboard(reporting_folder):
    sweep.main([*BASE, "training.lr=1e-3,1e-2"])
    events = read_events("sweeps/tiny/tensorboard/tiny-002-s42")
    assert events.Scalars("last/loss")[0].value == pytest.approx(0.067)
    data = events.PluginTagToContent("hparams")
    assert b"training.lr" in b"".join(data.values())


def test_optuna_reads_the_storage(folder):
    sweep.main([*BASE, "training.lr=1e-3,1e-2"])
    states = [(trial.state.name, trial.params, round(trial.value, 4)) for trial in trials()]
    assert states == [
        ("COMPLETE", {"training.lr": "1e-3"}, 1.067),
        ("COMPLETE", {"training.lr": "1e-2"}, 0.067),
    ]


@pytest.fixture
def searches(monkeypatch):
    """The searches that sweep.py makes."""
    made = []
    monkeypatch.setattr(sweep, "Search", lambda *args: made.append(Search(*args)) or made[-1])
    return made


@pytest.fixture
def interruptible():
    """Receive SIGINT, which a shell has a command in the background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_goes_on_in_the_middle_of_its_run(folder, monkeypatch, number):
    monkeypatch.setenv("KILL_SIGNAL", str(int(number)))
    monkeypatch.setattr("pocketlm.sweeps.search.Watch.seconds", 7.0)
    Path("kill.txt").write_text("tiny-002-s42 15")
    command = [*BASE, "training.lr=1e-3,1e-2"]
    with pytest.raises(SystemExit) as stop:
        sweep.main(command)
    assert stop.value.code == 128 + number
    assert trained()["tiny-002-s42 15"] == 1 and not trained()["tiny-002-s42 16"]
    assert sweep.main(command) == 0
    assert set(trained().values()) == {1} and len(trained()) == 80
    assert [row["finished"] for row in rows()] == ["1", "1"]
    assert [float(row["seconds"]) for row in rows()] == [7, 14]  # of two processes
    log = Path("sweeps/tiny/logs/tiny-001-s42.txt").read_text()
    assert "session" in log  # one of its own: Ctrl-C does not reach the run twice
    assert f"session {os.getsid(0)}\n" not in log
    assert sweep.main(command) == 0 and len(trained()) == 80  # prints the table again


def test_a_killed_sweep_goes_on_in_the_middle_of_its_run(folder, forked_commands):
    """Also with what a kill may leave in the storage: a lock, and half a line."""
    Path("kill.txt").write_text("tiny-002-s42 15")
    program, command = "tests/programs/sweep_of_fake_runs.py", ["sweep", *BASE]
    command.append("training.lr=1e-3,1e-2")
    environment = os.environ | {"KILL_SIGNAL": str(int(signal.SIGKILL))}
    done = forked_commands.run(*command, program=program, environment=environment)
    assert done.returncode == -signal.SIGKILL
    journal = Path("sweeps/tiny/study.journal")
    journal.write_bytes(journal.read_bytes() + b'{"op_code":')
    Path("sweeps/tiny/study.journal.lock").symlink_to("study.journal")
    assert sweep.main(command[1:]) == 0
    assert set(trained().values()) == {1} and len(trained()) == 80
    assert len(trials()) == 2


def test_a_run_that_was_finished_and_not_recorded_is_not_trained_again(folder):
    command = [*BASE, "training.lr=1e-3,1e-2"]
    sweep.main(command)
    Path("sweeps/tiny/study.journal").unlink()
    assert sweep.main(command) == 0
    assert len(trained()) == 80 and [row["finished"] for row in rows()] == ["1", "1"]


def test_a_finished_run_of_another_length_is_not_taken_for_one_of_the_sweep(folder):
    command = ["--config", "tiny.yaml", "training.lr=1e-3,1e-2"]
    sweep.main([*command, "training.max_steps=60"])
    shutil.rmtree("sweeps")
    assert sweep.main([*command, "training.max_steps=40"]) == sweep.FAILED
    assert {row["problem"] for row in rows()} == {
        f"checkpoints/tiny-00{n}-s42 is a run of 60 steps, not 40; remove it or give another "
        "run.name"
        for n in (1, 2)
    }


def test_more_seeds_train_only_the_new_ones(folder):
    command = [*BASE, "training.lr=1e-3,1e-2"]
    sweep.main(command)
    assert sweep.main([*command, "--seeds", "2"]) == 0
    assert set(trained().values()) == {1} and len(rows()) == 4


def test_a_failed_run_is_shown_and_not_the_winner(folder, capsys):
    assert sweep.main([*BASE, "training.lr=1e-2,1e-3,10", "--seeds", "2"]) == sweep.FAILED
    captured = capsys.readouterr()
    assert "2 failed: the training loss is not finite at step 1" in captured.out
    assert "winner: training.lr=1e-2" in captured.out
    assert [row["problem"] != "" for row in rows()] == [False] * 4 + [True] * 2
    before = trained()
    sweep.main([*BASE, "training.lr=1e-2,1e-3,10", "--seeds", "2"])
    assert trained() == before  # it would end in the same way again


def test_a_run_that_failed_for_want_of_something_is_tried_again(folder, monkeypatch, capsys):
    command = [*BASE, "training.lr=1e-3,1e-2"]
    with monkeypatch.context() as broken:
        broken.setattr(runs, "TRAIN", (sys.executable, "-c", "exit('error: the disk is full')"))
        assert sweep.main(command) == sweep.FAILED
    assert "exit status 1: error: the disk is full" in capsys.readouterr().out
    assert sweep.main(command) == 0
    assert [row["finished"] for row in rows()] == ["1", "1"]


def test_a_run_that_a_killed_sweep_left_is_waited_for(folder, monkeypatch, capsys):
    run = Run("tiny-001-s42")
    holder = run.lock()
    holder.__enter__()
    monkeypatch.setattr(runs.time, "sleep", lambda _: holder.__exit__(None, None, None))
    runs.wait_for_release(run)
    assert capsys.readouterr().err.startswith("waiting: process")


# ---- the budget ----


def test_a_run_that_does_not_fit_the_budget_is_not_started(folder, monkeypatch, capsys):
    """Each run takes 10 s by the stop-watch, so that 25 s hold two."""
    monkeypatch.setattr("pocketlm.sweeps.search.Watch.seconds", 10.0)
    command = [*BASE, "training.lr=1e-4,1e-3,1e-2", "--budget"]
    assert sweep.main([*command, "25s"]) == 0
    captured = capsys.readouterr()
    assert "expected to take 0:10, and 0:05 of the budget of 0:25 are left" in captured.err
    assert len(rows()) == 2 and "not trained" in captured.out
    assert sweep.main([*command, "31s"]) == 0 and len(rows()) == 3


def test_a_budget_that_ends_during_a_run_saves_it(folder, monkeypatch, capsys):
    command = [*BASE, "training.lr=1e-3,1e-2", "--budget"]
    with monkeypatch.context() as slow:
        slow.setattr("pocketlm.sweeps.search.Watch.seconds", 100.0)
        assert sweep.main([*command, "99s"]) == 0
    assert "the budget ended during a run" in capsys.readouterr().err
    assert 1 <= len(trained()) < 40
    monkeypatch.setattr("pocketlm.sweeps.search.Watch.seconds", 1.0)
    assert sweep.main([*command, "10m"]) == 0
    assert set(trained().values()) == {1} and len(trained()) == 80
    assert [float(row["seconds"]) for row in rows()] == [101, 1]


def test_the_time_of_a_run_in_progress_survives_a_kill(folder, monkeypatch, searches):
    sweep.main([*BASE, "training.lr=1e-3,1e-2"])
    study, before = searches[0].study, searches[0].study.seconds
    monkeypatch.setattr("pocketlm.sweeps.search.SAVE_TIME_EVERY", -1)
    monkeypatch.setattr("pocketlm.sweeps.search.Watch.seconds", 7.0)
    assert not Watch(study, (2, 43), searches[0].clock, rung=None).should_stop()
    assert study.seconds == before + 7


def test_a_budget_that_fits_no_run_is_refused(folder, monkeypatch):
    monkeypatch.setattr("pocketlm.sweeps.search.estimated_seconds", lambda *_: 3600.0)
    with pytest.raises(UserError, match=r"20:00 is less than one run is expected to take"):
        sweep.main([*BASE, "training.lr=1e-3,1e-2", "--budget", "20m"])
    assert not Path("trained.txt").exists()


# ---- other searches ----


def test_halving_promotes_the_better_half_and_continues_its_runs(folder, capsys):
    """By hand: |log10(lr) + 2| is 2, 1, 0 and 0.5, so that 1e-2 and 3.16e-2 go on from step 20."""
    lr = "training.lr=1e-4,1e-3,1e-2,3.16e-2"
    assert sweep.main([*BASE, lr, "--search", "halving", "--seeds", "2"]) == 0
    steps = Counter(line.split()[0] for line in Path("trained.txt").read_text().splitlines())
    assert set(trained().values()) == {1}
    assert all(steps[f"tiny-{n:03d}-s{seed}"] == 40 for n in (3, 4) for seed in (42, 43))
    # those that stop do so at the next line that they print
    assert all(20 <= steps[f"tiny-{n:03d}-s{seed}"] < 40 for n in (1, 2) for seed in (42, 43))
    captured = capsys.readouterr()
    assert "step 20: 2 of 4 configurations go on" in captured.err
    assert "winner: training.lr=1e-2" in captured.out and "stopped at step 20" in captured.out
    before = trained()
    assert sweep.main([*BASE, lr, "--search", "halving", "--seeds", "2"]) == 0
    assert trained() == before


def test_a_rung_compares_the_losses_at_its_step_also_of_runs_that_went_on(folder, searches):
    """By hand, at the rate 1e-2 with seed 42: 0.042 + 1/20 at step 20, 0.042 + 1/40 at the end."""
    sweep.main([*BASE, "training.lr=1e-4,1e-3,1e-2,3.16e-2", "--search", "halving"])
    assert searches[0].losses_at(3, 20) == [pytest.approx(0.092)]
    assert searches[0].losses_at(3, 40) == [pytest.approx(0.067)]


def test_a_random_search_draws_the_same_again_and_more(folder):
    command = [*BASE, "training.lr=1e-4..1e-1", "--search", "random", "--trials"]
    sweep.main([*command, "2"])
    first = {row["training.lr"] for row in rows()}
    sweep.main([*command, "3"])
    assert len(rows()) == 3 and first < {row["training.lr"] for row in rows()}
    assert set(trained().values()) == {1}
    assert all(1e-4 <= float(row["training.lr"]) <= 1e-1 for row in rows())


# ---- mistakes ----


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no key has alternatives; give one or more"),
        (["training.lr=1e-3"], "no key has alternatives"),
        (["training.sed=1,2"], "training has no key 'sed'; did you mean seed"),
        (["trainin.lr=1,2"], "there is no section 'trainin'; did you mean training"),
        (["training.lr=1e-3,fast"], "training.lr is 'fast'; it should be"),
        (["training.lr=1e-3,,2e-3"], "has an empty alternative"),
        (["training.lr=1e-3,0.001"], "has the value 0.001 twice"),
        (["training.lr=1,2", "training.lr=3,4"], "training.lr has alternatives twice"),
        (["training.lr=1", "training.lr=3,4"], "a single value and alternatives; remove one"),
        (["model.n_heads=2,3"], "d_model"),
        (["training.lr=1,2", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["training.lr=1,2", "--budget", "soon"], "--budget 'soon' is no duration"),
        (["training.lr=1,2", "--trials", "3"], "--trials is for --search random"),
        (["training.lr=1,2", "--search", "random"], "say how many with --trials"),
        (["training.lr=1,2", "--search", "random", "--trials", "3"], "are only 2 combinations"),
        (["training.lr=1e-4..1e-3"], "is a range, which has no list of values"),
        (["training.lr=2..1"], "is no range; write LOW..HIGH with LOW below HIGH"),
        (["training.lr=1,2", "--seeds", "6000"], "12,000 runs are too many"),
        (["training.lr=1,2", "--seeds", "9" * 20], "seeds are too many for a sweep"),
        (["training.lr=1,2", "--budget", ""], "--budget '' is no duration"),
        (["training.lr=1..1e999", "--search", "random", "--trials", "2"], "is no range"),
        (["training.lr=1..2", "--search", "random", "--trials", "99999"], "99,999 trials are too"),
        (["training.lr=1,2", f"run.name={'x' * 95}"], "is longer than 100 characters"),
        (["training.lr=1,2", "training.seed=4294967295", "--seeds", "2"], "training.seed is"),
        (["training.seed=1,2"], "is what --seeds varies"),
        (["run.name=a,b"], "names the sweep, and cannot be swept"),
        (["data.tokenizer=byte,char"], "changes what a token is"),
        (["data.val_share=0.1,0.2"], "decides which text is held out"),
        (["training.max_steps=20,40", "--search", "halving"], "training.max_steps"),
        (
            ["training.lr=1,2,3", "training.val_every_steps=40", "--search", "halving"],
            "training.val_every_steps is 40, too many",
        ),
    ],
)
def test_a_mistake_is_one_sentence(folder, arguments, message):
    with pytest.raises(UserError) as error:
        sweep.main(["--config", "tiny.yaml", *arguments])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("trained.txt").exists()


def test_another_sweep_in_the_same_folder_is_refused(folder):
    sweep.main([*BASE, "training.lr=1e-3,1e-2"])
    with pytest.raises(UserError, match=r"other settings \(training.lr: 1e-3,1e-2 -> 1e-3,1e-1\)"):
        sweep.main([*BASE, "training.lr=1e-3,1e-1"])
    with pytest.raises(UserError, match=r"training.weight_decay: 0.5 -> 0.1"):
        sweep.main([*BASE, "training.weight_decay=0.1", "training.lr=1e-3,1e-2"])


@pytest.mark.parametrize(
    "line", ["no json", "null", "{}", '{"op_code": 99, "worker_id": "x"}'], ids=str
)
def test_a_damaged_storage_is_a_sentence(folder, line):
    command = [*BASE, "training.lr=1e-3,1e-2"]
    sweep.main(command)
    journal = Path("sweeps/tiny/study.journal")
    journal.write_text(f"{line}\n{journal.read_text()}")
    with pytest.raises(UserError, match=r"study.journal is damaged .*; remove it"):
        sweep.main(command)


# ---- the real train.py ----


def test_runs_are_those_of_train_py(folder, monkeypatch):
    """The same weights as by hand, with the key, the seed and the name; of two runs the second."""
    real = (sys.executable, str(Path(sweep.__file__).with_name("train.py")))
    monkeypatch.setattr(runs, "TRAIN", real)
    monkeypatch.setattr(sweep.Search, "numbers", [2])
    small = ["training.max_steps=2", "sampling.max_new_tokens=1", "training.lr=1e-3,1e-2"]
    assert sweep.main(["--config", "tiny.yaml", *small]) == 0
    by_hand = [*small[:2], "training.lr=1e-2", "run.name=by-hand"]
    assert train.main(["--config", "tiny.yaml", *by_hand]) == 0
    assert end_equal("checkpoints/tiny-002-s42", "checkpoints/by-hand")
