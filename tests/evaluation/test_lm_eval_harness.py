"""lm-evaluation-harness on our checkpoints and our suites: case by case what our evaluator says, and what lm-eval's own class says."""

import json
import math
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import datasets
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import harness
from pocketlm.checkpoint.format import checkpoint_metadata, save_checkpoint
from pocketlm.checkpoint.loading import Checkpoint, load_checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.config.sections import Config, DataConfig, TrainingConfig
from pocketlm.errors import UserError
from pocketlm.evaluation import lm_eval_harness
from pocketlm.evaluation.cases import Case, load_suite
from pocketlm.evaluation.likelihood import query_likelihoods
from pocketlm.evaluation.results import evaluate
from pocketlm.evaluation.scoring import encode_case
from pocketlm.inference.generate import complete
from pocketlm.tokenizer.base import END_OF_TEXT, Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.models import random_model, reference_of

ROOT = Path(__file__).parents[2]
GPT2 = dict(mlp="gelu", position="learned", norm="layernorm", bias=True, n_kv_heads=None)
TOKENIZERS = {
    "byte": ByteTokenizer(),
    "bare": ByteTokenizer(eos=False),
    "bpe": JsonTokenizer.train_bpe(
        ["the cat sat on the mat, and the dogs ran to the sea. abc abc abc xyz 1 2 3 4"] * 50, 290
    ),
}
SUITE = r"""
schema: 1
name: own suite
cases:
  - {id: sea, type: choice, prompt: "the dogs ran to the", answers: [" sea"], distractors: [" mat", " cats and the dogs", " é"]}
  - {id: four, prompt: "1 2 3", answers: [" 4", " four"], distractors: [" 5", " 3", " 2"]}
  - {id: merged, prompt: "xyz ab", answers: ["c"], distractors: ["d", "cb"], joined: true}
  - {id: line, type: choice, prompt: "the cat\n", answers: ["sat"], distractors: ["mat", "ran"]}
  - {id: digits, type: choice, prompt: "1", answers: ["2"], distractors: [" 0", "{{prompt}}"], joined: true}
  - {id: bytes, type: choice, prompt: "the cat", answers: [" ran"], distractors: [" sat"], scoring: byte}
  - {id: pair, type: minimal_pair, good: "the cat sat.", bad: "the sat cat."}
  - {id: other-pair, type: minimal_pair, good: "The dogs run, [0]", bad: "The dogs runs, [0]"}
  - {id: which, type: schema, contexts: ["the cat", "the dogs", "xyz"], gold: 1, continuation: " ran to the sea."}
  - {id: what, type: schema, contexts: ["1", "0"], continuation: " 2"}
  - {id: next, prompt: "the cat sat on the", answers: [" mat"]}
  - {id: next-token, prompt: "PROMPT", answers: ["GREEDY"], joined: true}
  - {id: prose, type: text, text: "the cat sat on the mat."}
  - {id: any, prompt: "the dogs", answers: [" ran", " sat"]}
  - {id: free, type: generate, prompt: "the", match: "cat"}
"""


@pytest.fixture(scope="module", autouse=True)
def cached_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets"))
        )
        yield


def save(path: Path, tokenizer: Tokenizer, **sizes: Any) -> Checkpoint:
    """A checkpoint of random weights, so large that the scores differ much."""
    model = random_model(vocab_size=tokenizer.vocab_size, **{"max_seq_len": 160} | sizes)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1) if name.endswith(
            "bias"
        ) else None  # larger ones would decide alone
    c = model.config
    config = Config(
        model=c,
        data=DataConfig(tokenizer=tokenizer.name),
        training=TrainingConfig(seq_len=c.max_seq_len),
    )
    kit = checkpoint_metadata(config, tokenizer.state(), tokens=10, val_loss=2.0)
    save_checkpoint(
        {
            "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()},
            "global_step": 1,
            "kit": kit,
        },
        path,
    )
    return load_checkpoint(path)


def greedy_text(checkpoint: Checkpoint, prompt: str, n: int) -> str:
    return "".join(
        piece
        for _, piece in complete(
            checkpoint, prompt, SamplingParams(max_new_tokens=n, temperature=0.0)
        )
    )


def instances(kind: str, *arguments: tuple) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, 0) for each in arguments]


