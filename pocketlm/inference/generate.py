"""Generation with the engine: token ids for a batch, or texts for prompts, whole or streamed.

Samples of several prompts are numbered sample * n_prompts + prompt, here called their index.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
from torch import Tensor

from model import Transformer
from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.inference.engine import Engine, GenerationRequest, Token
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.streaming import TextStream

PROMPT_TAIL = 32  # tokens of a prompt that may affect how the text after it is decoded


class TextDecoder:
    """The text of one sample after its prompt, token by token, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], prompt: list[int]):
        self.stream = TextStream(tokenizer, prompt[-PROMPT_TAIL:])
        self.buffer = StopStringBuffer(stop)
        self.length = 0  # characters of all tokens so far, including those held back
        self.ended = False

    @property
    def stopped(self) -> bool:
        """True if the text ended at a stop string."""
        return self.buffer.match is not None

    def push(self, token: Token) -> str:
        """Return the text that the token makes final; often none."""
        text = "" if token.end == "stop" else self.stream.push(token.id)
        self.length += len(text)
        final = self.buffer.push(text)
        if token.end:
            final += self.flush()
        self.ended = bool(token.end) or self.stopped
        return final

    def flush(self) -> str:
        """Return the text held back, because no token follows."""
        return self.buffer.push(self.stream.flush()) + self.buffer.flush()


class StopStringBuffer:
    """Text in, text out, up to the first stop string.

    Text that may be the beginning of a stop string is held back.

    >>> buffer = StopStringBuffer(("two",))
    >>> [buffer.push(text) for text in ("one", " tw", "o th", "ree")]
    ['o', 'ne ', '', '']
    >>> buffer.match
    'two'
    """

    def __init__(self, stop: tuple[str, ...]):
        self.stop, self.longest = stop, max(map(len, stop), default=1)
        self.pending = ""
        self.match: str | None = None  # the stop string that was complete first

    def push(self, text: str) -> str:
        """Return the text that cannot belong to a stop string any more."""
        if self.match is not None:
            return ""
        self.pending += text
        matches = []
        for stop in self.stop:
            begin = self.pending.find(stop)
            if begin >= 0:
                matches.append((begin + len(stop), begin, stop))
        if matches:
            _, end, self.match = min(matches)
        else:
            end = max(0, len(self.pending) - (self.longest - 1))
        final, self.pending = self.pending[:end], self.pending[end:]
        return final

    def flush(self) -> str:
        """Return the text held back, because no text follows."""
        return self.pending if self.match is None else ""


def until_stop(pieces: Iterator[str], stop: tuple[str, ...]) -> Iterator[str]:
    """Yield the text of `pieces` up to the first stop string, and take no piece after it."""
    buffer = StopStringBuffer(stop)
    for piece in pieces:
        yield buffer.push(piece)
        if buffer.match is not None:
            return
    yield buffer.flush()


Sample = tuple[GenerationRequest, int]  # a request, and the number of one of its samples


def generate(
    model: Transformer, prompt_ids: Tensor, params: SamplingParams, eos_id: int | None = None
) -> Iterator[list[int | None]]:
    """Yield the tokens that follow prompt_ids (B, T), num_samples * B at a time.

    The tokens are in the order of their index; None is for a sample that has ended.
    """
    prompts = prompt_ids.tolist()
    engine, samples = start(model, prompts, params, eos_id)
    index_of = {sample: index for index, sample in samples}
    while engine.waiting or engine.prefilling:
        engine.admit()
    while engine.busy:
        tokens: list[int | None] = [None] * len(samples)
        for token in engine.step():
            if token.end != "stop":
                tokens[index_of[token.request, token.sample]] = token.id
        yield tokens


