"""A real `python serve.py`, asked by OpenAI's own client; and by what no client would send."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import tokenizers as hf
import torch
from tokenizers import decoders, models, normalizers

import serve
from pocketlm.checkpoint.format import checkpoint_metadata, save_checkpoint
from pocketlm.checkpoint.loading import Checkpoint, load_checkpoint
from pocketlm.config.sampling import SamplingConfig, SamplingParams
from pocketlm.config.sections import Config, DataConfig, TrainingConfig
from pocketlm.errors import UserError
from pocketlm.inference.chat import Chat
from pocketlm.inference.conversation import Conversation
from pocketlm.inference.engine import Engine, GenerationRequest
from pocketlm.inference.generate import encode_prompt, generate_texts
from pocketlm.serving import app, guard, service
from pocketlm.serving.batcher import Batcher, EngineFailed
from pocketlm.serving.requests import UNSUPPORTED
from pocketlm.serving.responses import Spelling
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer, SeenBytesTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.inference.test_generate import ROOT
from tests.support.chat import CHATML, chat_tokenizer
from tests.support.checkpoints import confident_model

CONTEXT = 256
KEY = "a key 1234"
TALK = [{"role": "user", "content": "hello, what is up?<|im_end|>"}]


@dataclass
class Served:
    """A server that runs, and what it serves."""

    process: subprocess.Popen
    url: str
    checkpoint: Checkpoint
    said: str  # at start-up, on stderr

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        }

    def post(self, path: str, **more: object) -> httpx.Response:
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"} | more.pop(
            "headers", {}
        )
        return httpx.post(f"{self.url}{path}", headers=headers, timeout=60, **more)

    def raw(self, text: bytes, seconds: float = 30) -> bytes:
        """All that comes back for these bytes, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(text)
            found = b""
            with suppress(ConnectionError):
                while part := connection.recv(65536):
                    found += part
            return found


