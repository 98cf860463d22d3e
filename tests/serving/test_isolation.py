"""A hostile request may fail itself; the answers of others are what they are without it.

Each is tried in C and in torch, which computes where there is no compiler.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from model import Transformer
from pocketlm.config.sampling import SamplingParams
from pocketlm.inference import engine
from pocketlm.inference.backend import TorchBackend
from pocketlm.inference.engine import Engine, GenerationRequest, RequestFailed
from pocketlm.inference.native import NativeBackend
from pocketlm.serving.batcher import Batcher, Call, TextInProgress
from pocketlm.serving.errors import EngineFailed
from pocketlm.tokenizer.bytes import ByteTokenizer
from tests.support.checkpoints import confident_model

TOKENIZER = ByteTokenizer()
BACKENDS = {"C": NativeBackend, "torch": TorchBackend}
HOSTILE = {
    "temperature of 1e-40": dict(temperature=1e-40),
    "temperature of 1e308": dict(temperature=1e308),
    "top_p of 1e-46": dict(top_p=1e-46),
    "min_p of 1": dict(min_p=1.0),
    "min_p of 1e-320": dict(min_p=1e-320),
    "no token twice": dict(no_repeat_ngram=1),
    "no 100 tokens twice": dict(no_repeat_ngram=100),
    "no token at all": dict(logit_bias=tuple((i, -math.inf) for i in range(TOKENIZER.vocab_size))),
    "biases": dict(logit_bias=((7, 1e6), (8, -1e308), (7, -math.inf))),
    "penalties": dict(repetition_penalty=100.0, frequency_penalty=-2.0, presence_penalty=2.0),
    "stop strings": dict(stop=tuple(chr(33 + i) * 1000 for i in range(64))),
}


@asynccontextmanager
async def running(model: Transformer) -> AsyncIterator[Batcher]:
    batcher = Batcher(model, TOKENIZER, threads=1, max_slots=12, max_queue=12)
    batcher.start(asyncio.get_running_loop())
    try:
        yield batcher
    finally:
        batcher.close()
        await asyncio.to_thread(batcher.thread.join)


async def read(batcher: Batcher, call: Call) -> list[tuple]:
    """Return what came, with all log-probabilities."""
    deltas = [delta async for update in batcher.read(call) for delta in update]
    text = "".join(delta.text for delta in deltas)
    tokens = [token for delta in deltas for _, token in delta.logprobs]
    return [text, deltas[-1].finish_reason, [(token.id, token.logprob) for token in tokens]]


def request_of(prompt: str, **changes: object) -> GenerationRequest:
    params = SamplingParams(**{"seed": 3, "max_new_tokens": 60, "top_p": 0.9} | changes)
    return GenerationRequest(TOKENIZER.encode(prompt), params, None, top_logprobs=1)


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """A model that C or torch decodes."""
    backend = BACKENDS[request.param]
    monkeypatch.setattr("pocketlm.inference.engine.select_backend", backend)
    return confident_model(vocab_size=TOKENIZER.vocab_size, max_seq_len=256)


def test_the_answer_beside_hostile_requests_is_the_answer_alone(model: Transformer) -> None:
    """Of the hostile ones, too, each gets an answer."""
    polite = request_of("the river")

    async def answers() -> list:
        async with running(model) as batcher:
            alone = await read(batcher, batcher.submit([polite], 60))
            calls = [
                batcher.submit([request_of("a" * 100, **changes)], 60)
                for changes in HOSTILE.values()
            ]
            calls.insert(5, batcher.submit([polite], 60))
            results = await asyncio.gather(*(read(batcher, call) for call in calls))
            return [alone, results.pop(5), results]

    alone, beside, theirs = asyncio.run(answers())
    assert beside[:2] == alone[:2]
    # torch adds up a row's products in another order if there are more rows
    tolerance = 0 if engine.select_backend is NativeBackend else 1e-5
    for (token, logprob), (expected, expected_logprob) in zip(beside[2], alone[2], strict=True):
        assert token == expected
        assert logprob == pytest.approx(expected_logprob, rel=0, abs=tolerance)
    for name, (_, finish_reason, _) in zip(HOSTILE, theirs, strict=True):
        assert finish_reason == ("stop" if name == "no token at all" else "length"), name


def test_logits_that_are_nan_end_the_request_that_has_them(model: Transformer) -> None:
    """The embedding of one byte is broken, as an overflow in one context would be."""
    with torch.no_grad():
        model.embed_tokens.weight[ord("X")] = math.nan
        model.lm_head = torch.nn.Linear(32, TOKENIZER.vocab_size, bias=False)
        torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(0))
    never_x = ((ord("X"), -math.inf),)
    good = request_of("the river", logit_bias=never_x)

    async def answers() -> None:
        async with running(model) as batcher:
            alone = await read(batcher, batcher.submit([good], 60))
            calls = [
                batcher.submit([request_of(prompt, logit_bias=never_x)], 60)
                for prompt in ("the river", "the X", "the river")
            ]
            results = await asyncio.gather(
                *(read(batcher, call) for call in calls), return_exceptions=True
            )
            assert isinstance(results[1], EngineFailed)
            assert results[0][:2] == results[2][:2] == alone[:2]

    asyncio.run(answers())


def test_the_engine_goes_on_after_a_request_of_nan(model: Transformer) -> None:
    with torch.no_grad():
        model.embed_tokens.weight[ord("X")] = math.nan
        model.lm_head = torch.nn.Linear(32, TOKENIZER.vocab_size, bias=False)
    three = Engine(model, max_slots=3)
    params = {"max_new_tokens": 4, "logit_bias": ((ord("X"), -math.inf),)}
    broken, good = request_of("the X", **params), request_of("the", **params)
    three.add(broken)
    three.add(good)
    with pytest.raises(RequestFailed) as failure:
        three.step()
    assert failure.value.requests == {broken}
    tokens = []
    while three.busy:
        tokens += three.step()
    assert [token.request for token in tokens] == [good] * 4


def test_a_text_that_cannot_be_decoded_fails_alone(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = TextInProgress.push

    def failing_push(text: TextInProgress, token: object) -> object:
        if text.call.requests[0].params.seed == 99:
            raise ZeroDivisionError
        return push(text, token)

    async def answers() -> list:
        async with running(model) as batcher:
            calls = [batcher.submit([request_of("the", seed=seed)], 60) for seed in (3, 99, 3)]
            return await asyncio.gather(
                *(read(batcher, call) for call in calls), return_exceptions=True
            )

    monkeypatch.setattr(TextInProgress, "push", failing_push)
    first, failed, last = asyncio.run(answers())
    assert isinstance(failed, EngineFailed)
    assert first[:2] == last[:2]