def samples_of(lm: Any, folder: Path, names: list[str]) -> dict[str, dict]:
    """lm-eval's record of each case, by its id."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(model=lm, tasks=names, task_manager=manager, log_samples=True)
    return {sample["doc"]["id"]: sample for task in results["samples"].values() for sample in task}


# ---- our evaluator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokenizer, sizes",
    [("byte", {}), ("bare", {}), ("bpe", {}), ("byte", GPT2)],
    ids=["byte", "bare", "bpe", "gpt2"],
)
def test_each_case_has_the_log_probabilities_and_the_verdict_of_our_evaluator(
    tmp_path, tokenizer, sizes
):
    checkpoint = save(tmp_path / "a.ckpt", TOKENIZERS[tokenizer], **sizes)
    following = (
        (prompt, greedy_text(checkpoint, prompt, 1))
        for prompt in map("".join, product(ascii_lowercase, repeat=2))
    )
    prompt, greedy = next(pair for pair in following if pair[1].isalnum())
    (tmp_path / "own.yaml").write_text(SUITE.replace("PROMPT", prompt).replace("GREEDY", greedy))
    suites = [
        load_suite(path)
        for path in (
            tmp_path / "own.yaml",
            ROOT / "cases/grammar.yaml",
            ROOT / "cases/narrative.yaml",
        )
    ]
    names = [name for suite in suites for name in lm_eval_harness.export(suite, tmp_path / "tasks")]
    samples = samples_of(
        lm_eval_harness.as_lm(checkpoint), tmp_path / "tasks", ["own_suite", "grammar", "narrative"]
    )
    scores = {
        score.case.id: score
        for suite in suites
        for score in evaluate([str(checkpoint.path)], suite)[0].scores
    }
    assert scores.keys() - samples.keys() == {"any", "free"}
    assert names[:4] == [
        "own_suite_choice",
        "own_suite_schema",
        "own_suite_cloze",
        "own_suite_text",
    ]
    for name, sample in samples.items():
        score = scores[name]
        if score.case.type == "text":
            bits = -sample["filtered_resps"][0] / math.log(2) / score.bytes
            assert bits == pytest.approx(score.bits_per_byte, abs=1e-5)
            continue
        theirs = {
            tuple(args): logprob
            for args, (logprob, _) in zip(
                sample["arguments"], sample["filtered_resps"], strict=True
            )
        }
        requests = encode_case(
            checkpoint.tokenizer, score.case, checkpoint.model.config.max_seq_len
        ).requests
        ours = query_likelihoods(checkpoint.model, list(requests))
        candidates = score.case.candidates or [(score.case.prompt, score.case.answers[0])]
        assert theirs == pytest.approx(
            {c: ours[request].logprob for c, request in zip(candidates, requests, strict=True)},
            abs=1e-5,
        )
        assert not score.tie
        assert sample["acc"] == score.correct_by.get("sum", score.correct), name
        if "acc_bytes" in sample:
            assert sample["acc_bytes"] == score.correct_by["byte"], name
    assert {sample["acc"] for name, sample in samples.items() if name != "prose"} == {0, 1}


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 63, 64, 65, 96, 111])
def test_a_rolling_likelihood_is_the_nats_of_our_text_cases(tmp_path, n):
    checkpoint = save(tmp_path / "a.ckpt", ByteTokenizer(), max_seq_len=32)
    text = ("the cat sat on the mat, " * 9)[:n]
    [total] = lm_eval_harness.as_lm(checkpoint).loglikelihood_rolling(
        instances("loglikelihood_rolling", (text,))
    )
    if n == 0:
        assert total == 0
        return
    requests = encode_case(checkpoint.tokenizer, Case("a", "text", text=text), 32).requests
    answers = query_likelihoods(checkpoint.model, list(requests))
    assert total == pytest.approx(math.fsum(a.logprob for a in answers.values()), abs=1e-4)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_generation_is_that_of_infer_and_ends_before_until(tmp_path, tokenizer):
    checkpoint = save(tmp_path / "a.ckpt", TOKENIZERS[tokenizer])
    lm = lm_eval_harness.as_lm(checkpoint)
    whole = greedy_text(checkpoint, "the cat", 40)
    stop = whole[7:9]
    greedy = {"max_gen_toks": 40, "do_sample": False}
    texts = lm.generate_until(
        instances(
            "generate_until",
            ("the cat", greedy | {"until": []}),
            ("the cat", greedy | {"until": [stop, ""]}),
            ("the cat", greedy | {"until": stop, "temperature": 0.0}),
            ("", greedy | {"until": []}),
        )
    )
    assert len(whole) > 10
    assert texts[:3] == [whole, whole[: whole.index(stop)], whole[: whole.index(stop)]]
    assert texts[3] == greedy_text(checkpoint, "", 40)


def test_a_sampled_text_is_another_each_time_and_the_same_under_the_same_seed(tmp_path):
    lm = lm_eval_harness.as_lm(save(tmp_path / "a.ckpt", ByteTokenizer()))
    asked = instances(
        "generate_until",
        *[("the", {"max_gen_toks": 20, "do_sample": True, "temperature": 1.5, "until": []})] * 2,
    )
    torch.manual_seed(7)
    first = lm.generate_until(asked)
    torch.manual_seed(7)
    assert first[0] != first[1]
    assert lm.generate_until(asked) == first


# ---- lm-eval's own class ---------------------------------------------------------------------------------------------


def hflm(checkpoint: Checkpoint, prefix: bool = True) -> Any:
    """Their class around a LlamaForCausalLM of the same weights; the tokenizer adds the prefix where it is told to add any."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    backend = checkpoint.tokenizer.backend
    backend.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, checkpoint.tokenizer.eos_id)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    reference = reference_of(checkpoint.model)
    reference.generation_config.eos_token_id = checkpoint.tokenizer.eos_id
    return HFLM(reference, tokenizer=tokenizer, batch_size=8, device="cpu", add_bos_token=prefix)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    checkpoint = save(tmp_path_factory.mktemp("both") / "a.ckpt", TOKENIZERS["bpe"])
    return lm_eval_harness.as_lm(checkpoint), hflm(checkpoint), hflm(checkpoint, prefix=False)


