"""Generation against transformers and against the model without a cache; prompts to texts."""

import dataclasses

import pytest
import torch

from model import Transformer
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.inference.generate import complete, encode_prompt, generate, generate_texts
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.streaming import stream_text
from tests.support.checkpoints import byte_ids, confident_model, write_checkpoint
from tests.support.generation import PLAIN, tokens_of


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_text_equals_transformers(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = confident_model(tie_embeddings=tied)
    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    theirs = LlamaForCausalLM(config).eval()
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": p
        for name, p in model.state_dict().items()
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    theirs.tie_weights()
    prompt = byte_ids(11)
    mask = torch.ones_like(prompt)
    ids = theirs.generate(prompt, do_sample=False, max_new_tokens=40, attention_mask=mask)
    expected = ids[0, 11:].tolist()
    assert len(set(expected)) > 10  # the text does not just repeat a token
    assert tokens_of(model, prompt, temperature=0, max_new_tokens=40) == [expected]


def uncached(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Return the greedy text without a cache: a full pass over the window for every token."""
    size = model.config.max_seq_len
    ids, window = list(prompt), prompt[-size:]
    for _ in range(count):
        if len(window) > size:
            window = ids[-max(1, size // 2) :]
        token = int(model(torch.tensor([window]))[0, -1].argmax())
        ids, window = [*ids, token], [*window, token]
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 40])
def test_text_beyond_the_context_continues_from_its_last_half(length):
    """A prompt longer than the context keeps its last tokens."""
    model, prompt = confident_model(max_seq_len=16), byte_ids(length)
    with torch.inference_mode():
        expected = uncached(model, prompt[0].tolist(), 40)
    assert len(set(expected)) > 8
    assert tokens_of(model, prompt, temperature=0, max_new_tokens=40) == [expected]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_smallest_contexts_work(size):
    model, prompt = confident_model(max_seq_len=size), byte_ids(4)
    with torch.inference_mode():
        expected = uncached(model, prompt[0].tolist(), 12)
    assert tokens_of(model, prompt, temperature=0, max_new_tokens=12) == [expected]


def test_only_the_end_of_a_long_prompt_matters():
    model = confident_model(max_seq_len=16)
    long = byte_ids(40)
    for count in (1, 30):
        assert tokens_of(model, long, seed=1, max_new_tokens=count) == tokens_of(
            model, long[:, -16:], seed=1, max_new_tokens=count
        )


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    model, prompt = confident_model(), byte_ids(5)
    torch.manual_seed(1)
    first = tokens_of(model, prompt, seed=7, max_new_tokens=30)
    torch.manual_seed(2)
    assert tokens_of(model, prompt, seed=7, max_new_tokens=30) == first
    assert tokens_of(model, prompt, seed=8, max_new_tokens=30) != first
    hot = dict(temperature=50.0, max_new_tokens=30)  # nearly uniform: 61^30 texts
    assert tokens_of(model, prompt, **hot) != tokens_of(model, prompt, **hot)


def test_samples_of_one_prompt_differ_and_greedy_ones_do_not():
    model, prompt = confident_model(), byte_ids(5)
    rows = tokens_of(model, prompt, num_samples=4, seed=1, max_new_tokens=20)
    assert len(rows) == len({tuple(row) for row in rows}) == 4
    greedy = tokens_of(model, prompt, num_samples=3, temperature=0, max_new_tokens=20)
    assert greedy == 3 * tokens_of(model, prompt, temperature=0, max_new_tokens=20)


def test_the_rows_of_a_batch_do_not_meet():
    model, prompts = confident_model(), byte_ids(6, batch=3)
    greedy = dict(temperature=0, max_new_tokens=20)
    alone = [tokens_of(model, prompt[None], **greedy)[0] for prompt in prompts]
    assert tokens_of(model, prompts, **greedy) == alone


def test_the_end_of_a_document_ends_a_row_and_the_last_one_ends_it_all():
    model, prompts = confident_model(), byte_ids(6, batch=3)
    free = tokens_of(model, prompts, temperature=0, max_new_tokens=40)
    in_every_row = set.intersection(*map(set, free))
    eos = next(token for token in free[0][5:] if token in in_every_row)
    ends = [row.index(eos) for row in free]
    assert len(set(ends)) > 1
    rows = tokens_of(model, prompts, eos, temperature=0, max_new_tokens=40)
    length = max(ends) + 1
    for row, free_row, end in zip(rows, free, ends, strict=True):
        assert row == free_row[:end] + [None] * (length - end)


def test_a_sample_that_comes_to_a_stop_string_ends_and_the_others_continue():
    """Each text is cut where it would be alone, and no token is drawn for it after that."""
    model, tokenizer = confident_model(vocab_size=257), ByteTokenizer()
    params = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=60, num_samples=5, seed=3)
    free = generate_texts(model, tokenizer, [[65]], params)
    stop = free[0][20:22]
    cut = generate_texts(model, tokenizer, [[65]], dataclasses.replace(params, stop=(stop,)))
    assert cut == [text.partition(stop)[0] for text in free]
    assert len(cut[0]) <= 20


def test_prompts_of_different_lengths_are_continued_together_as_they_are_alone():
    model, tokenizer = confident_model(vocab_size=257), ByteTokenizer()
    prompts = [list(b"a"), list(b"something longer"), list(b"x" * 100)]
    params = SamplingParams(temperature=1.0, max_new_tokens=30, num_samples=2, seed=5)
    together = generate_texts(model, tokenizer, prompts, params)
    alone = [generate_texts(model, tokenizer, [prompt], params) for prompt in prompts]
    assert together == [texts[sample] for sample in range(2) for texts in alone]


UNUSUAL_PROMPTS = {
    "nul": "a\0b",
    "right to left": "مرحبا שלום",
    "emoji": "👩‍👩‍👧‍👦 🇦🇪",
    "special": "<|endoftext|> <|im_end|>",
    "blank": " \t\n\n",
    "long": "word " * 200_000,
}


@pytest.mark.parametrize("prompt", UNUSUAL_PROMPTS.values(), ids=UNUSUAL_PROMPTS)
@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), JsonTokenizer.train_bpe(["a word"], 300)],
    ids=["byte", "bpe:300"],
)
def test_any_text_is_a_prompt_and_only_text(tmp_path, tokenizer, prompt):
    """Its ids follow the token that begins a document, which no text spells."""
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "x.ckpt", tokenizer=tokenizer))
    ids = encode_prompt(tokenizer, prompt)
    assert ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids[1:]) == prompt
    params = SamplingParams(temperature=0.0, max_new_tokens=5)
    text = "".join(piece for _, piece in complete(checkpoint, prompt, params))
    steps = generate(checkpoint.model, torch.tensor([ids[-64:]]), params, tokenizer.eos_id)
    tokens = [token for [token] in steps if token is not None]
    assert text == "".join(stream_text(tokenizer, tokens))


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), JsonTokenizer.train_bpe(["a"], 257)], ids=["byte", "bpe:257"]
)
def test_half_a_character_in_the_prompt_is_a_mistake(tmp_path, tokenizer):
    """Python decodes arguments that are not UTF-8 to surrogates."""
    path = write_checkpoint(tmp_path / "x.ckpt", tokenizer=tokenizer)
    with pytest.raises(UserError, match="not valid Unicode"):
        list(complete(load_checkpoint(path), "a\udcff", PLAIN))
