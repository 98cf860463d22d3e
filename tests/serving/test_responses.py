"""Log-probabilities in responses, and the tokens that they belong to."""

import pytest
import torch

from pocketlm.inference.conversation import Conversation
from pocketlm.inference.generate import encode_prompt
from pocketlm.serving.responses import TokenFormatter
from tests.support.chat import CHATML
from tests.support.server import MESSAGES, RunningServer


def next_token_logprobs(server: RunningServer, ids: list[int]) -> torch.Tensor:
    """Return the model's log-probabilities (V,) of the token after `ids`."""
    with torch.inference_mode():
        return server.checkpoint.model(torch.tensor([ids]))[0, -1].log_softmax(-1)


def test_log_probabilities_are_those_of_the_models_own_logits(server: RunningServer) -> None:
    """The bias changes what is drawn, not what is reported."""
    tokenizer = server.checkpoint.tokenizer
    bias = {"9": 4, str(tokenizer.eos_id): -100}
    response = server.complete(seed=2, max_tokens=30, logprobs=5, logit_bias=bias)
    text, logprobs = response.choices[0].text, response.choices[0].logprobs
    ids = encode_prompt(tokenizer, "hello")
    texts = [TokenFormatter(tokenizer).format(i)[0] for i in range(tokenizer.vocab_size)]
    before, n_offsets_checked = "", 0
    for token, logprob, top, offset in zip(
        logprobs.tokens,
        logprobs.token_logprobs,
        logprobs.top_logprobs,
        logprobs.text_offset,
        strict=True,
    ):
        row = next_token_logprobs(server, ids)
        ids.append(
            next(
                i
                for i, name in enumerate(texts)
                if name == token and abs(row[i].item() - logprob) < 1e-4
            )
        )
        best = row.topk(5)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        assert top == pytest.approx({texts[i]: value for i, value in pairs}, abs=1e-4)
        if not before.startswith("bytes:") and not token.startswith("bytes:"):
            assert text.startswith(token, offset)
            n_offsets_checked += 1
        before = token
    assert n_offsets_checked > 3


def test_tokens_that_are_parts_of_characters_come_with_the_character(
    server: RunningServer,
) -> None:
    """The bias forces the four bytes of an emoji, each of which is a token."""
    tokenizer = server.checkpoint.tokenizer
    ids = tokenizer.encode("😀")
    id_of_byte = {tokenizer.token_bytes(i): i for i in ids}
    assert len(ids) == 4
    assert b"".join(map(tokenizer.token_bytes, ids)) == "😀".encode()
    bias = {str(i): 100 for i in ids}
    chunks = list(
        server.complete(temperature=0, max_tokens=24, logprobs=0, stream=True, logit_bias=bias)
    )
    text = "".join(chunk.choices[0].text for chunk in chunks)
    tokens = [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens]
    assert len(tokens) == 24
    assert all(token.startswith("bytes:") for token in tokens)
    escapes = [token.removeprefix("bytes:").replace("\\x", "") for token in tokens]
    generated = [id_of_byte[bytes.fromhex(escape)] for escape in escapes]
    assert text == tokenizer.decode(generated)


def test_log_probabilities_of_an_answer_have_the_tokens_bytes(server: RunningServer) -> None:
    response = server.chat(seed=1, max_tokens=8, logprobs=True, top_logprobs=3)
    content = response.choices[0].logprobs.content
    text = b"".join(bytes(token.bytes) for token in content).decode(errors="replace")
    assert text.lstrip() == response.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content)
    ids = Conversation(server.checkpoint.tokenizer, CHATML).encode(MESSAGES)
    best = next_token_logprobs(server, ids).topk(3).values.tolist()
    first = [entry.logprob for entry in content[0].top_logprobs]
    assert first == pytest.approx(best, abs=1e-4)