def test_our_class_and_that_of_lm_eval_agree_on_every_choice(both, tmp_path):
    for name in ("grammar", "narrative"):
        lm_eval_harness.export(load_suite(ROOT / f"cases/{name}.yaml"), tmp_path)
    ours, theirs = (samples_of(lm, tmp_path, ["grammar", "narrative"]) for lm in both[:2])
    assert ours.keys() == theirs.keys()
    for name in ours:
        for (a, greedy), (b, greedy_too) in zip(
            ours[name]["filtered_resps"], theirs[name]["filtered_resps"], strict=True
        ):
            assert (a, greedy) == (pytest.approx(b, abs=1e-4), greedy_too)
        assert ours[name]["acc"] == theirs[name]["acc"]


def test_what_does_not_fit_is_cut_as_lm_eval_cuts_it(both, capsys):
    """Requests lose their beginning, whole texts go in windows, prompts leave room for what is generated."""
    ours, theirs, theirs_bare = both
    words = "the cat sat on the mat, and xyz ran." + 19 * " the cat sat on the mat, and xyz ran."
    pairs = instances(
        "loglikelihood",
        (words, " the dogs"),
        (words[:36], " the dogs"),
        ("", "the dogs ran"),
        ("the", words[3:150]),
    )
    for (a, greedy), (b, greedy_too) in zip(
        ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True
    ):
        assert (a, greedy) == (pytest.approx(b, abs=1e-4), greedy_too)
    assert (
        "1 of 4 requests do not fit 160 tokens and lose their beginning" in capsys.readouterr().err
    )
    texts = instances("loglikelihood_rolling", (words,), (words[:50],), (words[:300],))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs_bare.loglikelihood_rolling(texts), abs=1e-3
    )
    asked = instances(
        "generate_until", *[(words[:n], {"max_gen_toks": 30, "until": ["q"]}) for n in (20, 700)]
    )
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    with pytest.raises(UserError, match="this model answers to 1 to 160, behind 1 or more"):
        ours.loglikelihood(instances("loglikelihood", ("the", words)))


# ---- exporting -------------------------------------------------------------------------------------------------------