@contextmanager
def serving(path: Path, *options: str, **environment: str) -> Iterator[Served]:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "serve.py"), "--ckpt", str(path), "--port", "0", *options], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    said = [process.stderr.readline() for _ in range(3)]
    try:
        url = re.search(r"http://\S+", said[1])
        assert url, "".join(said) + process.stderr.read()
        yield Served(process, url[0], load_checkpoint(path), "".join(said))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def write(
    path: Path, tokenizer: Tokenizer, template: str | None = None, context: int = CONTEXT
) -> Path:
    """A checkpoint of random weights, whose texts do not end by themselves too soon."""
    model = confident_model(vocab_size=tokenizer.vocab_size, max_seq_len=context)
    config = Config(
        model=model.config, data=DataConfig(tokenizer="byte"), training=TrainingConfig(seq_len=context),
        sampling=SamplingConfig(temperature=0.9, top_k=40, max_new_tokens=7),
    )  # fmt: skip
    kit = checkpoint_metadata(config, tokenizer.state(), tokens=9, val_loss=2.5) | (
        {"chat_template": template} if template else {}
    )
    save_checkpoint(
        {
            "state_dict": {f"model.{n}": p for n, p in model.state_dict().items()},
            "global_step": 3,
            "kit": kit,
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    """BPE and a chat template."""
    with serving(
        write(tmp_path_factory.mktemp("serve") / "small.ckpt", chat_tokenizer(), CHATML)
    ) as server:
        yield server
        assert "Traceback" not in stop(server)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[Served]:
    """Bytes, no template, a key, and little room. The context is long, so that a text takes a while."""
    path = write(tmp_path_factory.mktemp("serve") / "guarded.ckpt", ByteTokenizer(), context=4096)
    with serving(
        path, "--rows", "2", "--queue", "2", "--deadline", "3", SERVE_API_KEY=KEY
    ) as server:
        yield server
        assert "Traceback" not in stop(server)


def stop(server: Served, sig: int = signal.SIGTERM) -> str:
    """What the server says at its end, which is a good one."""
    server.process.send_signal(sig)
    said = server.process.stderr.read()
    assert server.process.wait(30) == 0, said
    return said


def expected(served: Served, prompts: list[str | list[int]], **params: object) -> list[str]:
    """The same by infer.py."""
    c = served.checkpoint
    ids = [
        encode_prompt(c.tokenizer, prompt) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    return generate_texts(
        c.model, c.tokenizer, ids, replace(SamplingParams(temperature=0.9, top_k=40), **params)
    )


def complete(served: Served, prompt: object = "hello", **more: object):
    return served.client.completions.create(
        model=served.checkpoint.path.stem, prompt=prompt, **more
    )


# ---- completions -----------------------------------------------------------------------------------------------------


def test_greedy_text_is_that_of_infer_for_every_form_of_a_prompt(served):
    ids = served.checkpoint.tokenizer.encode("what is")
    for prompt, prompts in [
        ("hello", ["hello"]),
        (["hello", "what is"], ["hello", "what is"]),
        (ids, [ids]),
        ([ids, [5]], [ids, [5]]),
        ("", [""]),
    ]:
        found = complete(served, prompt, temperature=0, max_tokens=300)  # beyond the context
        assert [choice.text for choice in found.choices] == expected(
            served, prompts, temperature=0, max_new_tokens=300
        )


def test_a_seed_gives_the_same_text_alone_among_others_whole_and_streamed(served):
    alone = expected(served, ["hello"], seed=5, max_new_tokens=60, num_samples=3)
    before = served.metrics()
    with ThreadPoolExecutor(16) as many:
        texts = list(
            many.map(lambda k: complete(served, "hello", seed=k, max_tokens=60), range(5, 21))
        )
    after = served.metrics()
    assert texts[0].choices[0].text == alone[0]
    for k, found in enumerate(texts):
        assert (
            found.choices[0].text == expected(served, ["hello"], seed=5 + k, max_new_tokens=60)[0]
        )
    drawn = sum(found.usage.completion_tokens for found in texts)
    steps = after["serve_step_rows_count"] - before["serve_step_rows_count"]
    assert after["serve_step_rows_sum"] - before["serve_step_rows_sum"] == drawn
    assert steps < drawn / 2  # they ran side by side
    several = complete(served, "hello", seed=5, n=3, max_tokens=60)
    assert [choice.text for choice in several.choices] == alone
    streamed = ["", "", ""]
    for chunk in complete(served, "hello", seed=5, n=3, max_tokens=60, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone


def test_sixteen_at_once_take_hardly_more_steps_than_one(served):
    """They join one by one, a step apart at least."""
    before = served.metrics()["serve_step_rows_count"]
    complete(
        served,
        ["hello"] * 16,
        max_tokens=200,
        temperature=0,
        logit_bias={str(served.checkpoint.tokenizer.eos_id): -100},
    )
    assert 200 <= served.metrics()["serve_step_rows_count"] - before <= 200 + 16


def test_what_is_not_given_is_as_the_checkpoint_says_and_sixteen_tokens(served):
    found = complete(served, seed=3, logit_bias={str(served.checkpoint.tokenizer.eos_id): -100})
    bias = ((served.checkpoint.tokenizer.eos_id, -100.0),)
    assert (
        found.choices[0].text
        == expected(served, ["hello"], seed=3, max_new_tokens=16, logit_bias=bias)[0]
    )
    assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (16, "length")
    assert found.usage.prompt_tokens == len(encode_prompt(served.checkpoint.tokenizer, "hello"))
    assert found.usage.total_tokens == found.usage.prompt_tokens + 16


def test_stop_texts_end_and_are_left_out(served):
    free = expected(served, ["hello"], temperature=0, max_new_tokens=80)[0]
    stop_text = free[20:23]
    found = complete(
        served, temperature=0, max_tokens=80, stop=[stop_text, "never in it"], logprobs=0
    )
    assert found.choices[0].text == free[: free.index(stop_text)]
    assert found.choices[0].finish_reason == "stop"
    assert "".join(found.choices[0].logprobs.tokens).startswith(found.choices[0].text)
    assert found.usage.completion_tokens < 80
    streamed = list(
        complete(
            served,
            temperature=0,
            max_tokens=80,
            stop=stop_text,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in streamed[:-1]) == found.choices[0].text
    assert streamed[-2].choices[0].finish_reason == "stop"
    assert (streamed[-1].choices, streamed[-1].usage) == ([], found.usage)


def test_more_fields_than_openais_reach_the_sampler(served):
    first = served.checkpoint.tokenizer.encode(
        expected(served, ["hello"], temperature=0, max_new_tokens=3)[0]
    )[0]
    more = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "no_repeat_ngram": 2}
    found = complete(served, seed=1, max_tokens=40, extra_body=more, logit_bias={"7": 3})
    assert (
        found.choices[0].text
        == expected(served, ["hello"], seed=1, max_new_tokens=40, logit_bias=((7, 3.0),), **more)[0]
    )
    found = complete(served, temperature=0, max_tokens=40, extra_body={"stop_ids": [first]})
    assert (
        found.choices[0].text,
        found.choices[0].finish_reason,
        found.usage.completion_tokens,
    ) == ("", "stop", 1)


def test_log_probabilities_are_those_of_the_models_own_logits(served):
    c = served.checkpoint
    found = complete(
        served,
        seed=2,
        max_tokens=30,
        logprobs=5,
        logit_bias={"9": 4, str(c.tokenizer.eos_id): -100},
    )
    told, ids = found.choices[0].logprobs, encode_prompt(c.tokenizer, "hello")
    name = Spelling(c.tokenizer).of
    before, checked = "", 0
    for token, nats, top, offset in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True
    ):
        with torch.inference_mode():
            row = c.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        i = next(
            i
            for i in range(c.tokenizer.vocab_size)
            if name(i)[0] == token and abs(row[i].item() - nats) < 1e-4
        )
        best = row.topk(5)
        assert top == pytest.approx(
            {
                name(j)[0]: p
                for j, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            },
            abs=1e-4,
        )
        if not before.startswith("bytes:") and not token.startswith("bytes:"):
            assert found.choices[0].text.startswith(token, offset)
            checked += 1
        ids.append(i)
        before = token
    assert checked > 3


def test_tokens_that_are_pieces_of_characters_are_told_with_the_character(served):
    """Bytes of emoji, forced: four tokens of a byte each make one character."""
    tokenizer = served.checkpoint.tokenizer
    ids = tokenizer.encode("😀")
    assert len(ids) == 4 and b"".join(map(tokenizer.spell, ids)) == "😀".encode()
    bias = {str(i): 100 for i in ids}
    found = list(
        complete(served, temperature=0, max_tokens=24, logprobs=0, stream=True, logit_bias=bias)
    )
    text = "".join(chunk.choices[0].text for chunk in found)
    told = [token for chunk in found for token in chunk.choices[0].logprobs.tokens]
    assert len(told) == 24 and {token.startswith("bytes:") for token in told} == {True}
    spelt = b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) for token in told
    )
    assert text == tokenizer.decode(
        [next(i for i in ids if tokenizer.spell(i) == bytes([byte])) for byte in spelt]
    )


# ---- chat ------------------------------------------------------------------------------------------------------------


def chat(served: Served, messages: list = TALK, **more: object):
    return served.client.chat.completions.create(
        model=served.checkpoint.path.stem, messages=messages, **more
    )


@pytest.mark.parametrize("which", ["served", "guarded"])
def test_an_answer_is_that_of_chat_py_with_a_template_and_by_turns(which, request):
    """Special-token text in what is said stays text, or the prompt would have fewer tokens."""
    served = request.getfixturevalue(which)
    c = served.checkpoint
    params = SamplingParams(temperature=0, max_new_tokens=30, top_k=40)
    answer = "".join(Chat(c, params).answer(TALK[0]["content"]))
    found = chat(served, temperature=0, max_tokens=30)
    assert (found.choices[0].message.content, found.choices[0].message.role) == (
        answer,
        "assistant",
    )
    ids = Conversation(c.tokenizer, c.chat_template).encode(TALK)
    assert found.usage.prompt_tokens == len(ids)
    assert found.usage.completion_tokens <= 30
    streamed = list(chat(served, temperature=0, max_completion_tokens=30, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == answer
    assert streamed[0].choices[0].delta.role == "assistant"
    assert streamed[-1].choices[0].finish_reason == found.choices[0].finish_reason
    parts = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": part} for part in ("hello, what", " is up?<|im_end|>")
            ],
        }
    ]
    assert chat(served, parts, temperature=0, max_tokens=30).choices[0].message.content == answer


