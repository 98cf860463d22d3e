"""Cases with a tokenizer that drops the first space of a text, as SentencePiece's do."""

import tokenizers as hf
import torch
from tokenizers import decoders, models, normalizers

from pocketlm.config.sampling import SamplingParams
from pocketlm.evaluation.cases import Case
from pocketlm.evaluation.scoring import encode_case, score_cases
from pocketlm.inference.generate import generate
from pocketlm.tokenizer.bpe import JsonTokenizer
from tests.support.probes import make_model

WORDS = ["France", "Paris", "Rome", "is"]


def sentencepiece() -> JsonTokenizer:
    """Return a tokenizer of letters and of whole words with a space, Llama 2's way."""
    letters = [*"▁", *sorted(set("".join(WORDS)))]
    pieces, merges = ["<unk>", "<s>", "</s>", *letters], []
    for word in WORDS:
        for end in range(1, len(word) + 1):
            merges.append(("▁" + word[: end - 1], word[end - 1]))
            pieces.append("▁" + word[:end])
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = hf.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return JsonTokenizer(backend.to_str(), "sentencepiece", 1, 2)


def test_pmi_scores_the_tokens_that_stand_in_context():
    tokenizer = sentencepiece()
    case = Case("x", prompt="France is", answers=(" Paris",), distractors=(" Rome",), scoring="pmi")
    encoded = encode_case(tokenizer, case, 64)
    paris, rome = (tokenizer.backend.token_to_id(token) for token in ("▁Paris", "▁Rome"))
    assert [query.continuation for query in encoded.queries] == [(paris,), (rome,)]
    assert [query.context for query in encoded.pmi_queries] == [(1,), (1,)]
    assert [query.continuation for query in encoded.pmi_queries] == [(paris,), (rome,)]
    assert tokenizer.encode(" Paris") != [paris]  # alone, it has two spaces


def test_a_generated_text_and_the_likely_tokens_keep_their_first_space():
    tokenizer = sentencepiece()
    model = make_model(tokenizer.vocab_size)
    case = Case("x", "generate", prompt="France is", match="^ ", max_new_tokens=3)
    prompt = [1, *tokenizer.encode("France is")]
    params = SamplingParams(max_new_tokens=3, temperature=0.0)
    spaced = [i for token, i in tokenizer.backend.get_vocab().items() if token[:1] == "▁"]
    others = torch.tensor([i for i in range(tokenizer.vocab_size) if i not in spaced])
    with torch.no_grad():  # logits of 0, which some token with a space exceeds
        model.embed_tokens.weight[others] = 0  # which is the head too
    ids = [i for [i] in generate(model, torch.tensor([prompt]), params)]
    [score] = score_cases(model, tokenizer, [encode_case(tokenizer, case, 64)])
    expected = tokenizer.backend.decode([*prompt[1:], *ids])[len("France is") :]
    assert score.generated == expected and expected.startswith(" ")
    assert score.correct == 1
    cloze = Case("y", "cloze", prompt="France is", answers=(" Paris",))
    [score] = score_cases(model, tokenizer, [encode_case(tokenizer, cloze, 64)])
    tokens = {token.replace("▁", " ") for token in tokenizer.backend.get_vocab()}
    assert {text for text, _ in score.top} <= tokens | {""}
    assert any(text.startswith(" ") for text, _ in score.top)
