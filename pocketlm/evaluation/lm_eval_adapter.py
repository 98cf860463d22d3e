"""A checkpoint as a model of EleutherAI's lm-evaluation-harness (lm-eval).

Importing this module needs lm-eval (requirements-dev.txt) and takes seconds; `harness.py` imports
it on demand.
"""

import json
import math
import sys
from collections import defaultdict
from typing import Any

import torch

# lm-eval has no types
from lm_eval import simple_evaluate  # type: ignore[import-untyped]
from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]
from lm_eval.models.utils import normalize_gen_kwargs  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
from lm_eval.utils import (  # type: ignore[import-untyped]
    get_rolling_token_windows,
    handle_non_serializable,
    make_disjoint_window,
    make_table,
)

from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import FieldError, UserError
from pocketlm.evaluation.likelihood import (
    Query,
    encode_pair,
    query_likelihoods,
    split_at_common_start,
)
from pocketlm.inference.generate import stream_texts, until_stop

Scored = list[tuple[float, bool]]  # log-probability of each continuation; does greedy write it?


class CheckpointLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A checkpoint as a model of lm-eval, scored as the probe evaluator scores it.

    Context and continuation are encoded as one text, after the token that begins a document.
    lm-eval itself would move white space at the end of a context to the continuation, and would
    not score a token that spans the two. A request longer than the model's context loses its start.
    """

    max_gen_toks = 256  # of a task that sets no limit

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        self.checkpoint = checkpoint
        self.max_length = checkpoint.model.max_seq_len

    @property
    def eot_token_id(self) -> int | None:
        """Id of the token that ends a document."""
        return self.checkpoint.tokenizer.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the text's tokens, by default after the document prefix."""
        tokens = self.checkpoint.tokenizer.encode(string)
        if add_special_tokens is False:
            return tokens
        return self.checkpoint.tokenizer.document_prefix + tokens

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Scored:
        """Score the continuation of each request.

        All choices of a case are scored from the same token on, as one of them may share a token
        with the context.
        """
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[request.task_name, request.doc_id, request.args[0]].append(number)
        queries: dict[int, Query] = {}
        for numbers in groups.values():
            texts = [requests[number].args for number in numbers]
            pairs = [encode_pair(self.checkpoint.tokenizer, *text) for text in texts]
            queries |= dict(zip(numbers, split_at_common_start(pairs), strict=True))
        tokens = [(request.args, *queries[number]) for number, request in enumerate(requests)]
        return self._loglikelihood_tokens(tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, Any, Any]], disable_tqdm: bool = False, **_: Any
    ) -> Scored:
        """Score requests (texts, context ids, continuation ids).

        Raises UserError for a continuation that is empty, has nothing before it, or is too long.
        """
        room = self.max_length + 1  # the last token is never an input
        queries: list[Query] = []
        n_cut = 0
        for _texts, context, continuation in requests:
            ids = (*context, *continuation)[-room:]
            start = len(ids) - len(continuation)
            if start < 1 or not continuation:
                raise UserError(
                    f"a task scores {len(continuation)} tokens after {len(context)}; this model "
                    f"can score 1 to {self.max_length} tokens after 1 or more"
                )
            n_cut += len(context) + len(continuation) > room
            queries.append(Query(ids[:start], ids[start:]))
        if n_cut:
            print(
                f"{n_cut} of {len(queries)} requests do not fit {self.max_length} tokens "
                "and lose their start",
                file=sys.stderr,
            )
        likelihoods = query_likelihoods(self.checkpoint.model, queries)
        return [(likelihoods[query].logprob, likelihoods[query].greedy) for query in queries]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, in windows of the model's context.

        The last window is filled up with tokens before it, which are not scored again.
        """
        windows_of_text: list[list[tuple[Any, Any]]] = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            first = tokens[0] if tokens else 0
            windows = get_rolling_token_windows(tokens[1:], first, self.max_length, 1)
            windows_of_text.append([make_disjoint_window(window) for window in windows])
        flat: list[tuple[Any, Any, Any]] = []
        for windows in windows_of_text:
            flat += [(None, *window) for window in windows]
        scored = iter(self._loglikelihood_tokens(flat))
        return [math.fsum(next(scored)[0] for _ in windows) for windows in windows_of_text]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated for each request."""
        return [self.complete(*request.args) for request in requests]

    def complete(self, prompt: str, settings: dict[str, Any]) -> str:
        """Return the text after a prompt; greedy unless the settings ask for sampling.

        If the prompt leaves no room for max_gen_toks, its start is cut. It is kept whole if
        max_gen_toks alone fills the model's context. Raises UserError for an empty prompt without
        a document prefix.
        """
        options = normalize_gen_kwargs(settings, self.max_gen_toks)
        params = self.sampling_params(options)
        tokenizer = self.checkpoint.tokenizer
        ids = self.tok_encode(prompt)
        if not ids:
            raise UserError(
                "a task has an empty prompt, and no token begins a document in "
                f"{tokenizer.name!r}; leave the task out"
            )
        ids = ids[-max(0, self.max_length - params.max_new_tokens) :]
        pieces = stream_texts(self.checkpoint.model, tokenizer, [ids], params)
        stop = tuple(text for text in options["until"] if text)
        return "".join(until_stop((piece for _, piece in pieces), stop))

    def sampling_params(self, options: dict[str, Any]) -> SamplingParams:
        """Return a task's generation settings; greedy ones ignore what shapes a distribution.

        As in Hugging Face's generate, top_k may exceed the vocabulary. Raises UserError for a
        value out of range.
        """
        shape: dict[str, Any] = {
            name: options[name] for name in ("top_k", "min_p") if name in options
        }
        if "top_k" in shape:
            shape["top_k"] = min(shape["top_k"], self.checkpoint.tokenizer.vocab_size)
        if options["do_sample"]:
            shape |= {name: options.get(name, 1.0) for name in ("temperature", "top_p")}
        else:
            shape = {"temperature": 0.0}
        try:
            return SamplingParams(
                max_new_tokens=options["max_gen_toks"],
                seed=int(torch.randint(2**31, ())),  # simple_evaluate has seeded torch
                repetition_penalty=options.get("repetition_penalty", 1.0),
                **shape,
            )
        except FieldError as error:
            raise UserError(f"a task's generation_kwargs cannot be used: {error}") from None

    def get_model_info(self) -> dict[str, Any]:
        """Return the checkpoint's identity, for lm-eval's results."""
        return {
            "checkpoint": str(self.checkpoint.path),
            "step": self.checkpoint.step,
            "weights_sha256": self.checkpoint.weights_sha256,
            "tokenizer": self.checkpoint.tokenizer.name,
        }