def test_a_conversation_goes_on_with_an_answer_as_the_client_has_it(served):
    first = chat(served, temperature=0, max_tokens=5).choices[0].message
    talk = [
        {"role": "developer", "content": "Be kind."},
        *TALK,
        first,
        {"role": "user", "content": "ok"},
    ]
    plain = [
        {"role": "system", "content": "Be kind."},
        *TALK,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "ok"},
    ]
    ids = Conversation(served.checkpoint.tokenizer, CHATML).encode(plain)
    assert chat(served, talk, max_tokens=1).usage.prompt_tokens == len(ids)


def test_log_probabilities_of_an_answer_have_the_tokens_bytes(served):
    found = chat(served, seed=1, max_tokens=8, logprobs=True, top_logprobs=3)
    content = found.choices[0].logprobs.content
    said = b"".join(bytes(token.bytes) for token in content).decode(errors="replace")
    assert said.lstrip() == found.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content)
    ids = Conversation(served.checkpoint.tokenizer, CHATML).encode(TALK)
    with torch.inference_mode():
        best = (
            served.checkpoint.model(torch.tensor([ids]))[0, -1]
            .log_softmax(-1)
            .topk(3)
            .values.tolist()
        )
    assert [each.logprob for each in content[0].top_logprobs] == pytest.approx(best, abs=1e-4)


