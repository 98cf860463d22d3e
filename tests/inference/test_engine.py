"""The running batch: each request gets what it gets alone, in C and in torch; and both equal the model without a cache."""

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from model import KVCache, ModelConfig, Transformer
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.inference import native
from pocketlm.inference.engine import Engine, GenerationRequest, SlotCache, Token, decode_in_torch
from pocketlm.inference.native import NativeStep, NativeUnavailable

SIZES = dict(vocab_size=61, max_seq_len=64, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2)
GREEDY = SamplingParams(temperature=0, max_new_tokens=20)
RELATIVES = {  # of config.py's presets and the models that convert.py reads
    "llama": dict(),
    "llama with biases, its own head": dict(bias=True, tie_embeddings=False),
    "odd widths": dict(d_model=36, d_ff=50, n_heads=6, n_kv_heads=1, vocab_size=67),
    "gpt2": dict(mlp="gelu", position="learned", norm="layernorm", bias=True, n_kv_heads=None),
    "microgpt": dict(
        mlp="relu",
        position="learned",
        norm_gain=False,
        embed_norm=True,
        final_norm=False,
        n_kv_heads=None,
        d_model=16,
    ),
    "randygpt": dict(
        mlp="relu2", position="learned", norm_gain=False, final_norm=False, n_kv_heads=None
    ),
}