def test_what_is_not_exported_is_said(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(SUITE.replace("scoring: byte", "scoring: pmi"))
    assert (
        harness.main(
            ["export", "--cases", str(tmp_path / "own.yaml"), "--to", str(tmp_path / "new/tasks")]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out.split() == [
        "own_suite_choice",
        "own_suite_schema",
        "own_suite_cloze",
        "own_suite_text",
    ]
    assert err.splitlines() == [
        "own suite: 1 cases with several answers and no distractors are left out",
        "own suite: 1 cases of type generate are left out",
        "own suite: 1 cases are scored by token or pmi here, and by their sum in lm-eval",
    ]


def test_right_choices_do_not_always_stand_first():
    """lm-eval takes the first of equal choices, so that a model that knows nothing would be right."""
    rows = [
        lm_eval_harness.as_row(case)[1] for case in load_suite(ROOT / "cases/grammar.yaml").cases
    ]
    assert 0.3 < sum(row["target"] == [0] for row in rows) / len(rows) < 0.7
    case = Case("a", "choice", prompt="p", answers=("1", "2"), distractors=("3", "4", "5"))
    for each in map(str, range(9)):
        _, row = lm_eval_harness.as_row(
            Case(
                each, **{k: getattr(case, k) for k in ("type", "prompt", "answers", "distractors")}
            )
        )
        assert sorted(row["choices"]) == ["1", "2", "3", "4", "5"]
        assert [row["choices"][i] for i in row["target"]] == ["1", "2"]


# ---- the command line ------------------------------------------------------------------------------------------------


def test_run_prints_the_accuracies_as_a_table_or_as_json(tmp_path, capsys):
    checkpoint = save(tmp_path / "a.ckpt", ByteTokenizer())
    lm_eval_harness.export(load_suite(ROOT / "cases/grammar.yaml"), tmp_path)
    arguments = [
        "run",
        "--ckpt",
        str(checkpoint.path),
        "--include",
        str(tmp_path),
        "--tasks",
        "grammar",
    ]
    assert harness.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    [result] = evaluate([str(checkpoint.path)], load_suite(ROOT / "cases/grammar.yaml"))
    assert report["results"]["grammar_choice"]["acc,none"] == pytest.approx(result.correct.mean())
    assert report["config"]["weights_sha256"] == checkpoint.weights_sha256
    assert harness.main([*arguments, "--limit", "3"]) == 0
    assert "|grammar_choice|" in capsys.readouterr().out


def test_mistakes_get_one_sentence(tmp_path, monkeypatch):
    checkpoint = save(tmp_path / "a.ckpt", CharTokenizer.train(["the cat sat."], eos=False))
    (tmp_path / "own.yaml").write_text(SUITE.replace("the sat cat", "cat the sat"))
    (tmp_path / "twin.yaml").write_text(SUITE.replace("own suite", "own/suite"))
    lm_eval_harness.export(load_suite(tmp_path / "own.yaml"), tmp_path)
    ask = ["run", "--ckpt", str(checkpoint.path), "--include", str(tmp_path), "--tasks"]
    for arguments, message in [
        (
            [*ask, "own_suite_choice"],
            "a task asks 12 tokens behind 0; this model answers to 1 to 160, behind 1 or more",
        ),
        ([*ask[:-2], str(tmp_path / "none"), "--tasks", "own_suite"], "none is not a folder"),
        (
            ["export", "--cases", str(tmp_path / "*n.yaml"), "--to", str(tmp_path)],
            "two suites are called own_suite",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            harness.main(arguments)
    lm_eval_harness.lm_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match="lm-eval cannot be imported"):
        lm_eval_harness.as_lm(checkpoint)


@pytest.mark.slow
def test_a_task_that_is_nowhere_is_told_with_those_of_the_folder(tmp_path):
    checkpoint = save(tmp_path / "a.ckpt", ByteTokenizer())
    (tmp_path / "own.yaml").write_text(SUITE)
    lm_eval_harness.export(load_suite(tmp_path / "own.yaml"), tmp_path)
    with pytest.raises(
        UserError,
        match="no task of lm-eval is called grammer; .* there are own_suite, own_suite_choice",
    ):
        harness.main(
            [
                "run",
                "--ckpt",
                str(checkpoint.path),
                "--include",
                str(tmp_path),
                "--tasks",
                "own_suite,grammer",
            ]
        )
