"""`echo`: a completion that begins with its prompt, and lm-eval's scores by way of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import harness
from pocketlm.config.sampling import SamplingParams
from pocketlm.evaluation.cases import load_suite
from pocketlm.inference.engine import GenerationRequest
from pocketlm.inference.generate import encode_prompt
from pocketlm.serving.limits import ServerLimits
from pocketlm.serving.responses import Echo, TokenFormatter
from pocketlm.tokenizer.base import BEGIN_OF_TEXT, END_OF_TEXT
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.build import from_state
from pocketlm.tokenizer.bytes import ByteTokenizer
from tests.support.lm_eval_tasks import save_random
from tests.support.server import RunningServer, error_of, serving_in_thread

PROMPT = "hello, what 😀 is"


def prompt_logprobs(server: RunningServer, ids: list[int]) -> torch.Tensor:
    """Return the model's log-probabilities (T - 1, V) of the tokens after the first."""
    with torch.inference_mode():
        return server.checkpoint.model(torch.tensor([ids]))[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("form", ["text", "ids"])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_an_echo_has_the_log_probabilities_of_the_prompt_before_those_of_the_answer(
    server: RunningServer, form: str, max_tokens: int
) -> None:
    ids = encode_prompt(server.checkpoint.tokenizer, PROMPT)
    prompt = PROMPT if form == "text" else ids
    options = {"temperature": 0, "logprobs": 3, "max_tokens": max_tokens}
    response = server.complete(prompt, echo=True, **options)
    [choice], logprobs = response.choices, response.choices[0].logprobs
    plain = server.complete(prompt, temperature=0, logprobs=3, max_tokens=5).choices[0]
    shown = plain.text if max_tokens else ""
    assert choice.text == PROMPT + shown
    assert choice.finish_reason == "length"
    assert response.usage.completion_tokens == max_tokens
    assert response.usage.prompt_tokens == len(ids)

    if form == "text":  # the document prefix is no part of it
        [prefix] = server.checkpoint.tokenizer.document_prefix
        assert ids[0] == prefix
    else:
        assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
        assert logprobs.tokens.pop(0) == BEGIN_OF_TEXT
        for each in (logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset):
            del each[0]
    n = len(ids) - 1
    format_token = TokenFormatter(server.checkpoint.tokenizer).format
    assert logprobs.tokens[:n] == [format_token(i)[0] for i in ids[1:]]
    rows = prompt_logprobs(server, ids)
    for i, (token, row) in enumerate(zip(ids[1:], rows, strict=True)):
        # float32, in another order
        assert logprobs.token_logprobs[i] == pytest.approx(row[token].item(), abs=1e-4)
        best = row.topk(3)
        expected = {
            format_token(j)[0]: value
            for j, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        }
        assert logprobs.top_logprobs[i] == pytest.approx(expected, abs=1e-4)
    for token, offset in zip(logprobs.tokens[:n], logprobs.text_offset, strict=False):
        assert token.startswith("bytes:") or choice.text.startswith(token, offset)
    if max_tokens:
        assert logprobs.tokens[n:] == plain.logprobs.tokens
        shifted = [offset + len(PROMPT) for offset in plain.logprobs.text_offset]
        assert logprobs.text_offset[n:] == shifted
    else:
        assert len(logprobs.tokens) == n


def test_an_echo_streams_the_prompt_first_for_each_prompt_and_sample(
    server: RunningServer,
) -> None:
    prompts = ["hello", "what is up"]
    options = {"seed": 4, "n": 2, "max_tokens": 6, "echo": True}
    whole = server.complete(prompts, logprobs=1, **options)
    texts, tokens = [""] * 4, [[] for _ in range(4)]
    for chunk in server.complete(prompts, logprobs=1, stream=True, **options):
        [choice] = chunk.choices
        if not texts[choice.index]:
            assert choice.text.startswith(prompts[choice.index // 2])
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    without = server.complete(prompts, **(options | {"echo": False}))
    assert [prompts[i // 2] + without.choices[i].text for i in range(4)] == texts


def test_a_prompt_that_had_no_slot_before_the_deadline_is_echoed_without_scores() -> None:
    request = GenerationRequest([104, 105], SamplingParams(), score_prompt=True)
    echo = Echo.of(ByteTokenizer(), request, None)
    assert [(row.offset, row.token.id, row.token.logprob) for row in echo.logprobs()] == [
        (0, 104, None),
        (1, 105, None),
    ]


def test_an_echo_of_ids_outside_the_vocabulary_is_refused(server: RunningServer) -> None:
    body = {"model": server.name, "prompt": [10**6], "echo": True, "logprobs": 1}
    assert error_of(server.post("/v1/completions", json=body))["param"] == "prompt"


# ---- lm-eval ----

TEXTS = ["the cat sat on the mat, and the dogs ran to the sea. abc abc xyz 1 2 3 4"] * 50
N_CASES = 40
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


def save_tokenizer(tokenizer: JsonTokenizer, folder: Path) -> str:
    """Save it for transformers, with the document prefix in front of each text, as we have it."""
    backend = from_state(tokenizer.state()).backend
    backend.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.eos_id)]
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    theirs.save_pretrained(folder)
    return str(folder)


def samples_of(lm: Any, folder: Path, names: list[str]) -> dict[str, dict]:
    """Return lm-eval's record of each case, by its id."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(
        model=lm, tasks=names, task_manager=manager, log_samples=True, limit=N_CASES
    )
    return {sample["doc"]["id"]: sample for task in results["samples"].values() for sample in task}


@pytest.mark.parametrize(
    "suite, tokenized", [("grammar", True), ("narrative", False)], ids=["ids", "texts"]
)
def test_lm_eval_through_the_server_scores_each_case_as_harness_py(
    tmp_path: Path, suite: str, tokenized: bool
) -> None:
    """As `lm_eval --model local-completions` does, many cases to a request.

    Only ids can be a case without a context, as the grammar's are: lm-eval would write the token
    that begins a document as a text.
    """
    checkpoint = save_random(tmp_path / "a.ckpt", JsonTokenizer.train_bpe(TEXTS, 290))
    harness.export_suite(load_suite(ROOT / f"cases/{suite}.yaml"), tmp_path / "tasks")
    ours = samples_of(harness.as_lm(checkpoint), tmp_path / "tasks", [suite])
    with serving_in_thread(checkpoint, ServerLimits(max_slots=4)) as server:
        remote = LocalCompletionsAPI(
            model=server.name,
            base_url=f"{server.url}/v1/completions",
            tokenizer=save_tokenizer(checkpoint.tokenizer, tmp_path / "tokenizer"),
            tokenized_requests=tokenized,
            add_bos_token=tokenized,  # the server adds the prefix to texts
            batch_size=16,
            max_length=160,
        )
        theirs = samples_of(remote, tmp_path / "tasks", [suite])
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 20
    for name in ours:
        for (a, greedy), (b, greedy_too) in zip(
            ours[name]["filtered_resps"], theirs[name]["filtered_resps"], strict=True
        ):
            # float32 sums of a few dozen terms, in another order
            assert (a, greedy) == (pytest.approx(b, abs=1e-4), greedy_too), name
        assert ours[name]["acc"] == theirs[name]["acc"]