def stream_texts(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], params: SamplingParams
) -> Iterator[tuple[int, str]]:
    """Yield (index, new text) as the texts after all prompts are generated side by side.

    A text ends before the first of params.stop. Raises ValueError at once for prompts or
    parameters that do not suit the model.
    """
    params = end_at_all(params, tokenizer)
    engine, samples = start(model, prompts, params, tokenizer.eos_id)
    texts = {}
    for index, (request, sample) in samples:
        decoder = TextDecoder(tokenizer, params.stop, request.ids)
        texts[request, sample] = index, decoder

    def pieces() -> Iterator[tuple[int, str]]:
        while engine.busy:
            for token in engine.step():
                index, text = texts[token.request, token.sample]
                if piece := text.push(token):
                    yield index, piece
                if text.ended:
                    engine.cancel(token.request, token.sample)

    return pieces()


def end_at_all(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """Return the parameters with every token that ends a text besides eos."""
    return replace(params, stop_ids=(*params.stop_ids, *tokenizer.end_ids))


def start(
    model: Transformer, prompts: list[list[int]], params: SamplingParams, eos_id: int | None
) -> tuple[Engine, list[tuple[int, Sample]]]:
    """Return an engine with a request for each prompt, and each sample with its index."""
    max_len = max(map(len, prompts)) + params.max_new_tokens
    engine = Engine(model, len(prompts) * params.num_samples, max_len)
    samples: list[tuple[int, Sample]] = []
    for number, ids in enumerate(prompts):
        request = GenerationRequest(ids, params, eos_id)
        engine.add(request)
        for sample in range(params.num_samples):
            samples.append((sample * len(prompts) + number, (request, sample)))
    return engine, samples


def generate_texts(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], params: SamplingParams
) -> list[str]:
    """Run `stream_texts` to completion; return the texts by index."""
    texts = [""] * (len(prompts) * params.num_samples)
    for index, piece in stream_texts(model, tokenizer, prompts, params):
        texts[index] += piece
    return texts


def complete(
    checkpoint: Checkpoint, prompt: str, params: SamplingParams
) -> Iterator[tuple[int, str]]:
    """Return an iterator of (sample's number, text) over the completions of a prompt.

    A single sample is streamed in pieces; several come whole. An empty prompt begins a document.

    Raises at once: UserError if the prompt is not valid Unicode or has no token; FieldError or
    ValueError if the parameters or ids do not suit the model.
    """
    ids = encode_prompt(checkpoint.tokenizer, prompt)
    if params.num_samples == 1:
        return stream_texts(checkpoint.model, checkpoint.tokenizer, [ids], params)
    texts = generate_texts(checkpoint.model, checkpoint.tokenizer, [ids], params)
    return iter(list(enumerate(texts)))


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt after the tokens that begin a document. Raises UserError."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt is not valid Unicode: {error.reason} at character {error.start}"
        ) from None
    ids = tokenizer.document_prefix + tokenizer.encode(prompt)
    if not ids:
        raise UserError(
            f"the prompt {prompt!r} has no token in {tokenizer.name!r}, "
            "with which a text could begin; use another prompt"
        )
    return ids


def merge_sampling_params(options: dict[str, Any], checkpoint: Checkpoint) -> SamplingParams:
    """Return the options, completed with the sampling defaults of the checkpoint's config.

    num_samples is 1 unless it is among the options.
    """
    params = {"num_samples": 1}
    for field in fields(SamplingParams):
        if field.name != "num_samples":
            params[field.name] = getattr(checkpoint.config.sampling, field.name)
    return SamplingParams(**params | options)


def describe_left_out(tokenizer: Tokenizer, prompt: str) -> str:
    """Return a sentence on the characters of a prompt for which there is no token; often none."""
    ids = np.array(tokenizer.encode(prompt), tokenizer.dtype)
    left_out = [c for c in tokenizer.left_out_characters(prompt, ids) if not c.isspace()]
    if not left_out:
        return ""
    few = ", ".join(map(repr, left_out[:5])) + (" and others" if len(left_out) > 5 else "")
    return f"the tokenizer {tokenizer.name!r} has no token for {few}: the model does not see them"
