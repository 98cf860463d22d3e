"""Continuous batching: each request gets the tokens it gets alone, in C and in torch."""

import dataclasses
import random

import pytest
import torch

from model import KVCache, Transformer
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.inference.backend import Chunk, SlotCache, TorchBackend
from pocketlm.inference.engine import Engine, GenerationRequest, Token
from pocketlm.inference.native import NativeBackend
from tests.support.checkpoints import confident_model
from tests.support.models import MIXED

GREEDY = SamplingParams(temperature=0, max_new_tokens=20)


def run(engine: Engine) -> dict[tuple[GenerationRequest, int], list[Token]]:
    """Step until no request is left; return all tokens of each sample."""
    tokens: dict[tuple[GenerationRequest, int], list[Token]] = {}
    while engine.busy:
        for token in engine.step():
            tokens.setdefault((token.request, token.sample), []).append(token)
    return tokens


def alone(model: Transformer, request: GenerationRequest, sample: int = 0) -> list[Token]:
    engine = Engine(model, request.params.num_samples)
    engine.add(request)
    return run(engine)[request, sample]


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def random_requests(count: int, seed: int, **changes: object) -> list[GenerationRequest]:
    """Return prompts and texts shorter and longer than the context of 64."""
    draw = random.Random(seed)
    requests = []
    for i in range(count):
        ids = [draw.randrange(61) for _ in range(draw.randint(1, 90))]
        params = SamplingParams(temperature=1.0, max_new_tokens=draw.randint(1, 90), seed=i)
        requests.append(GenerationRequest(ids, dataclasses.replace(params, **changes)))
    return requests


class RecordingBackend(NativeBackend):
    """The native backend, with a record of what is prefilled."""

    def __init__(self, model: Transformer):
        super().__init__(model)
        self.prefills: list[list[Chunk]] = []

    def prefill(self, cache: SlotCache, chunks: list[Chunk]) -> None:
        self.prefills.append(chunks)
        super().prefill(cache, chunks)


@pytest.mark.parametrize("seed", range(3))
def test_requests_that_join_and_leave_get_what_they_get_alone(seed):
    """There are requests of several samples, and more requests than slots."""
    model = confident_model()
    requests = random_requests(12, seed) + random_requests(3, seed + 100, num_samples=3)
    random.Random(seed).shuffle(requests)
    engine = Engine(model, max_slots=5)
    found: dict = {}
    later = list(requests)
    while engine.busy or later:
        if later:  # one comes while others run
            engine.add(later.pop())
        for token in engine.step():
            found.setdefault((token.request, token.sample), []).append(token)
    assert len(found) == 12 + 9
    for (request, sample), tokens in found.items():
        assert tokens == alone(model, request, sample)
        assert len(tokens) == request.params.max_new_tokens
        assert [token.end for token in tokens] == [None] * (len(tokens) - 1) + ["length"]


@pytest.mark.parametrize("options", [{}, MIXED], ids=["plain", "mixed"])
def test_the_batch_in_torch_gets_the_same_text(options):
    """Decoding is greedy: a rounding may move a draw from one token's share to the next one's."""
    model = confident_model(**options)
    requests = random_requests(8, 5, temperature=0)
    engine = Engine(model, max_slots=3, backend=TorchBackend(model))
    for request in requests:
        engine.add(request)
    found = run(engine)
    for request in requests:
        assert ids_of(found[request, 0]) == ids_of(alone(model, request))


def test_a_later_sample_is_the_first_one_of_a_later_seed():
    model = confident_model()
    many = GenerationRequest(
        [5, 6, 7], SamplingParams(temperature=1.0, max_new_tokens=20, num_samples=4, seed=10)
    )
    for sample in range(4):
        one = GenerationRequest(
            [5, 6, 7], SamplingParams(temperature=1.0, max_new_tokens=20, seed=10 + sample)
        )
        assert ids_of(alone(model, many, sample)) == ids_of(alone(model, one))


def test_samples_share_one_pass_over_the_prompt():
    backend = RecordingBackend(confident_model())
    engine = Engine(backend.model, 4, backend=backend)
    engine.add(GenerationRequest(list(range(30)), SamplingParams(max_new_tokens=5, num_samples=4)))
    run(engine)
    assert sum(backend.prefills, []) == [(0, list(range(29)))]


