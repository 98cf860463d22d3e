"""A checkpoint under lm-eval scores as in our evaluator, and as lm-eval's own model class."""

import math
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import datasets
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import harness
from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.evaluation.cases import Case, load_suite
from pocketlm.evaluation.likelihood import query_likelihoods
from pocketlm.evaluation.results import evaluate
from pocketlm.evaluation.scoring import Score, encode_case
from pocketlm.inference.generate import complete
from pocketlm.tokenizer.base import END_OF_TEXT
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer
from tests.support.lm_eval_tasks import OWN_SUITE, save_random
from tests.support.models import reference_of

ROOT = Path(__file__).parents[2]
GPT2 = dict(mlp="gelu", position="learned", norm="layernorm", bias=True, n_kv_heads=None)
TOKENIZERS = {
    "byte": ByteTokenizer(),
    "bare": ByteTokenizer(eos=False),
    "bpe": JsonTokenizer.train_bpe(
        ["the cat sat on the mat, and the dogs ran to the sea. abc abc abc xyz 1 2 3 4"] * 50, 290
    ),
}


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


def greedy_text(checkpoint: Checkpoint, prompt: str, n: int) -> str:
    params = SamplingParams(max_new_tokens=n, temperature=0.0)
    return "".join(piece for _, piece in complete(checkpoint, prompt, params))


def instances(kind: str, *arguments: tuple) -> list[Any]:
    return [Instance(kind, {}, each, 0) for each in arguments]


def samples_of(lm: Any, folder: Path, names: list[str]) -> dict[str, dict]:
    """Return lm-eval's record of each case, by its id."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(model=lm, tasks=names, task_manager=manager, log_samples=True)
    samples = chain.from_iterable(results["samples"].values())
    return {sample["doc"]["id"]: sample for sample in samples}


# ---- our evaluator ----


@pytest.mark.parametrize(
    "tokenizer, sizes",
    [("byte", {}), ("bare", {}), ("bpe", {}), ("byte", GPT2)],
    ids=["byte", "bare", "bpe", "gpt2"],
)
def test_each_case_has_the_log_probabilities_and_the_outcome_of_our_evaluator(
    tmp_path, tokenizer, sizes
):
    checkpoint = save_random(tmp_path / "a.ckpt", TOKENIZERS[tokenizer], **sizes)
    (tmp_path / "own.yaml").write_text(own_suite(checkpoint))
    files = [tmp_path / "own.yaml", ROOT / "cases/grammar.yaml", ROOT / "cases/narrative.yaml"]
    suites = [load_suite(file) for file in files]
    for suite in suites:
        harness.export_suite(suite, tmp_path / "tasks")
    tasks = ["own_suite", "grammar", "narrative"]
    samples = samples_of(harness.as_lm(checkpoint), tmp_path / "tasks", tasks)
    scores = {}
    for suite in suites:
        [result] = evaluate([str(checkpoint.path)], suite)
        scores |= {score.case.id: score for score in result.scores}
    assert scores.keys() - samples.keys() == {"any", "free"}
    for name, sample in samples.items():
        if name == "prose":
            bits = -sample["filtered_resps"][0] / math.log(2) / scores[name].bytes
            assert bits == pytest.approx(scores[name].bits_per_byte, abs=1e-5)
        else:
            assert_same_score(checkpoint, scores[name], sample)
    assert {sample["acc"] for name, sample in samples.items() if name != "prose"} == {0, 1}


def own_suite(checkpoint: Checkpoint) -> str:
    """Return a suite with one answer that the checkpoint writes greedily."""
    for letters in product(ascii_lowercase, repeat=2):
        prompt = "".join(letters)
        answer = greedy_text(checkpoint, prompt, 1)
        if answer.isalnum():
            return OWN_SUITE.replace("PROMPT", prompt).replace("GREEDY", answer)
    raise AssertionError("no prompt is followed by a letter or a digit")


def assert_same_score(checkpoint: Checkpoint, score: Score, sample: dict) -> None:
    """Compare our log-probabilities and outcome with lm-eval's."""
    case = score.case
    queries = encode_case(checkpoint.tokenizer, case, checkpoint.model.max_seq_len).queries
    likelihoods = query_likelihoods(checkpoint.model, queries)
    candidates = case.candidates or [(case.prompt, case.answers[0])]
    ours = {
        candidate: likelihoods[query].logprob
        for candidate, query in zip(candidates, queries, strict=True)
    }
    theirs = {
        tuple(arguments): logprob
        for arguments, (logprob, _) in zip(
            sample["arguments"], sample["filtered_resps"], strict=True
        )
    }
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert not score.tie
    assert sample["acc"] == score.correct_by.get("sum", score.correct), case.id
    if "acc_bytes" in sample:
        assert sample["acc_bytes"] == score.correct_by["byte"], case.id


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 63, 64, 65, 96, 111])
def test_a_rolling_likelihood_is_the_log_probability_of_our_text_cases(tmp_path, n):
    checkpoint = save_random(tmp_path / "a.ckpt", ByteTokenizer(), max_seq_len=32)
    text = ("the cat sat on the mat, " * 9)[:n]
    [total] = harness.as_lm(checkpoint).loglikelihood_rolling(
        instances("loglikelihood_rolling", (text,))
    )
    if n == 0:
        assert total == 0
        return
    queries = encode_case(checkpoint.tokenizer, Case("a", "text", text=text), 32).queries
    likelihoods = query_likelihoods(checkpoint.model, queries).values()
    expected = math.fsum(likelihood.logprob for likelihood in likelihoods)
    assert total == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_generation_is_that_of_infer_and_ends_before_until(tmp_path, tokenizer):
    checkpoint = save_random(tmp_path / "a.ckpt", TOKENIZERS[tokenizer])
    lm = harness.as_lm(checkpoint)
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
    lm = harness.as_lm(save_random(tmp_path / "a.ckpt", ByteTokenizer()))
    requests = instances(
        "generate_until",
        *[("the", {"max_gen_toks": 20, "do_sample": True, "temperature": 1.5, "until": []})] * 2,
    )
    torch.manual_seed(7)
    first = lm.generate_until(requests)
    torch.manual_seed(7)
    assert first[0] != first[1]
    assert lm.generate_until(requests) == first


