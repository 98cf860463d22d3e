"""Samples and probes of a run: at every validation, and in the verdict."""

import re
from pathlib import Path

import pytest
import torch

import infer
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.loading import load_config
from pocketlm.config.sampling import SamplingParams
from pocketlm.corpus.chunks import is_validation
from pocketlm.data.prepare import prepare
from pocketlm.evaluation import results
from pocketlm.evaluation.cases import load_suite
from pocketlm.evaluation.exports import scalars
from pocketlm.inference import generate
from pocketlm.training import monitors
from pocketlm.training.monitors import openings
from tests.support.training import (
    TINY,
    end_equal,
    read_events,
    read_rows,
    rows_without_timing,
    run,
    run_stopped_after,
)

NAMES = ["anna", "emma", "hannah", "ann", "em", "nan", "maanna", "emmann"]
GREEDY = ["sampling.temperature=0", "sampling.max_new_tokens=5", "training.max_steps=3"]


def test_a_run_on_lines_prints_the_counts_and_numbered_samples_as_microgpt_does(folder, capsys):
    """Few letters and few names, so that some samples are new and some are memorised."""
    Path("names.txt").write_text("\n".join(NAMES))
    run(
        "data.path=names.txt",
        "data.separator=line",
        "data.tokenizer=seen-bytes",
        "data.packing=padded",
        "data.val_share=0.3",
        "sampling.prompts=['']",
        "sampling.num_samples=40",
        "sampling.max_new_tokens=6",
        "training.max_steps=60",
    )
    output = capsys.readouterr()
    parameters = load_checkpoint("checkpoints/final.ckpt").model.state_dict().values()
    header = f"num docs: 8\nvocab size: 6\nnum params: {sum(p.numel() for p in parameters)}\n"
    assert header in output.err.replace(" \n", "\n")
    sample = re.compile(r"^sample +(\d+): ([aehmn]*)(  \(a training document\))?$", re.MULTILINE)
    samples = sample.findall(output.out)
    assert [int(number) for number, _, _ in samples] == list(range(1, 41))
    trained_on = {name for name in NAMES if not is_validation(name, 0.3)}
    assert 0 < len(trained_on) < len(NAMES)
    assert [bool(mark) for _, _, mark in samples] == [text in trained_on for _, text, _ in samples]
    new = sum(text not in trained_on for _, text, _ in samples)
    assert 0 < new < 40
    count = f"{new} of 40 are new: not among the {len(trained_on)} training documents."
    assert count in output.out


def test_several_continuations_follow_the_openings_they_continue(folder, capsys):
    """The openings of validation documents are one batch, generated for two rounds."""
    run("sampling.num_samples=2", *GREEDY)
    samples = re.findall(r"^sample +\d+: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(samples) == 6 and samples[:3] == samples[3:]  # greedy: both rounds are the same
    config = load_config("config.yaml", TINY)
    data = prepare(config.data)
    model = load_checkpoint("checkpoints/final.ckpt").model
    params = SamplingParams(5, temperature=0.0)
    ids = openings(data, config.model.max_seq_len)
    for shown, opening in zip(samples, ids, strict=False):
        prompt = torch.from_numpy(opening)[None]
        tokens = generate.generate(model, prompt, params, data.tokenizer.eos_id)
        continuation = [token for [token] in tokens if token is not None]
        text = data.tokenizer.decode([*opening.tolist(), *continuation])
        assert shown == text.replace("\n", " ⏎ ")


def test_prompts_are_continued_by_the_model_of_the_last_step(folder, capsys):
    run("sampling.prompts=['7 times', '1']", *GREEDY)
    output = capsys.readouterr().out
    for number, prompt in enumerate(["7 times", "1"], 1):
        command = ["--ckpt", "checkpoints/final.ckpt", "--prompt", prompt, "--device", "cpu"]
        assert infer.main(command) == 0
        text = capsys.readouterr().out.removesuffix("\n").replace("\n", " ⏎ ")
        assert f"sample {number:2d}: {prompt}{text}\n" in output


SUITE = """
schema: 1
name: sums
cases:
  - id: a
    type: choice
    category: digits
    prompt: "7 times 7 is"
    answers: [" 49"]
    distractors: [" 4q"]
  - {id: b, type: minimal_pair, category: order, good: "3 times", bad: "3 semit"}
"""


def test_each_validation_scores_the_probe_cases_as_the_evaluator_does(folder, capsys):
    """The last one's scores are those of final.ckpt; a resumed run may have other cases."""
    Path("sums.yaml").write_text(SUITE)
    run("training.probe_cases=[sums.yaml]", "training.max_steps=10")
    assert capsys.readouterr().err.count("probes ") == 2
    macros = {int(r["step"]): float(r["probe/macro"]) for r in read_rows() if r["probe/macro"]}
    [result] = results.evaluate(["checkpoints/final.ckpt"], load_suite("sums.yaml"))
    assert list(macros) == [5, 10] and macros[10] == result.macro
    events = read_events("logs/validation")
    logged = {
        name: events.Scalars(name)[-1].value
        for name in events.Tags()["scalars"]
        if name.startswith("probes/")
    }
    assert logged == pytest.approx(scalars(result), rel=1e-5)
    Path("other.yaml").write_text(SUITE.replace("id: a", "id: c"))
    run("training.probe_cases=[other.yaml]", "training.max_steps=12")


def test_the_probes_of_a_step_that_was_saved_before_a_kill_are_made_up_for(folder, monkeypatch):
    """A step is saved before its probes; a step that has them is not scored again."""
    Path("sums.yaml").write_text(SUITE)
    options = ("training.probe_cases=[sums.yaml]", "training.max_steps=10")
    run("run.name=whole", *options)

    def leave(*_, **__):
        raise SystemExit(137)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(monitors, "score_cases", leave)
        run("run.name=killed", *options)
    assert not any(row["probe/macro"] for row in read_rows("logs/killed/metrics.csv"))
    run_stopped_after(7, "run.name=killed", *options)
    run("run.name=killed", *options)
    rows = [rows_without_timing(f"logs/{name}/metrics.csv") for name in ("killed", "whole")]
    assert rows[0] == rows[1]
    assert end_equal("checkpoints/killed", "checkpoints/whole")
    run_stopped_after(5, "run.name=stopped", *options)
    scored = [row["probe/macro"] for row in read_rows("logs/stopped/metrics.csv")]
    run_stopped_after(6, "run.name=stopped", *options)
    again = [row["probe/macro"] for row in read_rows("logs/stopped/metrics.csv")]
    assert [macro for macro in again if macro] == [macro for macro in scored if macro]
