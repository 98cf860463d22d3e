"""Training as a whole: exact resume, refusals, stopping, metrics, checkpoints. Tiny runs of the real train.main."""

import csv
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.utils import counters

import infer
import train
from model import Transformer
from pocketlm import files
from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.loading import load_config
from pocketlm.config.sampling import SamplingParams
from pocketlm.corpus.chunks import is_validation
from pocketlm.data.datasets import PackedLMDataset
from pocketlm.data.prepare import prepare
from pocketlm.errors import UserError
from pocketlm.evaluation import results
from pocketlm.evaluation.cases import load_suite
from pocketlm.evaluation.exports import scalars
from pocketlm.hardware import devices
from pocketlm.inference import generate
from pocketlm.model.loss import cross_entropy
from pocketlm.training import metrics, plan
from pocketlm.training.samples import openings

ROOT = Path(__file__).parents[2]
TINY = [
    "model.n_layers=2",
    "model.d_model=16",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.dropout=0.1",
    "training.seq_len=16",
    "training.micro_batch_size=4",
    "training.grad_accum_steps=2",
    "training.max_steps=12",
    "training.warmup_steps=2",
    "training.val_every_steps=5",
    "training.save_every_steps=3",
    "training.log_every_steps=2",
    "data.path=text.txt",
    "data.tokenizer=byte",
    "training.lr=4e-3",
    "training.precision=32-true",
    "hardware.accelerator=cpu",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a text that one epoch of 7 steps reads, and a config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(50)))
    (tmp_path / "config.yaml").write_text("model: {}\n")
    return tmp_path


def run(*overrides: str, flags: tuple[str, ...] = ()) -> None:
    assert train.main(["--config", "config.yaml", *flags, *TINY, *overrides]) == 0


def weights_and_optimizer(path: str) -> list[torch.Tensor]:
    state = read_checkpoint(path)
    moments = [
        value for p in state["optimizer_states"][0]["state"].values() for value in p.values()
    ]
    return [*state["state_dict"].values(), *moments]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def stop_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal when `step` has been taken."""
    original = metrics.MetricsLogger.on_step

    def on_step(self, trainer, module):
        original(self, trainer, module)
        if trainer.global_step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(metrics.MetricsLogger, "on_step", on_step)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_after_any_step_ends_as_the_uninterrupted_one(
    folder, monkeypatch, optimizer, workers
):
    """With dropout, accumulation, two epochs, and stops that do and do not fall on a validation, a save and an epoch's end."""
    options = [f"training.optimizer={optimizer}", f"hardware.num_workers={workers}"]
    run("run.name=whole", *options)
    whole = weights_and_optimizer("checkpoints/whole/final.ckpt")
    rows = Path("logs/whole/metrics.csv").read_text().splitlines()
    for step in range(1, 12) if workers == 0 and optimizer == "muon" else (5, 7):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(SystemExit) as stop:
                run(f"run.name=stopped{step}", *options)
            assert stop.value.code == 128 + signal.SIGTERM
        assert read_checkpoint(f"checkpoints/stopped{step}/last.ckpt")["global_step"] == step
        run(f"run.name=stopped{step}", *options)
        assert same(weights_and_optimizer(f"checkpoints/stopped{step}/final.ckpt"), whole), step
        resumed = Path(f"logs/stopped{step}/metrics.csv").read_text().splitlines()
        assert [r.split(",")[:6] + r.split(",")[8:] for r in resumed] == [
            r.split(",")[:6] + r.split(",")[8:] for r in rows
        ], step


INTERRUPTED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from pocketlm.errors import run_main
from pocketlm.training import metrics
original = metrics.MetricsLogger.on_step
def on_step(self, trainer, module):
    original(self, trainer, module)
    if trainer.global_step == 8 and trainer.is_global_zero:
        os.kill(os.getpid(), signal.{signal})
