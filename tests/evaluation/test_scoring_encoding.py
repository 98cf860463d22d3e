"""Cases become queries: context and continuation are one text, and texts are cut into windows."""

import math

import pytest
import torch

from pocketlm.errors import UserError
from pocketlm.evaluation.cases import Case
from pocketlm.evaluation.likelihood import Query
from pocketlm.evaluation.scoring import encode_case, score_cases
from pocketlm.tokenizer.bytes import ByteTokenizer
from tests.support.probes import BPE, NO_PREFIX, ROUNDING, logprobs_of, make_model, scores_of


def test_a_space_before_the_answer_belongs_to_the_answer():
    """In BPE, " three" is one token.

    A prompt that ends with a space has another last token, and "three" would be scored after it.
    """
    model = make_model(BPE.vocab_size)
    [score] = scores_of(model, BPE, [Case("x", prompt="one two", answers=(" three",))])
    ids = [*BPE.document_prefix, *BPE.encode("one two three")]
    assert score.tokens == 1
    assert score.logprob == pytest.approx(logprobs_of(model, ids, len(ids) - 1)[0], abs=ROUNDING)
    before = [*BPE.document_prefix, *BPE.encode("one two ")]
    naive = math.fsum(logprobs_of(model, before + BPE.encode("three"), len(before)))
    assert abs(naive - score.logprob) > 0.1


def test_prompt_and_answer_are_encoded_as_one_text():
    """The texts "xyz ab" and "c" are "xyz", " abc" together.

    The continuation starts with the token that spans both, and `merged` is true.
    """
    model, case = make_model(BPE.vocab_size), Case("m", prompt="xyz ab", answers=("c",))
    encoded = encode_case(BPE, case, 64)
    whole = [*BPE.document_prefix, *BPE.encode("xyz abc")]
    [query] = encoded.queries
    assert [*query.context, *query.continuation] == whole
    assert BPE.decode(query.continuation) == " abc"
    [score] = score_cases(model, BPE, [encoded])
    assert (score.merged, score.tokens) == (True, 1)
    expected = logprobs_of(model, whole, len(whole) - 1)[0]
    assert score.logprob == pytest.approx(expected, abs=ROUNDING)
    separate = [*BPE.document_prefix, *BPE.encode("xyz ab"), *BPE.encode("c")]
    naive = logprobs_of(model, separate, len(separate) - 1)[0]
    assert abs(naive - score.logprob) > 1000 * ROUNDING
    assert not encode_case(BPE, Case("n", prompt="xyz", answers=(" abc",)), 64).merged


def test_all_candidates_are_scored_from_the_same_token_on():
    """Only "c" is merged with the prompt, but "ab" is scored for the others too.

    The difference between candidates is then that of the whole texts.
    """
    model = make_model(BPE.vocab_size)
    case = Case("m", "choice", prompt="xyz ab", answers=("c",), distractors=("z", "q"))
    [score] = scores_of(model, BPE, [case])
    texts = [[*BPE.document_prefix, *BPE.encode(f"xyz ab{letter}")] for letter in "czq"]
    right, *wrong = [math.fsum(logprobs_of(model, ids, 1)) for ids in texts]
    assert score.merged
    assert score.margin == pytest.approx(right - max(wrong), abs=ROUNDING)
    assert score.rank == 1 + sum(other > right for other in wrong)


@pytest.mark.parametrize(
    "tokenizer, prefix",
    [(ByteTokenizer(), (256,)), (ByteTokenizer(bos=True), (256,)), (NO_PREFIX, ())],
    ids=["eos", "bos", "none"],
)
def test_the_token_that_begins_a_document_precedes_every_prompt_as_in_training(tokenizer, prefix):
    [query] = encode_case(tokenizer, Case("x", prompt="ab", answers=(" c",)), 64).queries
    assert query == Query((*prefix, *b"ab"), tuple(b" c"))
    [query] = encode_case(tokenizer, Case("x", "generate", prompt="ab", match="c"), 64).queries
    assert query == Query((*prefix, *b"ab"), ())


TOO_LONG = {
    "choice": (dict(prompt="p" * 12, answers=(" a",), distractors=(" bcd",)), 17),
    "minimal_pair": (dict(good="g" * 5, bad="b" * 16), 17),
    "schema": (dict(contexts=("c" * 14, "c"), continuation=" d"), 17),
    "generate": (dict(prompt="p" * 15, match="a"), 16),
    "cloze": (dict(prompt="p", answers=(" a",), distractors=(" b",), pmi_prompt="q" * 14), 17),
}