def test_an_answer_has_512_tokens_at_most_and_the_room_left(served):
    n_prompt = len(Conversation(served.checkpoint.tokenizer, CHATML).encode(TALK))
    never = {
        str(i): -100
        for i in (
            served.checkpoint.tokenizer.eos_id,
            *Conversation(served.checkpoint.tokenizer, CHATML).stop_ids,
        )
    }
    assert chat(served, logit_bias=never).usage.completion_tokens == CONTEXT - n_prompt


# ---- models, health, the page ----------------------------------------------------------------------------------------


def test_the_model_describes_itself(served):
    client, c = served.client, served.checkpoint
    (model,) = client.models.list().data
    assert model == client.models.retrieve("small")
    about = model.checkpoint
    assert about["sha256"] == c.weights_sha256
    assert about["parameters"] == sum(p.numel() for p in c.model.parameters())
    assert (about["step"], about["tokens"], about["val_loss"], about["context"], about["path"]) == (
        3,
        9,
        2.5,
        CONTEXT,
        "small.ckpt",
    )
    assert about["dtype"].startswith("float32 on cpu")
    assert (model.chat, model.sampling["top_k"], model.sampling["temperature"]) == (
        "template",
        40,
        0.9,
    )
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found"
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


def test_start_up_says_what_is_served_and_a_command_that_works(served):
    command = served.said.splitlines()[2]
    assert command.startswith("curl ")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["object"] == "text_completion"


def test_the_page_may_run_what_is_in_it_and_nothing_else(tmp_path, monkeypatch):
    """The hashes are those that a browser computes: of the characters between the tags."""
    monkeypatch.setattr(app, "PAGE", tmp_path / "index.html")
    assert app.read_page() == (None, "")
    (tmp_path / "index.html").write_text(
        "<style>b{}</style><script>\nlet a = 'ä';\n</script>", encoding="utf-8"
    )
    page, policy = app.read_page()
    script = "\nlet a = 'ä';\n".encode()
    digest = subprocess.run(
        ["openssl", "dgst", "-sha256", "-binary"], input=script, capture_output=True
    ).stdout
    encoded = subprocess.run(["base64"], input=digest, capture_output=True).stdout.decode().strip()
    assert (
        f"script-src 'sha256-{encoded}'" in policy
        and "unsafe" not in policy
        and "connect-src 'self'" in policy
    )


# ---- what is refused -------------------------------------------------------------------------------------------------