metrics.MetricsLogger.on_step = on_step
run_main(train.main)
"""


def in_new_process(*overrides: str, interrupt: str | None = None) -> subprocess.CompletedProcess:
    """The command line, in a process of its own, which a signal hits after step 8."""
    program = ROOT / "train.py"
    if interrupt:
        program = Path("interrupted.py").absolute()
        program.write_text(INTERRUPTED.format(root=str(ROOT), signal=interrupt))
    command = [sys.executable, program, "--config", "config.yaml", *TINY, *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_killed_process_continues_from_its_last_save_and_ends_the_same(folder):
    """SIGKILL leaves no time for anything; the same command again, in a new process, must do."""
    run("run.name=whole")
    assert in_new_process("run.name=killed", interrupt="SIGKILL").returncode == -signal.SIGKILL
    again = in_new_process("run.name=killed")
    assert again.returncode == 0, again.stderr
    assert "continuing checkpoints/killed/last.ckpt from step 6" in again.stderr
    assert same(
        weights_and_optimizer("checkpoints/killed/final.ckpt"),
        weights_and_optimizer("checkpoints/whole/final.ckpt"),
    )


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_compiled_run_is_compiled_once_and_stopped_after_a_step_ends_as_the_uninterrupted_one(
    folder, monkeypatch, two_threads
):
    """Through validations, accumulation and dropout, whose masks it draws from torch's generator too, in ways of its own.

    Two threads may add in any order, and must not.
    """
    graphs = []
    for name, stop in (("whole", None), ("stopped", 7), ("stopped", None)):
        torch._dynamo.reset()  # as a new process begins
        counters.clear()
        with monkeypatch.context() as patch:
            if stop:
                stop_at(patch, stop)
                with pytest.raises(SystemExit):
                    run(f"run.name={name}", "hardware.compile=on")
            else:
                run(f"run.name={name}", "hardware.compile=on")
        graphs.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"], counters
    assert graphs == [1, 1, 1]
    assert same(
        weights_and_optimizer("checkpoints/stopped/final.ckpt"),
        weights_and_optimizer("checkpoints/whole/final.ckpt"),
    )
    rows = [
        [row.split(",")[:6] for row in Path(f"logs/{name}/metrics.csv").read_text().splitlines()]
        for name in ("stopped", "whole")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("rate, compiles", [(1e5, "on"), (1e15, "off")])
def test_the_plan_says_whether_the_step_is_compiled_and_why(
    folder, monkeypatch, capsys, rate, compiles
):
    """By default, on a CPU: where the run would take long."""
    monkeypatch.setattr(plan, "matmul_rate", lambda *_: rate)
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    assert train.main(["--config", "config.yaml", *TINY, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    why = {
        "on": r"saves about \d+ minutes; takes up to \d+ s first",
        "off": r"it would save some 0 s of this run and take up to \d+",
    }
    assert re.search(f"compile {compiles}: {why[compiles]}", said)


def places(name: str) -> list[dict]:
    """How far a checkpoint's stream is, worker by worker."""
    [loader] = read_checkpoint(f"checkpoints/{name}.ckpt")["loops"]["fit_loop"]["state_dict"][
        "combined_loader"
    ]
    return loader["ranks"][0]["places"]


LINES = [
    "data.separator=line",
    "data.val_share=0.2",
]  # 42 documents to train on: 52 rows, and 12 steps read 96
STREAM = [*LINES, "data.streaming=true", "data.shuffle_buffer=5"]
PADDED = "data.packing=padded"
MIXTURE = [
    "data.path=null",
    "data.mixture=[{path: text.txt, separator: line, weight: 2}, {path: other.txt, separator: blank_line, weight: 1}]",
    "data.val_share=0.2",
]


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
def test_a_killed_run_on_any_kind_of_rows_ends_as_the_uninterrupted_one(folder, options, capsys):
    """Across the end of an epoch, and from the middle of a shuffled block; this process is not the one that was killed."""
    (folder / "other.txt").write_text("".join(f"{i} and {i}\nare {i + i}.\n\n" for i in range(20)))
    run("run.name=whole", *options)
    assert (
        in_new_process("run.name=killed", *options, interrupt="SIGKILL").returncode
        == -signal.SIGKILL
    )
    capsys.readouterr()
    if "data.streaming=true" in options:
        assert [place["epoch"] for place in places("killed/last")] < [
            place["epoch"] for place in places("whole/final")
        ]
        assert any(0 < place["row"] < 5 for place in places("killed/last"))
    run("run.name=killed", *options)
    assert "continuing checkpoints/killed/last.ckpt from step 6" in capsys.readouterr().err
    assert same(
        weights_and_optimizer("checkpoints/killed/final.ckpt"),
        weights_and_optimizer("checkpoints/whole/final.ckpt"),
    )