@pytest.mark.parametrize("kind", TOO_LONG)
def test_a_case_that_does_not_fit_the_context_is_refused_by_name_and_never_cut(kind):
    fields, n = TOO_LONG[kind]
    case = Case("it", kind, **fields)
    encode_case(ByteTokenizer(), case, 16)
    message = f"the case 'it' has {n} tokens and the model a context of 15; shorten it"
    with pytest.raises(UserError, match=message):
        encode_case(ByteTokenizer(), case, 15)


def test_the_longest_case_that_fits_is_scored():
    """Of its 17 tokens the last is only a target, so a context of 16 is enough."""
    case = Case("it", "choice", prompt="p" * 12, answers=(" abc",), distractors=(" d",))
    [score] = scores_of(make_model(max_seq_len=16), ByteTokenizer(), [case])
    whole = [256, *("p" * 12 + " abc").encode()]
    expected = math.fsum(logprobs_of(make_model(), whole, 13))
    assert score.logprob == pytest.approx(expected, abs=ROUNDING)


def test_a_continuation_without_tokens_is_refused_by_name():
    case = Case("e", "choice", prompt="a", answers=("",), distractors=("b",))
    message = "the case 'e' has a text to score without any token in 'byte'; change it"
    with pytest.raises(UserError, match=message):
        encode_case(ByteTokenizer(), case, 64)


# ---- texts ----


@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), BPE, ByteTokenizer(bos=True), NO_PREFIX],
    ids=["eos", "bpe", "bos", "none"],
)
@pytest.mark.parametrize("context", [1, 5, 8, 64])
def test_bits_per_byte_equal_those_of_a_plain_loop_that_counts_every_token_once(tokenizer, context):
    """The text has characters of several bytes, and windows that occur more than once."""
    text = "one two three, één twee drie. " + "ab" * 24
    model = make_model(tokenizer.vocab_size)
    [score] = score_cases(
        model, tokenizer, [encode_case(tokenizer, Case("t", "text", text=text), context)]
    )
    ids = [*tokenizer.document_prefix, *tokenizer.encode(text)]
    loss_sum, counted = 0.0, []
    for start in range(0, len(ids) - 1, context):
        end = min(start + context, len(ids) - 1)
        first = max(0, end - context)  # the last window includes tokens before it
        window = ids[first : end + 1]  # and one more, which is only a target
        with torch.no_grad():
            logprobs = model(torch.tensor([window[:-1]]))[0].log_softmax(-1)
        for t in range(start - first, len(window) - 1):
            loss_sum -= logprobs[t, window[t + 1]].item()
            counted.append(first + t + 1)
    assert counted == list(range(1, len(ids)))  # all but the first, the prefix if there is one
    assert score.tokens == len(counted)
    assert score.bytes == len(text.encode()) == len(text) + 2
    bits = loss_sum / math.log(2)
    assert score.bits_per_byte == pytest.approx(bits / len(text.encode()), abs=ROUNDING)
    assert (score.correct, score.logprob, score.rank) == (None, None, None)


def test_a_text_in_a_file_scores_as_the_same_text_in_the_suite(tmp_path):
    (tmp_path / "a.txt").write_text("één, two, three\n", encoding="utf-8")
    cases = [
        Case("f", "text", file=str(tmp_path / "a.txt")),
        Case("t", "text", text="één, two, three\n"),
    ]
    in_file, in_suite = scores_of(make_model(), ByteTokenizer(), cases)
    assert in_file.bits_per_byte == in_suite.bits_per_byte
    assert (in_file.bytes, in_file.tokens) == (in_suite.bytes, in_suite.tokens)


def test_a_text_file_that_cannot_be_read_or_is_empty_is_refused_by_name(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xff\xfa")
    (tmp_path / "c.txt").write_text("")
    for name, message in [
        ("none.txt", "the case 'f' reads .*none.txt: .*No such file"),
        ("b.txt", "the case 'f' reads .*b.txt"),
        ("c.txt", "the case 'f' has a text to score without any token"),
    ]:
        with pytest.raises(UserError, match=message):
            encode_case(ByteTokenizer(), Case("f", "text", file=str(tmp_path / name)), 64)


def test_a_text_of_one_token_without_a_document_prefix_has_nothing_to_score():
    with pytest.raises(UserError, match="the case 't' has a text to score without any token"):
        encode_case(NO_PREFIX, Case("t", "text", text="x"), 64)
