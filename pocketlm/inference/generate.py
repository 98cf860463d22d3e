"""Generation: ids, texts, samples of a prompt."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from torch import Tensor

from model import Transformer
from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.inference.engine import Engine, GenerationRequest
from pocketlm.inference.text import TextDecoder
from pocketlm.tokenizer.base import Tokenizer


def generate(
    model: Transformer, prompt_ids: Tensor, params: SamplingParams, eos_id: int | None = None
) -> Iterator[list[int | None]]:
    """The tokens that follow prompt_ids (B, T), a list of num_samples * B at a time; None for a row that has ended."""
    prompts = prompt_ids.tolist()
    engine = Engine(
        model, len(prompts) * params.num_samples, prompt_ids.size(1) + params.max_new_tokens
    )
    place = {}
    for row, ids in enumerate(prompts):
        engine.add(request := GenerationRequest(ids, params, eos_id))
        place |= {
            (request, sample): sample * len(prompts) + row for sample in range(params.num_samples)
        }
    while engine.waiting or engine.joining:
        engine.join()
    while engine.busy:
        row: list[int | None] = [None] * len(place)
        for token in engine.step():
            row[place[token.request, token.sample]] = None if token.end == "stop" else token.id
        yield row


def stream_texts(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], params: SamplingParams
) -> Iterator[tuple[int, str]]:
    """(place, piece of text) as the texts behind all prompts grow side by side; place is sample * len(prompts) + prompt.

    A text that comes to one of params.stop is ended there. Raises ValueError for a prompt or parameters that the model has no place for.
    """
    longest = max(map(len, prompts))
    engine = Engine(model, len(prompts) * params.num_samples, longest + params.max_new_tokens)
    texts: dict[tuple[GenerationRequest, int], tuple[int, TextDecoder]] = {}
    for row, ids in enumerate(prompts):
        engine.add(request := GenerationRequest(ids, params, tokenizer.eos_id))
        texts |= {
            (request, n): (n * len(prompts) + row, TextDecoder(tokenizer, params.stop))
            for n in range(params.num_samples)
        }

    def pieces() -> Iterator[tuple[int, str]]:
        while engine.busy:
            for token in engine.step():
                place, text = texts[token.request, token.sample]
                if piece := text.push(token):
                    yield place, piece
                if text.ended:
                    engine.cancel(token.request, token.sample)

    return pieces()


def generate_texts(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], params: SamplingParams
) -> list[str]:
    """The same when all have ended."""
    texts = [""] * (len(prompts) * params.num_samples)
    for place, piece in stream_texts(model, tokenizer, prompts, params):
        texts[place] += piece
    return texts


def complete(
    checkpoint: Checkpoint, prompt: str, params: SamplingParams
) -> Iterator[tuple[int, str]]:
    """(sample's number, piece of text) as the completions of `prompt` grow; one sample streams, several come whole.

    An empty prompt begins a document. Raises at once: UserError for a prompt that is not Unicode or has no token, FieldError or
    ValueError for parameters and ids that the model has no place for.
    """
    ids = encode_prompt(checkpoint.tokenizer, prompt)
    if params.num_samples == 1:
        return stream_texts(checkpoint.model, checkpoint.tokenizer, [ids], params)
    return iter(
        list(enumerate(generate_texts(checkpoint.model, checkpoint.tokenizer, [ids], params)))
    )


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids to continue, with what begins a document. Raises UserError."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt is not valid Unicode: {error.reason} at character {error.start}"
        ) from None
    if not (ids := tokenizer.prefix + tokenizer.encode(prompt)):
        raise UserError(
            f"the prompt {prompt!r} has no token in {tokenizer.name!r}, with which a text could begin; give some other text"
        )
    return ids


def merge_sampling_params(given: dict[str, Any], checkpoint: Checkpoint) -> SamplingParams:
    """What was given, and for the rest what the checkpoint's config says of its sampling; of samples one."""
    said = {
        field.name: getattr(checkpoint.config.sampling, field.name)
        for field in fields(SamplingParams)
    }
    return SamplingParams(**said | {"num_samples": 1} | given)
