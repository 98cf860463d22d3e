"""A checkpoint and the batch that it answers in."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.config.sampling import MOST_STOPS, SamplingParams
from pocketlm.errors import FieldError, UserError
from pocketlm.inference import engine
from pocketlm.inference.conversation import ANSWER, Conversation
from pocketlm.inference.generate import encode_prompt, merge_sampling_params
from pocketlm.serving.batcher import Batcher, Call
from pocketlm.serving.limits import (
    BODY_BYTES,
    COMPLETION_TOKENS,
    MAX_TOKENS,
    MOST_BIASES,
    MOST_LOGPROBS,
    MOST_PROMPTS,
    PROMPT_CHARACTERS,
)
from pocketlm.serving.requests import ApiError, Body, ChatBody, CompletionBody
from pocketlm.serving.responses import (
    ChatResponse,
    CompletionResponse,
    ResponseBuilder,
    Spelling,
    finite,
)
from pocketlm.tokenizer.build import from_state


class Service:
    """A checkpoint and the batch that it answers in."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        about: dict[str, Any],
        threads: int,
        rows: int,
        max_queue: int,
        deadline: float,
    ):
        self.checkpoint, self.rows, self.deadline = checkpoint, rows, deadline
        self.most_prompts = min(MOST_PROMPTS, max_queue)
        self.context, self.vocab_size = (
            checkpoint.config.model.max_seq_len,
            checkpoint.config.model.vocab_size,
        )
        self.spelling = Spelling(checkpoint.tokenizer)
        try:
            self.batcher = Batcher(checkpoint.model, checkpoint.tokenizer, threads, rows, max_queue)
        except (OSError, RuntimeError) as error:
            said = str(error).splitlines()[0]
            raise UserError(
                f"no memory for {rows} rows of {self.context:,} tokens: {said}; lower --rows"
            ) from None
        # Encoding sets a flag of the tokenizer while another thread may decode; so it has a tokenizer and a thread of its own
        self.conversation = Conversation(
            from_state(checkpoint.tokenizer.state()), checkpoint.chat_template
        )
        self.encoding = ThreadPoolExecutor(1, "encoding")
        self.stop_ids = self.conversation.stop_ids
        self.model = self.describe(about)

    def describe(self, about: dict[str, Any]) -> dict[str, Any]:
        """What /v1/models says."""
        path, sampling = self.checkpoint.path, self.checkpoint.config.sampling
        limits = {
            "max_tokens": MAX_TOKENS,
            "n": self.rows,
            "prompts": self.most_prompts,
            "prompt_tokens": self.context,
            "prompt_characters": PROMPT_CHARACTERS,
            "logprobs": self.most_logprobs,
            "stop": MOST_STOPS,
            "logit_bias": MOST_BIASES,
            "body_bytes": BODY_BYTES,
            "seconds": self.deadline,
        }
        defaults = {field.name: getattr(sampling, field.name) for field in fields(SamplingParams)}
        defaults["logit_bias"] = [(i, finite(bias)) for i, bias in sampling.logit_bias]
        return {
            "id": path.stem,
            "object": "model",
            "created": int(path.stat().st_mtime),
            "owned_by": "you",
            "checkpoint": about,
            "sampling": defaults,
            "chat": "template" if self.checkpoint.chat_template else "turns",
            "limits": limits,
        }

    @property
    def most_logprobs(self) -> int:
        return min(MOST_LOGPROBS, self.vocab_size)

    def check_model(self, name: str) -> None:
        if name != self.model["id"]:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here; there is {self.model['id']!r}",
                "model",
                "model_not_found",
            )

    async def encode(
        self, param: str, function: Callable[..., list[int]], *given: Any
    ) -> list[int]:
        """The ids of a prompt."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.encoding, function, *given)
        except UserError as error:
            raise ApiError(400, str(error), param, "invalid_value") from None

    async def complete(self, body: CompletionBody) -> tuple[Call, ResponseBuilder]:
        """Begin completions. Raises ApiError and TooBusy, as `reply` does."""
        self.check_model(body.model)
        if len(body.prompt) > self.most_prompts:
            said = f"prompt has {len(body.prompt):,} entries; it may have {self.most_prompts}"
            raise ApiError(400, said, "prompt", "array_above_max_length")
        check_characters(
            "prompt", sum(len(prompt) for prompt in body.prompt if isinstance(prompt, str))
        )
        self.batcher.room_for(len(body.prompt))
        tokenizer, prompts = self.conversation.tokenizer, []
        for prompt in body.prompt:
            ids = (
                await self.encode("prompt", encode_prompt, tokenizer, prompt)
                if isinstance(prompt, str)
                else prompt
            )
            prompts.append(ids)
        return self.ask(
            CompletionResponse,
            "prompt",
            prompts,
            body,
            body.sampling(body.max_tokens, COMPLETION_TOKENS),
        )

    async def reply(self, body: ChatBody) -> tuple[Call, ResponseBuilder]:
        """Begin answers to a conversation."""
        self.check_model(body.model)
        check_characters("messages", sum(len(message.content) for message in body.messages))
        self.batcher.room_for(1)
        roles = {"developer": "system"}
        messages = [
            {"role": roles.get(message.role, message.role), "content": message.content}
            for message in body.messages
        ]
        ids = await self.encode("messages", self.conversation.encode, messages)
        most = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
        given = body.sampling(most, max(1, min(ANSWER, self.context - len(ids))))
        said = self.checkpoint.config.sampling
        given["stop"] = (*given.get("stop", said.stop), *self.conversation.stops)
        given["stop_ids"] = (*given.get("stop_ids", said.stop_ids), *self.stop_ids)
        return self.ask(ChatResponse, "messages", [ids], body, given)

    def ask(
        self,
        shape: type[ResponseBuilder],
        param: str,
        prompts: list[list[int]],
        body: Body,
        given: dict[str, Any],
    ) -> tuple[Call, ResponseBuilder]:
        """Check all that is asked, and begin."""
        try:
            params = merge_sampling_params(given, self.checkpoint)
            requests = [
                engine.GenerationRequest(
                    ids, params, self.checkpoint.tokenizer.eos_id, body.likeliest
                )
                for ids in prompts
            ]
            for request in requests:
                engine.validate_request(request, self.vocab_size)
        except FieldError as error:
            name = {"max_new_tokens": "max_tokens", "num_samples": "n"}.get(
                error.field, error.field
            )
            raise ApiError(400, f"{name} {error.message}", name, "invalid_value") from None
        except ValueError as error:
            raise ApiError(400, str(error), param, "invalid_value") from None
        limits = {
            "max_tokens": (params.max_new_tokens, MAX_TOKENS),
            "n": (params.num_samples, self.rows),
        }
        limits[body.likeliest_name] = (body.likeliest or 0, self.most_logprobs)
        for name, (asked, most) in limits.items():
            if asked > most:
                raise ApiError(
                    400, f"{name} is {asked:,}; here it may be {most:,}", name, "invalid_value"
                )
        longest = max(map(len, prompts))
        if longest > self.context:
            said = f"the prompt has {longest:,} tokens, and this model's context {self.context:,}; shorten it"
            raise ApiError(400, said, param, "context_length_exceeded")
        call = self.batcher.ask(requests, self.deadline, bool(body.stream))
        usage_told = bool(body.stream_options and body.stream_options.include_usage)
        told = body.likeliest is not None
        return call, shape(
            self.model["id"], self.spelling, sum(map(len, prompts)), told, usage_told
        )


def check_characters(param: str, count: int) -> None:
    """Before they are made into tokens, which takes time."""
    if count > PROMPT_CHARACTERS:
        said = f"{param}: {count:,} characters; there may be {PROMPT_CHARACTERS:,}"
        raise ApiError(400, said, param, "string_above_max_length")