GOOD = {"model": "small", "prompt": "hello"}
CHAT = {"model": "small", "messages": TALK}
WRONG = [
    ("model", 3, "invalid_type"), ("model", None, "invalid_type"), ("prompt", 3, "invalid_value"), ("prompt", [], "invalid_value"),
    ("prompt", [[]], "invalid_value"), ("prompt", [1, "a"], "invalid_value"), ("prompt", [True], "invalid_value"),
    ("prompt", [-1], "invalid_value"), ("prompt", [10**30], "invalid_value"), ("prompt", {"a": 1}, "invalid_value"),
    ("prompt", "\ud800", "invalid_value"), ("prompt", ["a"] * 65, "array_above_max_length"),
    ("prompt", "a" * 100_001, "string_above_max_length"),
    ("prompt", "a " * 200, "context_length_exceeded"), ("prompt", [5] * 257, "context_length_exceeded"),
    *((name, value, "invalid_type") for name in ("max_tokens", "n", "seed", "top_k", "no_repeat_ngram", "logprobs")
      for value in ("1", 1.5, True, [1], {})),
    *((name, value, "invalid_type") for name in ("temperature", "top_p", "min_p", "repetition_penalty") for value in ("1", True, [1], {})),
    *((name, value, "invalid_value") for name in ("max_tokens", "n") for value in (0, -1, 4097, 10**30)),
    ("temperature", -1, "invalid_value"), ("top_p", 0, "invalid_value"), ("top_p", 1.1, "invalid_value"), ("top_k", -1, "invalid_value"),
    ("top_k", 10**9, "invalid_value"), ("min_p", 2, "invalid_value"), ("repetition_penalty", 0, "invalid_value"),
    ("no_repeat_ngram", -2, "invalid_value"), ("seed", -1, "invalid_value"), ("seed", 2**63, "invalid_value"),
    ("logprobs", 21, "invalid_value"), ("logprobs", -1, "invalid_value"), ("stop", 5, "invalid_value"), ("stop", [5], "invalid_value"),
    ("stop", "", "invalid_value"), ("stop", ["a"] * 65, "invalid_value"), ("stop", "a" * 1001, "invalid_value"),
    ("stop_ids", ["a"], "invalid_type"), ("stop_ids", [-1], "invalid_value"), ("stop_ids", [10**6], "invalid_value"),
    ("logit_bias", {"a": 1}, "invalid_value"), ("logit_bias", {"1": 101}, "invalid_value"), ("logit_bias", {"999999": 1}, "invalid_value"),
    ("logit_bias", {"-1": 1}, "invalid_value"), ("logit_bias", {"1": 1, "01": 2}, "invalid_value"), ("logit_bias", [1], "invalid_type"),
    ("logit_bias", {str(i): 1 for i in range(301)}, "invalid_value"),
    ("stream", "yes", "invalid_type"), ("stream", 1, "invalid_type"), ("stream_options", {"include_usage": True}, "invalid_value"),
    ("user", 5, "invalid_type"), ("colour", 1, "unknown_parameter"), ("max_new_tokens", 5, "unknown_parameter"),
    ("echo", True, "unsupported_parameter"), ("suffix", "x", "unsupported_parameter"), ("best_of", 2, "unsupported_parameter"),
    ("presence_penalty", 0.5, "unsupported_parameter"), ("frequency_penalty", -1, "unsupported_parameter"),
]  # fmt: skip
WRONG_IN_CHAT = [
    ("messages", [], "messages", "invalid_value"), ("messages", "hi", "messages", "invalid_type"),
    ("messages", [{"role": "user"}], "messages[0].content", "missing_required_parameter"),
    ("messages", [*TALK, {"role": "tool", "content": "x"}], "messages[1].role", "invalid_value"),
    ("messages", [{"role": "user", "content": None}], "messages[0].content", "invalid_value"),
    ("messages", [{"role": "user", "content": "\udfff"}], "messages[0].content", "invalid_value"),
    ("messages", [{"role": "user", "content": "x", "name": "y"}], "messages[0].name", "invalid_value"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content", "invalid_value"),
    ("messages", [{"role": "user", "content": "x " * 300}], "messages", "context_length_exceeded"),
    ("messages", [{"role": "user", "content": "".join(map(chr, range(0xE000, 0xF8FF)))}], "messages", "invalid_value"),
    ("tools", [{"type": "function"}], "tools", "unsupported_parameter"),
    ("response_format", {"type": "json_object"}, "response_format", "unsupported_parameter"),
    ("logprobs", 5, "logprobs", "invalid_type"), ("top_logprobs", 5, "top_logprobs", "invalid_value"),
    ("prompt", "x", "prompt", "unknown_parameter"),
    ("max_completion_tokens", 0, "max_tokens", "invalid_value"),
]  # fmt: skip


def refusal(response: httpx.Response, status: int = 400) -> dict:
    """The error of an answer that has OpenAI's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert (
        body["error"]["message"]
        and "\n" not in body["error"]["message"]
        and len(body["error"]["message"]) < 500
    )
    return body["error"]


def test_every_wrong_value_is_refused_by_the_fields_name(served):
    for name, value, code in WRONG:
        error = refusal(served.post("/v1/completions", content=json.dumps(GOOD | {name: value})))
        assert (error["param"].partition("[")[0].partition(".")[0], error["code"]) == (
            name,
            code,
        ), (name, value, error)
        assert name in error["message"] or code == "context_length_exceeded"
    for name, value, param, code in WRONG_IN_CHAT:
        error = refusal(
            served.post("/v1/chat/completions", content=json.dumps(CHAT | {name: value}))
        )
        assert (error["param"], error["code"]) == (param, code), (name, error)
    for body, missing in (({"prompt": "x"}, "model"), ({"model": "small"}, "prompt")):
        assert refusal(served.post("/v1/completions", json=body))["param"] == missing
    assert complete(served).choices  # and it serves on


def test_what_asks_for_nothing_may_be_said(served):
    nothing = {name: values[0] if values else None for name, values in UNSUPPORTED.items()} | {
        "user": "me",
        "stop": None,
        "n": None,
    }
    assert (
        served.post("/v1/completions", json=GOOD | nothing | {"frequency_penalty": 0.0}).status_code
        == 200
    )


def test_bodies_that_are_no_requests_are_refused(served):
    deep = b"[" * 100_000 + b"]" * 100_000
    for body, code in [
        (b"", "invalid_json"), (b"{", "invalid_json"), (b"[]", "invalid_json"), (b"null", "invalid_json"), (b"\xff\xfe{}", "invalid_json"),
        (deep, "invalid_json"), (b'{"model":' + deep + b"}", "invalid_json"), (b'{"a":NaN}', "invalid_json"),
        (b'{"a":-Infinity}', "invalid_json"),
        (b'{"model":"small","prompt":"a","prompt":"b"}', "duplicate_key"),
        (b'{"model":"small","prompt":"a","temperature":1e999}', "invalid_value"),
        (b'{"model":"small","prompt":"a","seed":' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"model":"small","prompt":"a","\\ud800":1}', "invalid_value"),
    ]:  # fmt: skip
        assert refusal(served.post("/v1/completions", content=body))["code"] == code, body[:40]
    refusal(served.post("/v1/completions", content=b" " * (2**20 + 1)), 413)
    refusal(
        served.post("/v1/completions", content=(b" " * 2**16 for _ in range(17))), 413
    )  # chunked: no length is told
    refusal(
        served.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}), 415
    )
    refusal(served.post("/v1/completions/", json=GOOD), 404)
    refusal(httpx.get(f"{served.url}/v2"), 404)
    refusal(httpx.get(f"{served.url}/docs"), 404)
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        refusal(httpx.request(method, f"{served.url}/v1/completions"), 405)


def test_openais_client_raises_what_it_raises_elsewhere(served):
    with pytest.raises(openai.BadRequestError) as error:
        complete(served, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as error:
        served.client.completions.create(model="gpt-4", prompt="x")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_other_hosts_and_origins_are_refused(served):
    port = served.port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        f"127.0.0.1:{port + 1}",
        f"localhost.evil:{port}",
    ):
        refusal(httpx.get(f"{served.url}/health", headers={"host": host}), 403)
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert httpx.get(f"{served.url}/health", headers={"host": host}).status_code == 200
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}"):
        refusal(served.post("/v1/completions", json=GOOD, headers={"origin": origin}), 403)
    own = served.post("/v1/completions", json=GOOD, headers={"origin": served.url})
    assert own.status_code == 200
    assert not [name for name in own.headers if name.startswith("access-control")]


def test_what_is_not_http_gets_an_error_too(served):
    for raw in (
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
    ):
        answer = served.raw(raw)
        assert answer.startswith(b"HTTP/1.1 400 ") and b'{"error":' in answer


def test_a_key_is_asked_of_v1_alone(guarded):
    for header in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": KEY},
        {"authorization": "Bearer \xff".encode("latin-1")},
    ):
        error = refusal(httpx.get(f"{guarded.url}/v1/models", headers=header), 401)
        assert error["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="other", max_retries=0).models.list()
    assert guarded.client.models.list().data[0].id == "guarded"
    assert httpx.get(f"{guarded.url}/health").status_code == 200


# ---- who leaves, who waits -------------------------------------------------------------------------------------------


def until(true, seconds: float = 60) -> None:
    """Wait for what will be; fail where it is not."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def begin(server: Served, **more: object) -> socket.socket:
    """Ask for a text of thousands of tokens, and read nothing."""
    body = json.dumps(
        {
            "model": server.checkpoint.path.stem,
            "prompt": "a",
            "max_tokens": 4096,
            "logit_bias": {"256": -100},
        }
        | more
    )
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = [
        "POST /v1/completions HTTP/1.1",
        f"Host: 127.0.0.1:{server.port}",
        f"Authorization: Bearer {KEY}",
    ]
    head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    connection.sendall("\r\n".join([*head, "", body]).encode())
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_row_back(guarded, stream):
    before = guarded.metrics()
    connection = begin(guarded, stream=stream, n=2)
    until(lambda: guarded.metrics()["serve_running_rows"] == 2)
    connection.close()
    until(lambda: guarded.metrics()["serve_running_rows"] == 0)
    after = guarded.metrics()
    assert after["serve_cancelled_total"] == before["serve_cancelled_total"] + 1
    assert (
        after["serve_completion_tokens_total"] - before["serve_completion_tokens_total"] < 2 * 4096
    )


def test_a_full_queue_says_so_and_a_deadline_cuts(guarded):
    """Two rows, a queue of two: of five requests at once two run, two wait, one is refused; after three seconds all have an answer."""
    running = [begin(guarded) for _ in range(2)]
    until(lambda: guarded.metrics()["serve_running_rows"] == 2)
    waiting = begin(guarded, prompt=["a", "b"])
    until(lambda: guarded.metrics()["serve_waiting_requests"] == 2)
    refused = guarded.post("/v1/completions", json={"model": "guarded", "prompt": "x"})
    assert refusal(refused, 429)["type"] == "rate_limit_error"
    assert refused.headers["retry-after"] == "1"
    for connection in [*running, waiting]:
        with connection:
            answer = connection.recv(2**20)
            while b"\r\n\r\n" not in answer or len(answer.partition(b"\r\n\r\n")[2]) < int(
                re.search(rb"content-length: (\d+)", answer)[1]
            ):
                answer += connection.recv(2**20)
        if b" 503 " in answer.partition(b"\r\n")[0]:  # its turn never came
            assert connection is waiting
            continue
        for choice in json.loads(answer.partition(b"\r\n\r\n")[2])["choices"]:
            assert choice["finish_reason"] == "length"
    until(lambda: guarded.metrics()["serve_running_rows"] == 0)
    assert guarded.metrics()["serve_waiting_requests"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_runs_and_the_server_with_status_0(tmp_path, sig):
    with serving(
        write(tmp_path / "long.ckpt", ByteTokenizer(), context=4096), "--rows", "2"
    ) as server:
        whole, streamed = begin(server), begin(server, stream=True)
        until(lambda: server.metrics()["serve_running_rows"] == 2)
        assert stop(server, sig) == ""
        for connection in (whole, streamed):
            with connection:
                answer = b""
                while part := connection.recv(2**20):
                    answer += part
            assert b" 200 OK" in answer and b'"finish_reason":"length"' in answer
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_an_exception_in_the_engine_ends_the_texts_and_not_the_thread():
    import asyncio

    tokenizer = ByteTokenizer()
    model = confident_model(vocab_size=tokenizer.vocab_size)
    request = GenerationRequest([1, 2], SamplingParams(temperature=0, max_new_tokens=5))

    async def ask(batcher: Batcher) -> str:
        call = batcher.ask([GenerationRequest(request.ids, request.params)], 60)
        return "".join([piece.text async for news in batcher.read(call) for piece in news])

    async def both() -> str:
        batcher = Batcher(model, tokenizer, 1, 2, 8)

        def broken() -> None:
            raise ZeroDivisionError

        batcher._engine.step = broken
        batcher.start(asyncio.get_running_loop())
        with pytest.raises(EngineFailed):
            await ask(batcher)
        text = await ask(batcher)
        batcher.close()
        await asyncio.to_thread(batcher.thread.join)
        return text

    assert asyncio.run(both()) == generate_texts(model, tokenizer, [[1, 2]], request.params)[0]


@pytest.fixture
def impatient(tmp_path, monkeypatch) -> Iterator[Served]:
    """A server of this process, which waits for a fraction of a second wherever it waits for a client."""
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "WRITE_SECONDS"):
        monkeypatch.setattr(guard, name, 0.3)
    checkpoint = load_checkpoint(write(tmp_path / "small.ckpt", ByteTokenizer(), context=4096))
    at = serve.listen("127.0.0.1", 0)
    server = app.build_server(service.Service(checkpoint, {}, 1, 2, 2, 60), None, None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
    thread.start()
    yield Served(None, f"http://127.0.0.1:{at.getsockname()[1]}", checkpoint, "")
    server.should_exit = True
    thread.join()


def test_a_client_that_is_slow_to_ask_is_hung_up_on(impatient):
    """A byte at a time, and never a whole head; and one that says nothing at all."""
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=30) as silent:
        with (
            socket.create_connection(("127.0.0.1", impatient.port), timeout=30) as slow,
            pytest.raises(ConnectionError),
        ):
            for byte in b"GET /health HTTP/1.1\r\nHost: " + b"a" * 600:
                slow.sendall(bytes([byte]))
                time.sleep(0.05)
        with suppress(ConnectionResetError):
            assert silent.recv(1) == b""


def test_a_body_that_does_not_come_is_not_waited_for(impatient):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    assert impatient.raw(head).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_does_not_read_is_hung_up_on(impatient):
    connection = begin(impatient, stream=True, n=2, logprobs=20)  # megabytes
    until(lambda: impatient.metrics()["serve_cancelled_total"] == 1)
    until(lambda: impatient.metrics()["serve_running_rows"] == 0)
    connection.close()


# ---- what was added elsewhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [
    ByteTokenizer(), SeenBytesTokenizer(bytes(range(256))), CharTokenizer.train(["naïve 😀 abc"]), chat_tokenizer(),
    pytest.param("sentencepiece", id="sentencepiece"),
], ids=lambda tokenizer: tokenizer if isinstance(tokenizer, str) else tokenizer.name)  # fmt: skip
def test_spelt_tokens_are_the_text(tokenizer):
    if tokenizer == "sentencepiece":
        tokenizer = llama_tokenizer()
    for text in ("naïve 😀 abc", "😀", "abc abc"):
        ids = tokenizer.encode(text)
        assert (
            b"".join(map(tokenizer.spell, ids)).decode().lstrip(" ")
            == text
            == tokenizer.decode(ids)
        )
    for i in {tokenizer.bos_id, tokenizer.eos_id} - {None}:
        assert tokenizer.spell(i) == b""


