"""A checkpoint as a service: checks request bodies, encodes prompts and submits calls."""

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.config.sampling import MAX_NO_REPEAT_NGRAM, MAX_STOP_STRINGS, SamplingParams
from pocketlm.errors import FieldError, UserError
from pocketlm.inference.conversation import MAX_ANSWER_TOKENS, Conversation
from pocketlm.inference.engine import GenerationRequest, validate_request
from pocketlm.inference.generate import encode_prompt, end_at_all, merge_sampling_params
from pocketlm.serving.batcher import Batcher, Call
from pocketlm.serving.errors import ApiError, invalid
from pocketlm.serving.limits import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_COMPLETION_TOKENS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROB_ENTRIES,
    MAX_LOGPROBS,
    MAX_PROMPT_CHARACTERS,
    MAX_PROMPTS,
    MAX_QUOTED_CHARACTERS,
    ServerLimits,
)
from pocketlm.serving.requests import ChatBody, CompletionBody, RequestBody
from pocketlm.serving.responses import (
    ChatResponse,
    CompletionResponse,
    Echo,
    ResponseBuilder,
    TokenFormatter,
    finite,
)
from pocketlm.tokenizer.build import from_state

Encoded = TypeVar("Encoded")
BuilderT = TypeVar("BuilderT", bound=ResponseBuilder)
API_NAMES = {"max_new_tokens": "max_tokens", "num_samples": "n"}  # of fields of SamplingParams


@dataclass(frozen=True)
class EncodedBody:
    """A request body with its prompts as token ids."""

    body: RequestBody
    param: str  # the field that holds the prompts: "prompt" or "messages"
    prompts: list[list[int]]
    sampling_options: dict[str, Any]  # fields of SamplingParams
    client: str


