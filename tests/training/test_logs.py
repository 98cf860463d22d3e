"""Logs, samples and probes cost a run no step, whatever is wrong with them."""

import os
import random
import shutil
from pathlib import Path

import pytest

from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.training import monitors
from pocketlm.training.metrics import CSV_COLUMNS, drop_rows_after, read_rows
from tests.support.training import end_equal, rows_without_timing, run, run_stopped_after

HEADER = ",".join(CSV_COLUMNS).encode()
ROW = b"1,120,5.5,8.1,0.002,1.2,6000,500,,,,"


def rows_of(content: bytes) -> tuple[list[str], int]:
    """Return the steps that are read from a metrics.csv, and the number of damaged lines."""
    Path("metrics.csv").write_bytes(content)
    rows, n_damaged = read_rows(Path("metrics.csv"))
    return [row["step"] for row in rows], n_damaged


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", ([], 0)),
        (HEADER + b"\r\n" + ROW + b"\r\n", (["1"], 0)),
        (HEADER + b"\r\n" + ROW + b"\r\n" + ROW[:9], (["1"], 1)),  # a row cut off by a power cut
        (HEADER[:5] + b"\0" * 20 + b"\r\n" + ROW, (["1"], 1)),
        (ROW + b"\r\n", (["1"], 1)),  # the header is lost
        (b"\xef\xbb\xbf" + HEADER + b"\n" + ROW, (["1"], 0)),
        (HEADER + b"\n\0\0\0\n" + ROW + b"\n", (["1"], 1)),
        (HEADER + b"\n\xff\xfe\xff\n" + ROW, (["1"], 1)),
        (HEADER + b'\n"1,2\n' + ROW, (["1"], 1)),  # a quote without an end
        (HEADER + b"\n" + ROW.replace(b"1,", b"one,", 1) + b"\n" + ROW, (["1"], 1)),
        (HEADER + b"\n" + ROW.replace(b"1,", b"9" * 5000 + b",", 1), ([], 1)),
        (HEADER + b"\n" + ROW + b",7,8,9", ([], 1)),
        (HEADER + b"\n" + ROW.replace(b"5.5", b"5.5.5") + b"\n", ([], 1)),
        (HEADER + b"\n" + b"x" * 200_000 + b"\n" + ROW, (["1"], 1)),  # above csv's field limit
        (b"step,tokens,train/loss\n1,120,5.5\n", (["1"], 0)),  # an earlier version's columns
    ],
    ids=lambda value: repr(value[-24:]) if isinstance(value, bytes) else "",
)
def test_damaged_lines_are_left_out_and_the_others_read(folder, content, expected):
    assert rows_of(content) == expected


def test_rows_after_the_step_are_dropped_and_a_damaged_file_is_kept(folder, capsys):
    path = Path("metrics.csv")
    content = HEADER + b"\n" + ROW + b"\n" + ROW.replace(b"1,", b"9,", 1) + b"\nrubbish\n"
    path.write_bytes(content)
    drop_rows_after(path, 5)
    assert [row["step"] for row in read_rows(path)[0]] == ["1"]
    assert Path("metrics.csv.damaged").read_bytes() == content
    assert "metrics.csv has 1 damaged line" in capsys.readouterr().err


def no_damage(path: Path) -> None:
    pass


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(3000))


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def lose_the_logs(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("damage", [no_damage, cut, noise, make_a_folder, lose_the_logs])
def test_no_damage_to_the_logs_stops_a_resume_or_changes_the_run(
    folder, finished_folder, damage, capsys
):
    run_stopped_after(7)
    damage(Path("logs/metrics.csv"))
    run()
    assert end_equal("checkpoints", finished_folder / "checkpoints")
    assert "Done: 12 steps" in capsys.readouterr().out
    after = [row for row in rows_without_timing("logs/metrics.csv") if int(row["step"]) > 7]
    whole = rows_without_timing(finished_folder / "logs/metrics.csv")
    assert after == [row for row in whole if int(row["step"]) > 7]


def test_logs_that_cannot_be_written_any_more_are_named_once(
    folder, finished_folder, monkeypatch, capsys
):
    """As on a disk that fills up, or is mounted read-only, in the middle of a run."""

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pocketlm.training.metrics.append_row", refuse)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", refuse)
    run()
    output = capsys.readouterr()
    assert output.err.count("logs/metrics.csv gets no more rows: [Errno 28] No space left") == 1
    assert output.err.count("no more TensorBoard files in logs") == 1
    assert "Done: 12 steps" in output.out
    assert end_equal("checkpoints", finished_folder / "checkpoints")


@pytest.mark.parametrize("function", ["drop_rows_after", "sync_file"])
def test_a_log_that_cannot_be_opened_or_synced_costs_no_step(folder, monkeypatch, capsys, function):
    def refuse(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(f"pocketlm.training.metrics.{function}", refuse)
    run("training.max_steps=4")
    assert capsys.readouterr().err.count("metrics.csv gets no more rows: [Errno 5]") == 1
    assert Path("checkpoints/final.ckpt").exists()


def test_event_files_that_cannot_be_opened_are_named(folder, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "logs/train")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", refuse)
    run("training.max_steps=2")
    assert "no more TensorBoard files in logs" in capsys.readouterr().err
    assert Path("checkpoints/final.ckpt").exists()


def test_the_rows_before_a_checkpoint_are_on_the_disk_before_it(folder, monkeypatch):
    """A power cut after a save would otherwise leave a gap in metrics.csv."""
    events, fsync = [], os.fsync

    def record(handle):
        path = Path(f"/proc/self/fd/{handle}")
        events.append(os.readlink(path).rpartition("/")[2] if path.exists() else "?")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    run("training.max_steps=4")
    saves = [i for i, name in enumerate(events) if name.startswith(".step-")]
    assert len(saves) == 2
    assert all(events[i - 1] == "metrics.csv" for i in saves)


# ---- samples and probes ----


def test_what_fails_in_a_sample_or_a_probe_costs_no_step(
    folder, finished_folder, monkeypatch, capsys
):
    """Such as a home folder that is not there, or a compiler's cache that cannot be written.

    The step is saved before; the run goes on, and says what was missed.
    """
    seen = []

    def fail(*_, **__):
        seen.append(read_checkpoint("checkpoints/last.ckpt")["global_step"])
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(monitors, "generate_texts", fail)
    monkeypatch.setattr(monitors, "score_cases", fail)
    Path("cases.yaml").write_text("[{name: a, prompt: 'a', target: ' b'}]")
    run("training.probe_cases=[cases.yaml]")
    assert seen == [5, 5, 10, 10, 12, 12]
    output = capsys.readouterr()
    assert "no samples at step 5: RuntimeError: Could not determine home directory." in output.err
    assert "no probes at step 12: RuntimeError: Could not determine home directory." in output.err
    assert "Done: 12 steps" in output.out
    assert end_equal("checkpoints", finished_folder / "checkpoints")


def test_a_probe_that_draws_random_numbers_does_not_change_the_run(
    folder, finished_folder, monkeypatch
):
    """A step is saved before its samples: a run that resumes there does not draw them again."""
    monkeypatch.setattr(monitors.Samples, "look", lambda self, step: monitors.torch.rand(3))
    run()
    assert end_equal("checkpoints", finished_folder / "checkpoints")