@pytest.mark.slow
def test_a_stream_with_other_workers_is_refused_and_nothing_is_lost(folder):
    """The command that it was begun with then still goes on to the same end."""
    options = [*STREAM, "hardware.num_workers=2"]
    run("run.name=whole", *options)
    assert (
        in_new_process("run.name=killed", *options, interrupt="SIGKILL").returncode
        == -signal.SIGKILL
    )
    before = {p: p.read_bytes() for p in Path("checkpoints/killed").glob("*.ckpt")}
    refused = in_new_process("run.name=killed", *STREAM)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert (
        refused.stderr.splitlines()[-1]
        == "error: a stream goes on only as it was dealt out: set hardware.num_workers to 2, not 0"
    )
    assert {p: p.read_bytes() for p in Path("checkpoints/killed").glob("*.ckpt")} == before
    run("run.name=killed", *options)
    assert same(
        weights_and_optimizer("checkpoints/killed/final.ckpt"),
        weights_and_optimizer("checkpoints/whole/final.ckpt"),
    )
    columns = [
        [row.split(",")[:6] for row in Path(f"logs/{name}/metrics.csv").read_text().splitlines()]
        for name in ("killed", "whole")
    ]
    assert columns[0] == columns[1]


@pytest.mark.parametrize("options, message", [
    (["hardware.num_workers=60"], "error: text.txt has too few documents to train on for 60 workers; lower hardware.num_workers or"),
    (["data.mixture=[{path: text.txt}]"], "path 'text.txt' and mixture are both given"),
])  # fmt: skip
def test_a_stream_that_cannot_be_is_refused_in_one_sentence(folder, options, message):
    done = in_new_process(*STREAM, *options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert not list(Path("checkpoints").glob("*.ckpt"))


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(SystemExit):
            run()
    for name in ("last.ckpt", "step-00000008.ckpt"):
        path = Path("checkpoints") / name
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[: len(data) // 2])
    run()
    said = capsys.readouterr().err
    assert "checkpoints/last.ckpt is truncated" in said
    assert "continuing checkpoints/step-00000006.ckpt from step 6" in said


def test_a_finished_run_and_one_with_another_config_are_refused_and_left_alone(folder):
    run()
    before = {p: p.read_bytes() for p in Path("checkpoints").glob("*.ckpt")}
    with pytest.raises(
        UserError,
        match=r"finished: 12 of 12 steps; raise training.max_steps.*--fresh.*run.name=NAME",
    ):
        run()
    with pytest.raises(UserError, match=r"another config \(training.lr: 0.004 -> 0.001\).*--fresh"):
        run("training.lr=1e-3")
    assert {p: p.read_bytes() for p in Path("checkpoints").glob("*.ckpt")} == before


def test_a_run_does_not_continue_on_a_text_that_has_changed(folder, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(SystemExit):
            run()
    (folder / "text.txt").write_text("something else. " * 100)
    with pytest.raises(UserError, match=r"another config \(the tokens to train on\)"):
        run()


def test_fresh_moves_only_the_runs_own_files_aside_and_deletes_nothing(folder):
    run("training.max_steps=3")
    run("training.max_steps=3", "run.name=other")
    files = {
        p.name: p.read_bytes()
        for p in Path("checkpoints").glob("*")
        if p.is_file() and p.name != ".lock"
    }
    run("training.max_steps=3", flags=("--fresh",))
    [moved] = Path("checkpoints").glob("old-*")
    assert {p.name: p.read_bytes() for p in moved.glob("*")} == files
    assert (
        Path("checkpoints/other/final.ckpt").exists() and len(list(Path("logs").glob("old-*"))) == 1
    )


def test_raising_max_steps_goes_on(folder, capsys):
    run("training.max_steps=6")
    run("training.max_steps=12")
    assert "training.max_steps 6 -> 12" in capsys.readouterr().err
    assert read_checkpoint("checkpoints/final.ckpt")["global_step"] == 12


def test_epochs_are_the_steps_of_so_many_passes_and_may_be_raised(folder):
    text = Path("text.txt").read_bytes()
    tokens = (
        len(text) - len(text) // 20 + 2
    )  # byte and an eos at both ends; the last twentieth is validation
    steps = [math.ceil(epochs * math.ceil((tokens - 1) / 16) / 8) for epochs in (0.5, 2)]
    run("run.name=epochs", "training.max_epochs=0.5", "training.schedule=constant")
    assert read_checkpoint("checkpoints/epochs/final.ckpt")["global_step"] == steps[0] < steps[1]
    run("run.name=epochs", "training.max_epochs=2", "training.schedule=constant")
    run("run.name=steps", f"training.max_steps={steps[1]}", "training.schedule=constant")
    assert same(
        *(weights_and_optimizer(f"checkpoints/{name}/final.ckpt") for name in ("epochs", "steps"))
    )


NAMES = ["anna", "emma", "hannah", "ann", "em", "nan", "maanna", "emmann"]


def test_a_run_on_lines_prints_the_facts_and_numbered_samples_as_microgpt_does(folder, capsys):
    """Few letters and few names, so that some of the samples are new and some are remembered."""
    Path("names.txt").write_text("\n".join(NAMES))
    options = [
        "data.path=names.txt",
        "data.separator=line",
        "data.tokenizer=seen-bytes",
        "data.packing=padded",
        "data.val_share=0.3",
    ]
    run(
        *options,
        "sampling.prompts=['']",
        "sampling.num_samples=40",
        "sampling.max_new_tokens=6",
        "training.max_steps=60",
    )
    said = capsys.readouterr()
    parameters = load_checkpoint("checkpoints/final.ckpt").model.state_dict()
    assert (
        f"num docs: 8\nvocab size: 6\nnum params: {sum(p.numel() for p in parameters.values())}\n"
        in said.err.replace(" \n", "\n")
    )
    samples = re.findall(
        r"^sample +(\d+): ([aehmn]*)(  \(a training document\))?$", said.out, re.MULTILINE
    )
    assert [int(number) for number, _, _ in samples] == list(range(1, 41))
    trained_on = {name for name in NAMES if not is_validation(name, 0.3)}
    assert 0 < len(trained_on) < len(NAMES)
    assert [bool(mark) for _, _, mark in samples] == [text in trained_on for _, text, _ in samples]
    new = sum(text not in trained_on for _, text, _ in samples)
    assert 0 < new < 40
    assert (
        f"{new} of 40 are new: not among the {len(trained_on)} documents to train on." in said.out
    )


def test_several_continuations_stand_behind_the_openings_they_continue(folder, capsys):
    """The openings of validation documents go in as one batch; each row's text begins anew for each of its two continuations."""
    run(
        "sampling.num_samples=2",
        "sampling.temperature=0",
        "sampling.max_new_tokens=5",
        "training.max_steps=3",
    )
    samples = re.findall(r"^sample +\d+: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(samples) == 6 and samples[:3] == samples[3:]  # greedy: the second round is the first
    config = load_config("config.yaml", TINY)
    data = prepare(config.data)
    model, ids = (
        load_checkpoint("checkpoints/final.ckpt").model,
        openings(data, config.model.max_seq_len),
    )
    for shown, opening in zip(samples, ids, strict=False):
        alone = generate.generate(
            model,
            torch.from_numpy(opening)[None],
            SamplingParams(5, temperature=0.0),
            data.tokenizer.eos_id,
        )
        text = data.tokenizer.decode(
            [*opening.tolist(), *(token for [token] in alone if token is not None)]
        )
        assert shown == text.replace("\n", " ⏎ ")


def test_prompts_are_continued_by_the_model_of_the_last_step(folder, capsys):
    run(
        "sampling.prompts=['7 times', '1']",
        "sampling.temperature=0",
        "sampling.max_new_tokens=5",
        "training.max_steps=3",
    )
    said = capsys.readouterr().out
    for number, prompt in enumerate(["7 times", "1"], 1):
        assert (
            infer.main(["--ckpt", "checkpoints/final.ckpt", "--prompt", prompt, "--device", "cpu"])
            == 0
        )
        text = capsys.readouterr().out.removesuffix("\n").replace("\n", " ⏎ ")
        assert f"sample {number:2d}: {prompt}{text}\n" in said


@pytest.mark.parametrize("options, told", [
    (["data.eos=false", "sampling.prompts=['']"], "sampling.prompts holds ''.*no token begins a document"),
    (["training.max_epochs=1", "data.streaming=true", "data.separator=line"], "max_epochs is 1.*stream"),
    (["data.tokenizer=seen-bytes", "data.streaming=true", "data.separator=line"], "streaming.*seen-bytes"),
])  # fmt: skip
def test_what_no_run_can_do_is_refused_in_a_sentence(folder, options, told):
    with pytest.raises(UserError, match=told):
        run(*options)


def test_a_vocabulary_that_leaves_characters_out_and_documents_that_do_not_fit_are_told_before_the_run(
    folder, capsys
):
    """Digits are the rare ones: 50 lines of 'i times i is i*i'; a row of 16 holds no whole line with two-digit numbers."""
    options = [
        "data.tokenizer=char:12",
        "data.separator=line",
        "data.packing=padded",
        "data.val_share=0.1",
    ]
    assert train.main(["--config", "config.yaml", *TINY, *options, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    lines = [
        line for line in Path("text.txt").read_text().splitlines() if not is_validation(line, 0.1)
    ]
    different = len(set("".join(lines)))
    assert (
        f"the training text has {different} different characters; char:12 keeps the 10 commonest, and the other {different - 10}"
        in said
    )
    assert (
        f"{sum(len(line) + 1 > 16 for line in lines)} of {len(lines)} do not fit a row of 16 tokens: each cut off there"
        in said
    )


SUITE = """
schema: 1
name: sums
cases:
  - {id: a, type: choice, category: digits, prompt: "7 times 7 is", answers: [" 49"], distractors: [" 4q"]}
  - {id: b, type: minimal_pair, category: order, good: "3 times", bad: "3 semit"}
"""


def test_each_validation_scores_the_probe_cases_as_the_evaluator_does(folder, capsys):
    """The last one's scores are those of final.ckpt; a resumed run may ask other cases."""
    Path("sums.yaml").write_text(SUITE)
    run("training.probe_cases=[sums.yaml]", "training.max_steps=10")
    assert capsys.readouterr().err.count("probes ") == 2
    with Path("logs/metrics.csv").open() as file:
        macros = [
            (int(row["step"]), float(row["probe/macro"]))
            for row in csv.DictReader(file)
            if row["probe/macro"]
        ]
    [result] = results.evaluate(["checkpoints/final.ckpt"], load_suite("sums.yaml"))
    assert [step for step, _ in macros] == [5, 10] and macros[1][1] == result.macro
    events = EventAccumulator("logs")
    events.Reload()
    logged = {
        name: events.Scalars(name)[-1].value
        for name in events.Tags()["scalars"]
        if name.startswith("probe/")
    }
    assert logged == pytest.approx(scalars(result), rel=1e-5)
    Path("other.yaml").write_text(SUITE.replace("id: a", "id: c"))
    run("training.probe_cases=[other.yaml]", "training.max_steps=12")


def test_probe_cases_that_cannot_be_asked_are_refused_before_the_first_step(folder):
    Path("long.yaml").write_text(
        "[{name: a, prompt: much longer than a row of sixteen, target: ' x'}]"
    )
    for path, told in (
        ("gone.yaml", "cannot read the cases gone.yaml"),
        ("long.yaml", "'a' has 36 tokens"),
    ):
        with pytest.raises(UserError, match=told):
            run(f"training.probe_cases=[{path}]")
    assert not list(Path("checkpoints").glob("*.ckpt"))


def test_a_second_process_in_the_same_folder_is_refused(folder):
    from pocketlm.checkpoint.runs import Run

    with (
        Run("").lock(),
        pytest.raises(UserError, match="another process is training in checkpoints"),
    ):
        run()


def test_checkpoints_are_named_by_step_pruned_and_load_with_weights_only(folder):
    run("training.keep_checkpoints=2")
    assert sorted(p.name for p in Path("checkpoints").glob("*.ckpt")) == [
        "best.ckpt",
        "final.ckpt",
        "last.ckpt",
        "step-00000010.ckpt",
        "step-00000012.ckpt",
    ]
    state = torch.load("checkpoints/final.ckpt", weights_only=True)
    assert state["pytorch-lightning_version"] and state["kit"]["config"]["model"]["d_model"] == 16
    assert torch.serialization.get_unsafe_globals_in_checkpoint("checkpoints/final.ckpt") == []


def test_the_same_scalars_stand_in_tensorboard_and_csv_with_text_and_hparams(folder):
    run()
    events = EventAccumulator("logs")
    events.Reload()
    with Path("logs/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [
        "train/loss",
        "train/bpb",
        "train/lr",
        "train/grad_norm",
        "perf/tokens_per_second",
        "perf/memory_mb",
        "val/loss",
        "val/bpb",
        "val/perplexity",
    ]
    for name in names:
        expected = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert expected and [s for s, _ in shown] == [s for s, _ in expected]
        assert [v for _, v in shown] == pytest.approx(
            [v for _, v in expected], rel=1e-4
        )  # the CSV has six digits
    tags = events.Tags()["tensors"]
    assert "config/text_summary" in tags and "samples/text_summary" in tags
    assert events.Scalars("hp/val_loss")[0].value == pytest.approx(
        float(rows[-1]["val/loss"]), rel=1e-4
    )
    assert Path("checkpoints/loss.png").read_bytes().startswith(b"\x89PNG")


def test_validation_is_the_sum_over_every_target_divided_once(folder):
    """Held to a plain loop over the whole validation shard, whose last window is short."""
    run("model.dropout=0", "training.max_steps=5")
    checkpoint = load_checkpoint("checkpoints/final.ckpt")
    data = prepare(checkpoint.config.data)
    windows = PackedLMDataset(data.val.shards[0], 16)
    rows = [windows[i] for i in range(len(windows))]
    nats = sum(
        cross_entropy(checkpoint.model(row["input_ids"][None]), row["targets"]).item()
        for row in rows
    )
    with Path("logs/metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    text = (folder / "text.txt").read_text()
    val_bytes = len(text.encode()) - int(len(text.encode()) * 0.95)
    assert float(last["val/loss"]) == pytest.approx(nats / (data.val.n_tokens - 1), rel=1e-5)
    assert float(last["val/bpb"]) == pytest.approx(nats / math.log(2) / val_bytes, rel=1e-5)


def test_accumulated_small_batches_equal_one_large_batch_where_targets_are_missing(folder):
    """The text's last window is short, so the batches of a step have unequal numbers of targets (a mean of means would differ)."""
    options = ["model.dropout=0", "training.max_steps=8", "training.optimizer=adamw"]
    run("run.name=large", *options, "training.micro_batch_size=8", "training.grad_accum_steps=1")
    run("run.name=small", *options, "training.micro_batch_size=2", "training.grad_accum_steps=4")
    large, small = (
        read_checkpoint(f"checkpoints/{name}/final.ckpt")["state_dict"]
        for name in ("large", "small")
    )
    for name in large:  # sums in another order: 1e-7 a step, magnified by AdamW's division
        torch.testing.assert_close(small[name], large[name], atol=2e-5, rtol=1e-4)


def test_the_gradient_is_the_mean_over_the_targets_there_are(folder):
    """A text shorter than a window leaves most of a row without targets; held to torch's own mean on the same first weights."""
    (folder / "text.txt").write_text("forty bytes of text, less than a window")
    run("model.dropout=0", "training.seq_len=64", "training.max_steps=1")
    with Path("logs/metrics.csv").open() as file:
        logged = next(csv.DictReader(file))
    config = load_checkpoint("checkpoints/final.ckpt").config
    window = PackedLMDataset(prepare(config.data).train.shards[0], 64)[0]
    torch.manual_seed(config.training.seed)
    model = Transformer(config.model)
    loss = torch.nn.functional.cross_entropy(
        model(window["input_ids"][None])[0], window["targets"]
    )  # -100 is torch's default too
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert 0 < (window["targets"] == -100).sum() < 64
    assert float(logged["train/loss"]) == pytest.approx(
        loss.item(), rel=1e-5
    )  # the CSV has six digits
    assert float(logged["train/grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_checkpoint(folder, monkeypatch):
    original = train.LitTransformer.training_step

    def training_step(self, batch, index):
        return original(self, batch, index) * (float("nan") if self.trainer.global_step == 7 else 1)

    monkeypatch.setattr(train.LitTransformer, "training_step", training_step)
    with pytest.raises(UserError, match="the gradient is not finite at step 8"):
        run()
    for path in Path("checkpoints").glob("*.ckpt"):
        assert all(torch.isfinite(p).all() for p in read_checkpoint(path)["state_dict"].values())


def test_the_learning_rate_of_each_step_is_the_schedules(folder):
    from pocketlm.optim import lr_at_step

    run("training.log_every_steps=1")
    with Path("logs/metrics.csv").open() as file:
        rates = [float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"]]
    assert rates == pytest.approx(
        [
            4e-3 * lr_at_step(s, max_steps=12, warmup_steps=2, min_lr_ratio=0, schedule="linear")
            for s in range(12)
        ],
        rel=1e-5,
    )


def test_print_config_prints_yaml_that_loads_to_the_same(folder, capsys):
    assert train.main(["--config", "config.yaml", *TINY, "--print-config"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert load_config("printed.yaml") == load_config("config.yaml", TINY)


def test_a_dry_run_reports_and_leaves_no_run_behind(folder, capsys):
    assert train.main(["--config", "config.yaml", *TINY, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for word in ("device", "precision", "documents", "parameters", "steps", "memory", "minutes"):
        assert word in said
    assert not Path("checkpoints").exists() and not Path("logs").exists()


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one_with_twice_the_rows(folder):
    """DistributedDataParallel on two CPU processes; they see the rows of one, in another grouping, with unequal targets."""
    options = ["model.dropout=0", "training.optimizer=adamw", "training.max_steps=6"]
    run("run.name=one", *options)
    command = [sys.executable, ROOT / "train.py", "--config", "config.yaml", *TINY, *options]
    done = subprocess.run(
        [*command, "run.name=two", "hardware.devices=2", "training.micro_batch_size=2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    one, two = (read_checkpoint(f"checkpoints/{name}/final.ckpt") for name in ("one", "two"))
    assert two["kit"]["tokens"] == one["kit"]["tokens"]
    assert two["kit"]["val_loss"] == pytest.approx(one["kit"]["val_loss"], abs=1e-4)
    for name in one["state_dict"]:  # sums in another order, magnified by AdamW's division
        torch.testing.assert_close(
            two["state_dict"][name], one["state_dict"][name], atol=2e-5, rtol=1e-4
        )


@pytest.mark.slow
def test_two_processes_on_a_stream_stop_and_end_as_the_uninterrupted_ones(folder):
    """Each has its own documents, and its own place in them, though one of them writes the checkpoint.

    Without data workers: CPython 3.11 can hang in the fork that starts one while torch's threads come and go.
    """
    options = [*STREAM, "model.dropout=0", "hardware.devices=2", "hardware.num_workers=0"]
    whole = in_new_process("run.name=whole", *options)
    assert whole.returncode == 0, whole.stderr
    assert (
        in_new_process("run.name=stopped", *options, interrupt="SIGTERM").returncode
        == 128 + signal.SIGTERM
    )
    state = read_checkpoint("checkpoints/stopped/last.ckpt")
    assert state["global_step"] == 8
    again = in_new_process("run.name=stopped", *options)
    assert again.returncode == 0, again.stderr
    assert "continuing checkpoints/stopped/last.ckpt from step 8" in again.stderr
    assert same(
        weights_and_optimizer("checkpoints/stopped/final.ckpt"),
        weights_and_optimizer("checkpoints/whole/final.ckpt"),
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config", "none.yaml"], "there is no config none.yaml"),
        (["--config", "config.yaml", "training.lrr=1"], "did you mean lr"),
        (["--config", "config.yaml", "data.path=missing.txt"], "missing.txt is not a file"),
        (["--config", "config.yaml", "data.source=wikki"], "did you mean wiki"),
        (
            [
                "--config",
                "config.yaml",
                "hardware.accelerator=cuda",
                "data.path=text.txt",
                "data.tokenizer=byte",
            ],
            "this machine has cpu",
        ),
    ],
)
def test_a_mistake_gets_one_sentence_and_status_2(folder, arguments, message):
    if "hardware.accelerator=cuda" in arguments and torch.cuda.is_available():
        arguments, message = [a.replace("cuda", "mps") for a in arguments], "this machine has"
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not Path("checkpoints").exists()


def test_a_full_disk_is_a_sentence_and_the_old_checkpoint_stays(folder, monkeypatch):

    original = files.os.fsync
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        original(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*No space left.*untouched"):
        run()
    monkeypatch.undo()
    assert read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] >= 3
    assert not list((folder / "checkpoints").glob(".*.unfinished"))