def random_model(seed: int = 0, **sizes: object) -> Transformer:
    """A tiny model with weights so large that its greedy text does not repeat itself at once."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**SIZES | sizes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(
            p, std=2 * p.size(1) ** -0.5
        ) if p.dim() == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def in_torch(engine: Engine) -> Engine:
    engine.take = decode_in_torch
    return engine


def run(engine: Engine) -> dict[tuple[GenerationRequest, int], list[Token]]:
    """All tokens of each sample."""
    found: dict[tuple[GenerationRequest, int], list[Token]] = {}
    while engine.busy:
        for token in engine.step():
            found.setdefault((token.request, token.sample), []).append(token)
    return found


def alone(model: Transformer, request: GenerationRequest, sample: int = 0) -> list[Token]:
    engine = Engine(model, request.params.num_samples)
    engine.add(request)
    return run(engine)[request, sample]


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def random_requests(count: int, seed: int, **changes: object) -> list[GenerationRequest]:
    draw = random.Random(seed)
    return [
        GenerationRequest(
            [draw.randrange(61) for _ in range(draw.randint(1, 90))],
            dataclasses.replace(
                SamplingParams(temperature=1.0, max_new_tokens=draw.randint(1, 90), seed=i),
                **changes,
            ),
        )
        for i in range(count)
    ]


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("relative", RELATIVES)
def test_a_step_in_c_and_one_in_torch_equal_the_model_without_a_cache(relative, dtype):
    """Rows of different lengths at once. Torch is compared with in float32 of the same weights."""
    model = random_model(**RELATIVES[relative]).to(dtype)
    exact = random_model(**RELATIVES[relative]).to(dtype).float()
    ids = torch.randint(61, (5, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = exact(ids)
        for step in (NativeStep(model), decode_in_torch):
            cache = SlotCache(model.config, 7, 40, dtype=dtype, device=model.device)
            for b in range(5):
                model.hidden(ids[b : b + 1, : 3 * b + 1], cache=cache.row(b))
                cache.lengths[b] = 3 * b + 1
            for t in range(12):
                at = cache.lengths[:5].clone()
                logits = step(model, cache, ids[range(5), at].tolist()).float()
                error = (logits - expected[range(5), at]).square().mean().sqrt() / expected.std()
                # float32: sums of some 100 terms in another order. bfloat16: some ten roundings by 2^-9 of a value, which add up
                assert error < (1e-5 if dtype == torch.float32 else 0.05), (step, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logits_of_a_row_in_c_are_the_same_to_the_last_bit_whatever_the_batch(dtype):
    model = random_model(d_model=96, d_ff=200, n_heads=6).to(dtype)
    step, ids = (
        NativeStep(model),
        torch.randint(61, (11, 9), generator=torch.Generator().manual_seed(1)),
    )

    def logits_of(rows: list[int]) -> Tensor:
        cache = SlotCache(model.config, len(rows), 16, dtype=dtype, device=model.device)
        return torch.stack([step(model, cache, ids[rows, t].tolist()) for t in range(9)], dim=1)

    together = logits_of(list(range(11)))
    for size in range(1, 11):
        assert torch.equal(logits_of(list(range(size))), together[:size])


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_no_bit(threads):
    """Each waits for what the others make."""
    model, found, before = random_model(n_layers=6), [], torch.get_num_threads()
    ids = torch.randint(61, (40, 7), generator=torch.Generator().manual_seed(1)).tolist()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            step, cache = (
                NativeStep(model),
                SlotCache(model.config, 7, 64, dtype=torch.float32, device=model.device),
            )
            found.append(torch.stack([step(model, cache, tokens) for tokens in ids]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_keys_and_values_written_in_c_are_those_of_the_model():
    model = random_model()
    ids = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(1))
    ours = SlotCache(model.config, 1, 20, dtype=torch.float32, device=model.device)
    theirs = KVCache(model.config, 1, 20, dtype=torch.float32, device=model.device)
    step = NativeStep(model)
    for i in ids[0].tolist():
        step(model, ours, [i])
    with torch.inference_mode():
        model.hidden(ids, cache=theirs)
    torch.testing.assert_close(
        ours.keys, theirs.keys, rtol=1e-5, atol=1e-5
    )  # float32 sums in another order
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-5, atol=1e-5)


def test_without_a_compiler_torch_steps_and_the_reason_is_told(monkeypatch, tmp_path):
    model, request = random_model(), GenerationRequest([1, 2, 3], GREEDY)
    expected = ids_of(alone(model, request))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    engine = Engine(model, 1)
    assert engine.take is decode_in_torch
    assert "no C compiler" in engine.why_torch
    engine.add(request)
    assert ids_of(run(engine)[request, 0]) == expected


def test_a_compiler_that_fails_and_a_model_that_does_not_fit_are_reasons(monkeypatch, tmp_path):
    with pytest.raises(NativeUnavailable, match="float16"):
        NativeStep(random_model().half())
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NativeUnavailable, match="does not compile decode.c: no such thing"):
        native.library()


# ---- the batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_requests_that_join_and_leave_get_what_they_get_alone(seed):
    """Prompts and texts shorter and longer than the context of 64, several samples, more requests than rows."""
    model = random_model()
    requests = random_requests(12, seed) + [dataclasses.replace(r, params=dataclasses.replace(r.params, num_samples=3))
                                            for r in random_requests(3, seed + 100)]  # fmt: skip
    random.Random(seed).shuffle(requests)
    engine = Engine(model, max_rows=5)
    found: dict = {}
    later = list(requests)
    while engine.busy or later:
        if later:  # they come while others run
            engine.add(later.pop())
        for token in engine.step():
            found.setdefault((token.request, token.sample), []).append(token)
    assert len(found) == 12 + 9
    for (request, sample), tokens in found.items():
        assert tokens == alone(model, request, sample)
        assert len(tokens) == request.params.max_new_tokens
        assert [token.end for token in tokens] == [None] * (len(tokens) - 1) + ["length"]


def test_the_batch_in_torch_gets_the_same_text():
    """Greedy, since a rounding may move a draw from one token's share to the next one's."""
    model = random_model()
    requests = random_requests(8, 5, temperature=0)
    engine = in_torch(Engine(model, max_rows=3))
    for request in requests:
        engine.add(request)
    found = run(engine)
    for request in requests:
        assert ids_of(found[request, 0]) == ids_of(alone(model, request))


def test_a_later_sample_is_the_first_one_of_a_later_seed():
    model = random_model()
    many = GenerationRequest(
        [5, 6, 7], SamplingParams(temperature=1.0, max_new_tokens=20, num_samples=4, seed=10)
    )
    for sample in range(4):
        one = GenerationRequest(
            [5, 6, 7], SamplingParams(temperature=1.0, max_new_tokens=20, seed=10 + sample)
        )
        assert ids_of(alone(model, many, sample)) == ids_of(alone(model, one))


def test_samples_share_one_pass_over_the_prompt(monkeypatch):
    model, read = random_model(), []
    whole = Engine._read
    monkeypatch.setattr(
        Engine, "_read", lambda self, pieces: (read.extend(pieces), whole(self, pieces))
    )
    alone(
        model, GenerationRequest(list(range(30)), SamplingParams(max_new_tokens=5, num_samples=4))
    )
    assert read == [(0, list(range(29)))]


def test_prompts_that_wait_together_are_read_together_up_to_a_piece(monkeypatch):
    """What does not fit waits whole, since where a prompt is cut may not depend on the others."""
    monkeypatch.setattr("pocketlm.inference.engine.PREFILL_BUDGET", 10)
    read: list[list[int]] = []
    whole = Engine._read
    monkeypatch.setattr(
        Engine,
        "_read",
        lambda self, pieces: (read.append([len(ids) for _, ids in pieces]), whole(self, pieces)),
    )
    engine = Engine(random_model(), max_rows=6)
    for length in (4, 5, 1, 6, 24, 3):  # of which the last token is not read but taken by the step
        engine.add(GenerationRequest(list(range(length)), SamplingParams(max_new_tokens=20)))
    rows = []
    for _ in range(5):
        engine.step()
        rows.append(len(engine.rows))
    assert read == [[3, 4, 0], [5], [10], [10], [3, 2]]
    assert rows == [3, 4, 4, 4, 6]


@pytest.mark.parametrize("short", [0, 3, 100])
@pytest.mark.parametrize("piece", [1, 4, 7, 29, 30])
def test_a_prompt_read_in_pieces_by_c_or_torch_is_the_prompt_read_whole(monkeypatch, piece, short):
    model = random_model()
    monkeypatch.setattr("pocketlm.inference.engine.PREFILL_BUDGET", piece)
    monkeypatch.setattr("pocketlm.inference.engine.NATIVE_PREFILL_MAX", short)
    engine = Engine(model, max_rows=3)
    engine.add(
        GenerationRequest(
            list(range(30)), SamplingParams(temperature=0.0, max_new_tokens=3, num_samples=2)
        )
    )
    while engine.waiting or engine.joining:
        engine.join()
    whole = KVCache(model.config, 1, 32, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode():
        model.hidden(torch.arange(29)[None], cache=whole)
    for row in range(2):
        assert engine.cache.lengths[row] == 29
        # float32 sums of 32 products of numbers about 1, in other orders
        torch.testing.assert_close(
            engine.cache.keys[:, row, :, :29], whole.keys[:, 0, :, :29], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            engine.cache.values[:, row, :, :29], whole.values[:, 0, :, :29], rtol=0, atol=1e-5
        )


def test_others_get_their_tokens_and_leave_while_a_long_prompt_is_read(monkeypatch):
    """And it gets what it gets alone, though its row moves; one that is cancelled on the way leaves no trace."""
    monkeypatch.setattr("pocketlm.inference.engine.PREFILL_BUDGET", 2)
    monkeypatch.setattr("pocketlm.inference.engine.NATIVE_PREFILL_MAX", 0)
    model = random_model()
    short = [
        GenerationRequest([n, n + 1], SamplingParams(temperature=1.0, max_new_tokens=most, seed=n))
        for n, most in enumerate((4, 6, 9))
    ]
    long, gone, last = (
        GenerationRequest(
            list(range(n, n + 21)), SamplingParams(temperature=1.0, max_new_tokens=5, seed=n)
        )
        for n in (1, 2, 3)
    )
    engine = Engine(model, max_rows=4)
    for request in (*short, long, gone, last):
        engine.add(request)
    found: dict = {request: [] for request in (*short, long, gone, last)}
    during = 0
    while engine.busy:
        tokens = engine.step()
        joining = engine.joining[0].request if engine.joining else None
        during += len(tokens) * (joining is long)
        if joining is gone and len(engine.unread) < 10:
            engine.cancel(gone)
            assert not engine.joining
        for token in tokens:
            found[token.request].append(token)
    assert during > 10
    assert found[gone] == []
    for request in (*short, long, last):
        assert ids_of(found[request]) == ids_of(alone(model, request))


@pytest.mark.parametrize("where", [lambda engine: engine, in_torch], ids=["c", "torch"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_broken_weights_says_so(where, temperature):
    model = random_model()
    torch.nn.init.constant_(model.layers[1].mlp.up_proj.weight, float("nan"))
    engine = where(Engine(model, max_rows=1))
    engine.add(GenerationRequest([1, 2, 3], SamplingParams(temperature=temperature)))
    with pytest.raises(UserError, match="its weights are broken"):
        engine.step()


def test_a_cancelled_request_leaves_and_the_others_go_on():
    model = random_model()
    requests = random_requests(4, 9, max_new_tokens=30)
    engine = Engine(model, max_rows=3)
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
    model = random_model()
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


def test_end_tokens_end_a_row_and_say_so():
    model = random_model()
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
    model = random_model()
    params = SamplingParams(
        temperature=3.0, top_k=30, repetition_penalty=1.5, max_new_tokens=20, seed=4
    )
    request = GenerationRequest([1, 2, 3], params, top_logprobs=5)
    tokens = alone(model, request)
    with torch.inference_mode():
        expected = model(torch.tensor([[1, 2, 3, *ids_of(tokens)]]))[0, 2:-1].log_softmax(
            -1
        )  # (20, V)
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(
            row[token.id].item(), abs=1e-4
        )  # float32, in another order
        assert [i for i, _ in token.top] == row.topk(5).indices.tolist()
        assert [nats for _, nats in token.top] == pytest.approx(
            row.topk(5).values.tolist(), abs=1e-4
        )
    assert ids_of(tokens) == ids_of(
        alone(model, GenerationRequest([1, 2, 3], params))
    )  # asking changes nothing


def test_requests_with_different_parameters_run_side_by_side():
    model = random_model()
    kinds = [dict(), dict(temperature=0), dict(top_k=3), dict(top_p=0.5), dict(min_p=0.3), dict(repetition_penalty=1.9),
             dict(no_repeat_ngram=2), dict(logit_bias=((7, 4.0),))]  # fmt: skip
    requests = [
        GenerationRequest(
            [9, 8], SamplingParams(**dict(temperature=1.0, max_new_tokens=25, seed=2) | kind)
        )
        for kind in kinds
    ]
    engine = Engine(model, len(requests))
    for request in requests:
        engine.add(request)
    found = run(engine)
    texts = [ids_of(found[request, 0]) for request in requests]
    assert len({tuple(text) for text in texts}) == len(kinds)
    assert texts == [ids_of(alone(model, request)) for request in requests]
    assert len({pair for pair in zip(texts[6], texts[6][1:], strict=False)}) == 24


@pytest.mark.parametrize("request_, said", [
    (GenerationRequest([], GREEDY), "a prompt needs a token"),
    (GenerationRequest([61], GREEDY), "the prompt has the id 61, and the vocabulary 61 entries"),
    (GenerationRequest([1], SamplingParams(top_k=62)), "top_k is 62, and the vocabulary has 61 entries"),
    (GenerationRequest([1], SamplingParams(num_samples=3)), "num_samples is 3, and there is room for 2"),
    (GenerationRequest([1], SamplingParams(logit_bias=((90, 1.0),))), "logit_bias has the id 90"),
    (GenerationRequest([1], SamplingParams(stop_ids=(77,))), "stop_ids has the id 77"),
])  # fmt: skip
def test_a_request_that_cannot_be_is_refused_at_once(request_, said):
    engine = Engine(random_model(), 2)
    with pytest.raises(ValueError, match=said):
        engine.add(request_)
    assert not engine.busy