class Service:
    """A checkpoint and the batcher that generates its texts."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        checkpoint_info: dict[str, Any],
        threads: int,
        limits: ServerLimits,
        names: Sequence[str] = (),
    ):
        """`names` are those of the model in the API; by default the checkpoint's file name."""
        config = checkpoint.config.model
        assert config.max_seq_len is not None and config.vocab_size is not None  # of a built model
        self.checkpoint, self.limits = checkpoint, limits
        self.names = list(names) or [checkpoint.path.stem]
        self.context: int = config.max_seq_len
        self.vocab_size: int = config.vocab_size
        self.max_prompts = min(MAX_PROMPTS, limits.max_queue)
        self.max_logprobs = min(MAX_LOGPROBS, self.vocab_size)
        self.formatter = TokenFormatter(checkpoint.tokenizer)
        self.batcher = self.build_batcher(threads)
        # Encoding changes a flag of the tokenizer while the engine thread may be decoding with
        # it, so encoding has its own copy of the tokenizer and its own thread.
        self.conversation = Conversation(
            from_state(checkpoint.tokenizer.state()), checkpoint.chat_template
        )
        self.encoding_thread = ThreadPoolExecutor(1, "encoding")
        self.encoding: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by client
        self.chat_stop_ids = self.conversation.stop_ids
        self.model = self.describe(checkpoint_info)

    def build_batcher(self, threads: int) -> Batcher:
        """Return the batcher. Raises UserError if the KV cache does not fit into memory."""
        slots, max_queue = self.limits.max_slots, self.limits.max_queue
        model, tokenizer = self.checkpoint.model, self.checkpoint.tokenizer
        try:
            return Batcher(model, tokenizer, threads, slots, max_queue)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"not enough memory for {slots} slots of {self.context:,} tokens: {reason}; "
                "lower --rows"
            ) from None

    def describe(self, checkpoint_info: dict[str, Any]) -> dict[str, Any]:
        """Return the model's entry of /v1/models."""
        path, sampling = self.checkpoint.path, self.checkpoint.config.sampling
        limits = {
            "max_tokens": MAX_COMPLETION_TOKENS,
            "no_repeat_ngram": MAX_NO_REPEAT_NGRAM,
            "n": self.limits.max_slots,
            "prompts": self.max_prompts,
            "prompt_tokens": self.context,
            "prompt_characters": MAX_PROMPT_CHARACTERS,
            "logprobs": self.max_logprobs,
            "stop": MAX_STOP_STRINGS,
            "logit_bias": MAX_LOGIT_BIASES,
            "logprob_entries": MAX_LOGPROB_ENTRIES,
            "body_bytes": self.limits.max_body_bytes,
            "seconds": self.limits.deadline_seconds,
        }
        defaults = {field.name: getattr(sampling, field.name) for field in fields(SamplingParams)}
        defaults["logit_bias"] = [(i, finite(bias)) for i, bias in sampling.logit_bias]
        return {
            "id": self.names[0],
            "object": "model",
            "created": int(path.stat().st_mtime),
            "owned_by": "you",
            "checkpoint": checkpoint_info,
            "sampling": defaults,
            "chat": "template" if self.checkpoint.chat_template else "turns",
            "limits": limits,
        }

    def check_model(self, name: str) -> None:
        """Raise ApiError if `name` is not the served model."""
        if name not in self.names:
            known = ", ".join(map(repr, self.names))[:MAX_QUOTED_CHARACTERS]
            raise ApiError(
                404,
                f"the model {name[:MAX_QUOTED_CHARACTERS]!r} does not exist; this server has "
                f"{known} (serve.py --model-name NAME gives it other names)",
                "model",
                "model_not_found",
            )

    async def encode(
        self, client: str, param: str, function: Callable[..., Encoded], *args: object
    ) -> Encoded:
        """Return what `function` computes of a prompt, in the encoding thread.

        Each client has one prompt at a time in the thread's queue, so that they take turns. A
        UserError becomes an ApiError for the field `param`.
        """
        loop, turn = asyncio.get_running_loop(), self.encoding.setdefault(client, asyncio.Lock())
        try:
            async with turn:
                return await loop.run_in_executor(self.encoding_thread, function, *args)
        except UserError as error:
            raise invalid(param, str(error)) from None

    async def start_completion(
        self, body: CompletionBody, client: str
    ) -> tuple[Call, ResponseBuilder]:
        """Submit the prompts of a client's completion request. Raises ApiError and TooBusy."""
        self.check_model(body.model)
        self.check_ranges(body)
        if len(body.prompt) > self.max_prompts:
            message = (
                f"prompt has {len(body.prompt):,} entries; the maximum is {self.max_prompts:,}"
            )
            raise invalid("prompt", message, "array_above_max_length")
        texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
        check_characters("prompt", sum(map(len, texts)))
        self.batcher.check_capacity(len(body.prompt), client)
        tokenizer, prompts = self.conversation.tokenizer, []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                prompts.append(
                    await self.encode(client, "prompt", encode_prompt, tokenizer, prompt)
                )
            else:
                prompts.append(prompt)
        options = body.sampling_options(DEFAULT_COMPLETION_TOKENS)
        only_echo = options["max_new_tokens"] == 0
        options["max_new_tokens"] = max(1, options["max_new_tokens"])
        encoded = EncodedBody(body, "prompt", prompts, options, client)
        requests, echoes = self.generation_requests(encoded), []
        for prompt, request in zip(body.prompt, requests, strict=True):
            if body.echo:
                text = prompt if isinstance(prompt, str) else None
                echoes.append(
                    await self.encode(client, "prompt", Echo.of, tokenizer, request, text)
                )
        call, builder = self.submit(encoded, requests, CompletionResponse)
        builder.echoes, builder.only_echo = echoes, only_echo
        return call, builder

    async def start_chat(self, body: ChatBody, client: str) -> tuple[Call, ResponseBuilder]:
        """Submit the conversation of a client's chat request. Raises ApiError and TooBusy."""
        self.check_model(body.model)
        self.check_ranges(body)
        check_characters("messages", sum(len(message.content) for message in body.messages))
        self.batcher.check_capacity(1, client)
        messages = []
        for message in body.messages:
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": message.content})
        ids = await self.encode(client, "messages", self.conversation.encode, messages)
        options = body.sampling_options(max(1, min(MAX_ANSWER_TOKENS, self.context - len(ids))))
        defaults = self.checkpoint.config.sampling
        stop = options.get("stop", defaults.stop)
        stop_ids = options.get("stop_ids", defaults.stop_ids)
        options["stop"] = (*stop, *self.conversation.stop)
        options["stop_ids"] = (*stop_ids, *self.chat_stop_ids)
        encoded = EncodedBody(body, "messages", [ids], options, client)
        return self.submit(encoded, self.generation_requests(encoded), ChatResponse)

    def submit(
        self, encoded: EncodedBody, requests: list[GenerationRequest], builder: type[BuilderT]
    ) -> tuple[Call, BuilderT]:
        """Submit the requests of a body to the batcher. Raises TooBusy."""
        body, seconds = encoded.body, self.limits.deadline_seconds
        call = self.batcher.submit(requests, seconds, bool(body.stream), encoded.client)
        return call, builder(
            model=self.model["id"],
            formatter=self.formatter,
            n_prompt_tokens=sum(map(len, encoded.prompts)),
            n_samples=requests[0].params.num_samples,
            with_logprobs=body.requested_logprobs is not None,
            include_usage=body.include_usage,
        )

    def generation_requests(self, encoded: EncodedBody) -> list[GenerationRequest]:
        """Return the engine's requests, one per prompt. Raises ApiError for invalid values."""
        body, eos_id = encoded.body, self.checkpoint.tokenizer.eos_id
        top_logprobs = body.requested_logprobs
        score_prompt = body.repeats_prompt and top_logprobs is not None
        try:
            params = merge_sampling_params(encoded.sampling_options, self.checkpoint)
            params = end_at_all(params, self.checkpoint.tokenizer)
            requests = [
                GenerationRequest(ids, params, eos_id, top_logprobs, score_prompt)
                for ids in encoded.prompts
            ]
            for request in requests:
                validate_request(request, self.vocab_size)
        except FieldError as error:
            name = API_NAMES.get(error.field, error.field)
            raise invalid(name, f"{name} {error.message}") from None
        except ValueError as error:
            raise invalid(encoded.param, str(error)) from None
        self.check_size(encoded, params)
        return requests

    def check_ranges(self, body: RequestBody) -> None:
        """Raise ApiError for a number that is out of this server's range."""
        fewest = 0 if body.repeats_prompt else 1  # tokens after an echo may be none
        for name, value, smallest, largest in (
            ("max_tokens", body.requested_max_tokens, fewest, MAX_COMPLETION_TOKENS),
            ("n", body.n, 1, self.limits.max_slots),
            (body.logprobs_field, body.requested_logprobs, 0, self.max_logprobs),
        ):
            if value is not None and not smallest <= value <= largest:
                limits = f"{value:,}; it must be from {smallest} to {largest:,}"
                raise invalid(name, f"{name} is {limits} on this server")

    def check_size(self, encoded: EncodedBody, params: SamplingParams) -> None:
        """Raise ApiError for a prompt beyond the context, or too many log-probabilities."""
        body = encoded.body
        longest = max(map(len, encoded.prompts))
        if longest > self.context:
            raise invalid(
                encoded.param,
                f"the prompt has {longest:,} tokens, more than the model's context of "
                f"{self.context:,}; shorten it",
                "context_length_exceeded",
            )
        if body.requested_logprobs is None:
            return
        echoed = longest if body.repeats_prompt else 0
        n_texts = len(encoded.prompts) * params.num_samples
        n_entries = n_texts * (params.max_new_tokens + echoed) * (body.requested_logprobs + 1)
        if n_entries > MAX_LOGPROB_ENTRIES:
            raise invalid(
                body.logprobs_field,
                f"{body.logprobs_field} may fill the response with {n_entries:,} log-probabilities;"
                f" the maximum is {MAX_LOGPROB_ENTRIES:,}: ask for fewer of them, tokens or texts",
            )


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the checkpoint's facts for /v1/models, before its weights are converted."""
    config = checkpoint.config.model
    return {
        "path": checkpoint.path.name,
        "step": checkpoint.step,
        "tokens": checkpoint.tokens,
        "val_loss": checkpoint.val_loss if math.isfinite(checkpoint.val_loss or 0) else None,
        "parameters": config.n_parameters,
        "context": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "tokenizer": checkpoint.tokenizer.name,
        "sha256": checkpoint.weights_sha256,
    }


def check_characters(param: str, count: int) -> None:
    """Raise ApiError for a prompt so long that encoding it would take too much time."""
    if count > MAX_PROMPT_CHARACTERS:
        message = f"{param} has {count:,} characters; the maximum is {MAX_PROMPT_CHARACTERS:,}"
        raise invalid(param, message, "string_above_max_length")