def test_prompts_that_wait_together_are_prefilled_together_up_to_the_budget(monkeypatch):
    """What does not fit waits whole: where a prompt is cut may not depend on the others."""
    monkeypatch.setattr("pocketlm.inference.engine.PREFILL_BUDGET", 10)
    backend = RecordingBackend(confident_model())
    engine = Engine(backend.model, max_slots=6, backend=backend)
    for length in (4, 5, 1, 6, 24, 3):  # the last token of each is left to the decoding step
        engine.add(GenerationRequest(list(range(length)), SamplingParams(max_new_tokens=20)))
    n_running = []
    for _ in range(5):
        engine.step()
        n_running.append(len(engine.running))
    lengths = [[len(ids) for _, ids in chunks] for chunks in backend.prefills]
    assert lengths == [[3, 4, 0], [5], [10], [10], [3, 2]]
    assert n_running == [3, 4, 4, 4, 6]


@pytest.mark.parametrize("native_max", [0, 3, 100])
@pytest.mark.parametrize("budget", [1, 4, 7, 29, 30])
def test_a_prefill_in_chunks_by_c_or_torch_equals_one_of_the_whole_prompt(
    monkeypatch, budget, native_max
):
    model = confident_model()
    monkeypatch.setattr("pocketlm.inference.engine.PREFILL_BUDGET", budget)
    monkeypatch.setattr("pocketlm.inference.native.NATIVE_PREFILL_MAX", native_max)
    engine = Engine(model, max_slots=3)
    engine.add(
        GenerationRequest(
            list(range(30)), SamplingParams(temperature=0.0, max_new_tokens=3, num_samples=2)
        )
    )
    while engine.waiting or engine.prefilling:
        engine.admit()
    whole = KVCache(model.config, 1, 32, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode():
        model.hidden(torch.arange(29)[None], cache=whole)
    for slot in range(2):
        assert engine.cache.lengths[slot] == 29
        keys, values = engine.cache.keys[:, slot, :, :29], engine.cache.values[:, slot, :, :29]
        # float32 sums of 32 products of numbers about 1, in other orders
        torch.testing.assert_close(keys, whole.keys[:, 0, :, :29], rtol=0, atol=1e-5)
        torch.testing.assert_close(values, whole.values[:, 0, :, :29], rtol=0, atol=1e-5)


def test_others_get_their_tokens_and_leave_while_a_long_prompt_is_prefilled(monkeypatch):
    """The long one gets what it gets alone, though its slot changes.

    A request that is cancelled during its prefill leaves no trace.
    """
    monkeypatch.setattr("pocketlm.inference.engine.PREFILL_BUDGET", 2)
    monkeypatch.setattr("pocketlm.inference.native.NATIVE_PREFILL_MAX", 0)
    model = confident_model()

    def request_of(ids: range, max_new_tokens: int, seed: int) -> GenerationRequest:
        params = SamplingParams(temperature=1.0, max_new_tokens=max_new_tokens, seed=seed)
        return GenerationRequest(list(ids), params)

    short = [request_of(range(n, n + 2), count, n) for n, count in enumerate((4, 6, 9))]
    long, gone, last = (request_of(range(n, n + 21), 5, n) for n in (1, 2, 3))
    engine = Engine(model, max_slots=4)
    for request in (*short, long, gone, last):
        engine.add(request)
    found: dict = {request: [] for request in (*short, long, gone, last)}
    during = 0
    while engine.busy:
        tokens = engine.step()
        prefilling = engine.prefilling[0].request if engine.prefilling else None
        if prefilling is long:
            during += len(tokens)
        if prefilling is gone and len(engine.unread_prompt) < 10:
            engine.cancel(gone)
            assert not engine.prefilling
        for token in tokens:
            found[token.request].append(token)
    assert during > 10
    assert found[gone] == []
    for request in (*short, long, last):
        assert ids_of(found[request]) == ids_of(alone(model, request))


@pytest.mark.parametrize("backend", [NativeBackend, TorchBackend])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_broken_weights_says_so(backend, temperature):
    model = confident_model()
    torch.nn.init.constant_(model.layers[1].mlp.up_proj.weight, float("nan"))
    engine = Engine(model, max_slots=1, backend=backend(model))
    engine.add(GenerationRequest([1, 2, 3], SamplingParams(temperature=temperature)))
    with pytest.raises(UserError, match="its weights are broken"):
        engine.step()


def test_a_cancelled_request_leaves_and_the_others_go_on():
    model = confident_model()
    requests = random_requests(4, 9, max_new_tokens=30)
    engine = Engine(model, max_slots=3)
    for request in requests:
        engine.add(request)
    found: dict = {request: [] for request in requests}
    for step in range(200):
        if step == 6:
            engine.cancel(requests[0])
        if step == 8:
            engine.cancel(requests[0])  # once more does nothing
        for token in engine.step():
            found[token.request].append(token)
    assert not engine.busy
    assert len(found[requests[0]]) == 6
    assert all(found[request] == alone(model, request) for request in requests[1:])
    engine.add(requests[0])
    engine.cancel(requests[0])  # before its turn
    assert not engine.busy
    assert engine.step() == []


def test_one_sample_can_be_cancelled():
    model = confident_model()
    request = GenerationRequest(
        [1, 2], SamplingParams(temperature=1.0, max_new_tokens=10, num_samples=3, seed=1)
    )
    engine = Engine(model, 3)
    engine.add(request)
    found: dict = {0: [], 1: [], 2: []}
    while engine.busy:
        for token in engine.step():
            found[token.sample].append(token)
        if len(found[1]) == 4:
            engine.cancel(request, 1)
    assert {sample: len(tokens) for sample, tokens in found.items()} == {0: 10, 1: 4, 2: 10}
    assert found[2] == alone(model, request, 2)


def test_end_tokens_end_a_sample_and_say_so():
    model = confident_model()
    free = ids_of(alone(model, GenerationRequest([3], GREEDY)))
    stop, eos = list(dict.fromkeys(free))[3:5]  # the fourth and the fifth that are new
    at_stop, at_eos = free.index(stop) + 1, free.index(eos) + 1
    for request, n in [
        (GenerationRequest([3], GREEDY, eos_id=eos), at_eos),
        (GenerationRequest([3], dataclasses.replace(GREEDY, stop_ids=(stop, eos))), at_stop),
    ]:
        tokens = alone(model, request)
        assert ids_of(tokens) == free[:n]
        assert [token.end for token in tokens] == [None] * (n - 1) + ["stop"]


def test_log_probabilities_are_the_models_own_whatever_the_sampling():
    model = confident_model()
    params = SamplingParams(
        temperature=3.0, top_k=30, repetition_penalty=1.5, max_new_tokens=20, seed=4
    )
    request = GenerationRequest([1, 2, 3], params, top_logprobs=5)
    tokens = alone(model, request)
    ids = torch.tensor([[1, 2, 3, *ids_of(tokens)]])
    with torch.inference_mode():
        expected = model(ids)[0, 2:-1].log_softmax(-1)  # (20, V)
    for token, row in zip(tokens, expected, strict=True):
        # float32, in another order
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        top_ids, top_logprobs = zip(*token.top, strict=True)
        assert list(top_ids) == row.topk(5).indices.tolist()
        assert top_logprobs == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
    # Asking for log-probabilities changes nothing
    assert ids_of(tokens) == ids_of(alone(model, GenerationRequest([1, 2, 3], params)))


def test_requests_with_different_parameters_run_side_by_side():
    model = confident_model()
    kinds = [
        dict(),
        dict(temperature=0),
        dict(top_k=3),
        dict(top_p=0.5),
        dict(min_p=0.3),
        dict(repetition_penalty=1.9),
        dict(no_repeat_ngram=2),
        dict(logit_bias=((7, 4.0),)),
    ]
    common = SamplingParams(temperature=1.0, max_new_tokens=25, seed=2)
    requests = [GenerationRequest([9, 8], dataclasses.replace(common, **kind)) for kind in kinds]
    engine = Engine(model, len(requests))
    for request in requests:
        engine.add(request)
    found = run(engine)
    texts = [ids_of(found[request, 0]) for request in requests]
    assert len({tuple(text) for text in texts}) == len(kinds)
    assert texts == [ids_of(alone(model, request)) for request in requests]
    pairs = set(zip(texts[6], texts[6][1:], strict=False))
    assert len(pairs) == 24  # no_repeat_ngram=2


INVALID = {
    "a prompt needs at least one token": GenerationRequest([], GREEDY),
    "the prompt has the id 61; the vocabulary has 61 tokens": GenerationRequest([61], GREEDY),
    "top_k is 62; the vocabulary has 61 tokens": GenerationRequest([1], SamplingParams(top_k=62)),
    "num_samples is 3; the engine has 2 slots": GenerationRequest(
        [1], SamplingParams(num_samples=3)
    ),
    "logit_bias has the id 90": GenerationRequest([1], SamplingParams(logit_bias=((90, 1.0),))),
    "stop_ids has the id 77": GenerationRequest([1], SamplingParams(stop_ids=(77,))),
}


@pytest.mark.parametrize("message", INVALID)
def test_an_invalid_request_is_refused_at_once(message):
    engine = Engine(confident_model(), 2)
    with pytest.raises(ValueError, match=message):
        engine.add(INVALID[message])
    assert not engine.busy