def llama_tokenizer() -> JsonTokenizer:
    """SentencePiece's way, as Llama 2 has it: spaces are a letter, and what is in no token is bytes."""
    vocab = {
        token: i
        for i, token in enumerate(
            ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcnve"]
        )
    }
    model = models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = hf.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return JsonTokenizer(backend.to_str(), "llama", 1, None)


# ---- starting --------------------------------------------------------------------------------------------------------


def test_what_cannot_start_is_one_sentence_and_status_2(tmp_path, served):
    (tmp_path / "no.ckpt").write_text("nothing")
    microgpt = str(ROOT / "examples" / "microgpt.ckpt")
    for options, said in [
        (
            ["--ckpt", microgpt, "--port", str(served.port)],
            f"cannot listen on 127.0.0.1, port {served.port}: ",
        ),
        (["--ckpt", str(tmp_path / "no.ckpt"), "--port", "0"], "is truncated or not a checkpoint"),
    ]:
        done = subprocess.run(
            [sys.executable, str(ROOT / "serve.py"), *options], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert (
            done.stderr.startswith("error: ")
            and said in done.stderr
            and done.stderr.count("\n") == 1
        )


@pytest.mark.parametrize("options, said", [
    (["--host", "0.0.0.0"], "lets others than this machine in: set SERVE_API_KEY to a key"),
    (["--host", "example.org"], "lets others than this machine in"),
    (["--port", "70000"], "--port 70000: a port is from 0 to 65535"),
    (["--rows", "0"], "--rows 0: it is from 1 to 1,024"),
    (["--deadline", "nan"], "--deadline nan"),
    (["--api-key", ""], "the API key is empty"),
    (["--api-key", "schlüssel"], "not plain ASCII"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(options, said, monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    with pytest.raises(UserError, match=re.escape(said)):
        serve.parse_args(options)
    assert serve.parse_args(["--host", "0.0.0.0", "--api-key", "x"]).api_key == "x"


def test_a_cache_that_does_not_fit_names_the_option(monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("pocketlm.inference.engine.mmap", refuse)
    with pytest.raises(UserError, match="no memory for 7 rows of 16 tokens: .*; lower --rows"):
        serve.main(
            [
                "--ckpt",
                str(ROOT / "examples" / "microgpt.ckpt"),
                "--port",
                "0",
                "--device",
                "cpu",
                "--rows",
                "7",
            ]
        )


def test_the_cache_takes_memory_only_as_it_is_written_to():
    model = confident_model(vocab_size=257, max_seq_len=4096)
    process = psutil.Process()
    before = process.memory_info().rss
    engine = Engine(model, max_rows=2000)
    size = 2 * engine.cache.keys.numel() * 4
    assert size > 2**29
    engine.add(GenerationRequest([1, 2, 3], SamplingParams(temperature=0.0, max_new_tokens=5)))
    while engine.busy:
        engine.step()
    assert process.memory_info().rss - before < size / 10
