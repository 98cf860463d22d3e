"""Completions: their text is that of infer.py, for every prompt and every option."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from pocketlm.inference.generate import encode_prompt
from tests.support.server import RunningServer


@pytest.mark.parametrize(
    "form", ["text", "texts", "ids", "lists of ids", "empty"], ids=lambda form: form
)
def test_greedy_text_equals_infer_for_every_form_of_a_prompt(
    server: RunningServer, form: str
) -> None:
    ids = server.checkpoint.tokenizer.encode("what is")
    prompt, prompts = {
        "text": ("hello", ["hello"]),
        "texts": (["hello", "what is"], ["hello", "what is"]),
        "ids": (ids, [ids]),
        "lists of ids": ([ids, [5]], [ids, [5]]),
        "empty": ("", [""]),
    }[form]
    beyond_the_context = 300
    response = server.complete(prompt, temperature=0, max_tokens=beyond_the_context)
    expected = server.expected_texts(prompts, temperature=0, max_new_tokens=beyond_the_context)
    assert [choice.text for choice in response.choices] == expected


def test_a_seed_gives_the_same_text_alone_among_others_whole_and_streamed(
    server: RunningServer,
) -> None:
    alone = server.expected_texts(["hello"], seed=5, max_new_tokens=60, num_samples=3)
    before = server.metrics()
    with ThreadPoolExecutor(16) as threads:
        responses = list(
            threads.map(lambda seed: server.complete(seed=seed, max_tokens=60), range(5, 21))
        )
    after = server.metrics()
    assert responses[0].choices[0].text == alone[0]
    for seed, response in enumerate(responses, 5):
        expected = server.expected_texts(["hello"], seed=seed, max_new_tokens=60)
        assert response.choices[0].text == expected[0]
    n_tokens = sum(response.usage.completion_tokens for response in responses)
    n_steps = after["serve_step_rows_count"] - before["serve_step_rows_count"]
    assert after["serve_step_rows_sum"] - before["serve_step_rows_sum"] == n_tokens
    assert n_steps < n_tokens / 2  # the requests shared steps
    samples = server.complete(seed=5, n=3, max_tokens=60)
    assert [choice.text for choice in samples.choices] == alone
    streamed = ["", "", ""]
    for chunk in server.complete(seed=5, n=3, max_tokens=60, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone


def test_defaults_are_the_checkpoints_sampling_and_sixteen_tokens(server: RunningServer) -> None:
    tokenizer = server.checkpoint.tokenizer
    response = server.complete(seed=3, logit_bias={str(tokenizer.eos_id): -100})
    bias = ((tokenizer.eos_id, -100.0),)
    expected = server.expected_texts(["hello"], seed=3, max_new_tokens=16, logit_bias=bias)
    (choice,), usage = response.choices, response.usage
    assert choice.text == expected[0]
    assert (usage.completion_tokens, choice.finish_reason) == (16, "length")
    assert usage.prompt_tokens == len(encode_prompt(tokenizer, "hello"))
    assert usage.total_tokens == usage.prompt_tokens + 16


def test_stop_strings_end_a_text_and_are_not_part_of_it(server: RunningServer) -> None:
    unstopped = server.expected_texts(["hello"], temperature=0, max_new_tokens=80)[0]
    stop = unstopped[20:23]
    options = {"temperature": 0, "max_tokens": 80}
    response = server.complete(stop=[stop, "not in the text"], logprobs=0, **options)
    choice = response.choices[0]
    assert choice.text == unstopped[: unstopped.index(stop)]
    assert choice.finish_reason == "stop"
    assert "".join(choice.logprobs.tokens).startswith(choice.text)
    assert response.usage.completion_tokens < 80
    usage = {"include_usage": True}
    *chunks, last = server.complete(stop=stop, stream=True, stream_options=usage, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (last.choices, last.usage) == ([], response.usage)


def test_fields_that_openai_does_not_have_reach_the_sampler(server: RunningServer) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "no_repeat_ngram": 2}
    response = server.complete(seed=1, max_tokens=40, extra_body=extra, logit_bias={"7": 3})
    expected = server.expected_texts(
        ["hello"], seed=1, max_new_tokens=40, logit_bias=((7, 3.0),), **extra
    )
    assert response.choices[0].text == expected[0]


def test_a_stop_id_ends_a_text(server: RunningServer) -> None:
    text = server.expected_texts(["hello"], temperature=0, max_new_tokens=3)[0]
    stop_ids = server.checkpoint.tokenizer.encode(text)[:1]
    response = server.complete(temperature=0, max_tokens=40, extra_body={"stop_ids": stop_ids})
    choice = response.choices[0]
    assert (choice.text, choice.finish_reason) == ("", "stop")
    assert response.usage.completion_tokens == 1