def run_tasks(
    checkpoint: Checkpoint, names: list[str], folder: str | None, limit: float | None
) -> dict[str, Any]:
    """Score the checkpoint on lm-eval tasks; return lm-eval's results.

    lm-eval's own 14,000 tasks are searched only if `folder` lacks a name. Raises UserError for an
    unknown task.
    """
    exported = manager = TaskManager(include_path=folder, include_defaults=False)
    if not manager.task_index.keys() >= set(names):
        manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if name not in manager.task_index]:
        known = f"; in {folder} there are {', '.join(exported.all_tasks)}" if folder else ""
        raise UserError(f"no task of lm-eval is called {', '.join(unknown)}{known}")
    results: dict[str, Any] = simple_evaluate(
        model=CheckpointLM(checkpoint),
        tasks=names,
        task_manager=manager,
        limit=limit,
        log_samples=False,
    )
    return results


def results_json(results: dict[str, Any]) -> str:
    """Return the main parts of lm-eval's results as JSON."""
    names = ("results", "groups", "n-samples", "versions", "config")
    parts = {name: results[name] for name in names if name in results}
    return json.dumps(parts, indent=2, default=handle_non_serializable)


def results_table(results: dict[str, Any]) -> str:
    """Return lm-eval's tables of tasks and groups."""
    return "\n".join(make_table(results, name) for name in ("results", "groups") if name in results)