# ---- lm-eval's own class ----


def hflm(checkpoint: Checkpoint, prefix: bool = True) -> Any:
    """Return lm-eval's model class around a LlamaForCausalLM with the same weights.

    With `prefix`, it adds the document prefix to every text.
    """
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
    checkpoint = save_random(tmp_path_factory.mktemp("both") / "a.ckpt", TOKENIZERS["bpe"])
    return harness.as_lm(checkpoint), hflm(checkpoint), hflm(checkpoint, prefix=False)


def test_our_class_and_that_of_lm_eval_agree_on_every_choice(both, tmp_path):
    for name in ("grammar", "narrative"):
        harness.export_suite(load_suite(ROOT / f"cases/{name}.yaml"), tmp_path)
    ours, theirs = (samples_of(lm, tmp_path, ["grammar", "narrative"]) for lm in both[:2])
    assert ours.keys() == theirs.keys()
    for name in ours:
        for (a, greedy), (b, greedy_too) in zip(
            ours[name]["filtered_resps"], theirs[name]["filtered_resps"], strict=True
        ):
            assert (a, greedy) == (pytest.approx(b, abs=1e-4), greedy_too)
        assert ours[name]["acc"] == theirs[name]["acc"]


def test_long_requests_are_cut_as_lm_eval_cuts_them(both, capsys):
    """Requests and prompts lose their start, and texts are cut into windows."""
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
    message = "1 of 4 requests do not fit 160 tokens and lose their start"
    assert message in capsys.readouterr().err
    texts = instances("loglikelihood_rolling", (words,), (words[:50],), (words[:300],))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs_bare.loglikelihood_rolling(texts), abs=1e-3
    )
    requests = instances(
        "generate_until", *[(words[:n], {"max_gen_toks": 30, "until": ["q"]}) for n in (20, 700)]
    )
    assert ours.generate_until(requests) == theirs.generate_until(requests)
    with pytest.raises(UserError, match="this model can score 1 to 160 tokens after 1 or more"):
        ours.loglikelihood(instances("loglikelihood", ("the", words)))
