"""EleutherAI's lm-evaluation-harness: a checkpoint as its model, suites as its tasks."""

import argparse
import json
import math
import re
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
import yaml

from pocketlm.checkpoint.loading import Checkpoint, best_checkpoint, load_checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.evaluation.cases import Case, Suite
from pocketlm.evaluation.likelihood import Query, query_likelihoods
from pocketlm.evaluation.scoring import encode_pair, of_one_context, text_of
from pocketlm.inference.generate import generate
from pocketlm.inference.text import until_stop
from pocketlm.tokenizer.streaming import stream_text

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

# ---- a checkpoint as a model of lm-eval ------------------------------------------------------------------------------


def as_lm(checkpoint: Checkpoint) -> "TemplateLM":
    """What lm_eval.simple_evaluate takes as its model."""
    return lm_class()(checkpoint)


@cache
def lm_class() -> type["TemplateLM"]:
    """The class, made here because lm_eval need not be installed and takes seconds to import."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.models.utils import normalize_gen_kwargs
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise UserError(
            f"lm-eval cannot be imported ({error}); install it with: pip install -r requirements-dev.txt"
        ) from None

    class CheckpointLM(TemplateLM):
        """Asks as the probe evaluator does: context and continuation are one text, behind the token that begins a document.

        lm-eval itself would count white space at a context's end to the continuation, and not ask a token that joins the two.
        A request longer than the model's context loses its beginning.
        """

        max_gen_toks = 256  # of a task that does not say

        def __init__(self, checkpoint: Checkpoint):
            super().__init__()
            self.checkpoint, self.kit_tokenizer = checkpoint, checkpoint.tokenizer
            self.max_length = checkpoint.model.config.max_seq_len

        @property
        def eot_token_id(self) -> int | None:
            return self.kit_tokenizer.eos_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return (
                self.kit_tokenizer.prefix if add_special_tokens is not False else []
            ) + self.kit_tokenizer.encode(string)

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            by_context = defaultdict(
                dict
            )  # of a case's choices the first token asked is the same one, wherever it is joined
            for number, request in enumerate(requests):
                context, continuation = request.args
                by_context[request.task_name, request.doc_id, context][number] = encode_pair(
                    self.kit_tokenizer, context, continuation
                )
            asked = {
                number: r
                for pairs in by_context.values()
                for number, r in zip(pairs, of_one_context([*pairs.values()]), strict=True)
            }
            return self._loglikelihood_tokens(
                [(request.args, *asked[number]) for number, request in enumerate(requests)]
            )

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            asked, cut, room = [], 0, self.max_length + 1  # the last token is never an input
            for _text, context, continuation in requests:
                ids = (*context, *continuation)[-room:]
                start = len(ids) - len(continuation)
                if start < 1 or not continuation:
                    n = f"{len(continuation)} tokens behind {len(context)}"
                    raise UserError(
                        f"a task asks {n}; this model answers to 1 to {self.max_length}, behind 1 or more"
                    )
                cut += len(context) + len(continuation) > room
                asked.append(Query(ids[:start], ids[start:]))
            if cut:
                print(
                    f"{cut} of {len(asked)} requests do not fit {self.max_length} tokens and lose their beginning",
                    file=sys.stderr,
                )
            answers = query_likelihoods(self.checkpoint.model, asked)
            return [(answers[request].logprob, answers[request].greedy) for request in asked]

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            """Nats of whole texts, in windows of the model's context; the last one reaches back over tokens asked before."""
            texts = [self.tok_encode(request.args[0]) for request in requests]
            windows = [
                list(
                    map(
                        make_disjoint_window,
                        get_rolling_token_windows(t[1:], *t[:1] or [0], self.max_length, 1),
                    )
                )
                for t in texts
            ]
            answers = iter(
                self._loglikelihood_tokens(
                    [(None, *window) for of_text in windows for window in of_text]
                )
            )
            return [math.fsum(next(answers)[0] for _ in of_text) for of_text in windows]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [self.complete(*request.args) for request in requests]

        def complete(self, context: str, settings: dict[str, Any]) -> str:
            """Greedy, unless the settings say do_sample or a temperature.

            The context's end is kept that leaves room for the new tokens; all of it where these alone fill the model's context.
            """
            given = normalize_gen_kwargs(settings, self.max_gen_toks)
            params = SamplingParams(
                max_new_tokens=given["max_gen_toks"],
                temperature=given.get("temperature", 1.0) if given["do_sample"] else 0.0,
                top_p=given.get("top_p", 1.0),
                seed=int(torch.randint(2**31, ())),  # simple_evaluate has seeded torch
                **{
                    name: given[name]
                    for name in ("top_k", "min_p", "repetition_penalty")
                    if name in given
                },
            )
            if not (ids := self.tok_encode(context)):
                raise UserError(
                    f"a task has an empty prompt, and no token begins a document in {self.kit_tokenizer.name!r}"
                )
            ids = ids[-max(0, self.max_length - params.max_new_tokens) :]
            rows = generate(self.checkpoint.model, torch.tensor([ids]), params, self.eot_token_id)
            pieces = stream_text(
                self.kit_tokenizer, (token for [token] in rows if token is not None)
            )
            return "".join(until_stop(pieces, tuple(filter(None, given["until"]))))

        def get_model_info(self) -> dict[str, Any]:
            """For lm-eval's results."""
            c = self.checkpoint
            return {
                "checkpoint": str(c.path),
                "step": c.step,
                "weights_sha256": c.weights_sha256,
                "tokenizer": c.tokenizer.name,
            }

    return CheckpointLM


# ---- our suites as tasks of lm-eval ----------------------------------------------------------------------------------

ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}


BITS = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}


CHOICE = {"output_type": "multiple_choice", "doc_to_text": "prompt", "doc_to_choice": "choices"}


TASKS: dict[
    str, dict[str, Any]
] = {  # kind: how lm-eval reads the fields of a row, and what it measures
    "choice": CHOICE | {"metric_list": [ACC, ACC | {"metric": "acc_bytes"}]},
    "schema": CHOICE | {"doc_to_text": "gold", "metric_list": [ACC]},
    "cloze": {"output_type": "loglikelihood", "doc_to_text": "prompt", "metric_list": [ACC]},
    "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "metric_list": [BITS]},
}


def as_row(case: Case) -> tuple[str, dict[str, Any]] | None:
    """The kind of task a case belongs to, and its row there; None for one that lm-eval cannot grade."""
    row = {"id": case.id, "category": case.category, "prompt": case.prompt}
    match case.type:
        case "schema":
            return "schema", row | {
                "choices": case.contexts,
                "gold": case.gold,
                "target": case.continuation,
            }
        case "text":
            return "text", row | {"target": text_of(case)}
        case "cloze" if len(case.answers) == 1 and not case.distractors:
            return "cloze", row | {"target": case.answers[0]}
        case "minimal_pair" | "choice" | "cloze" if case.chance:
            texts = [text for _, text in case.candidates]  # the right ones first
            turn = crc32(case.id.encode()) % len(
                texts
            )  # lm-eval takes the first of equals, which must not always be right
            targets = [(i - turn) % len(texts) for i in range(case.n_right)]
            return "choice", row | {"choices": texts[turn:] + texts[:turn], "target": targets}
    return None


def task_name(suite: Suite) -> str:
    """Of the tag that runs all tasks of the suite."""
    return re.sub(r"[^\w.-]+", "_", suite.name)


def export(suite: Suite, folder: Path) -> list[str]:
    """Write a YAML and a JSONL file for each kind of case in the suite; the tasks' names. Says on stderr what is left out."""
    rows, left_out = defaultdict(list), Counter()
    for case in suite.cases:
        if exported := as_row(case):
            rows[exported[0]].append(exported[1])
        else:
            left_out[
                "of type generate"
                if case.type == "generate"
                else "with several answers and no distractors"
            ] += 1
    for kind, n in left_out.items():
        print(f"{suite.name}: {n} cases {kind} are left out", file=sys.stderr)
    if n := sum(case.scoring in ("token", "pmi") for case in suite.cases):
        print(
            f"{suite.name}: {n} cases are scored by token or pmi here, and by their sum in lm-eval",
            file=sys.stderr,
        )
    folder.mkdir(parents=True, exist_ok=True)
    names = {kind: f"{task_name(suite)}_{kind}" for kind in rows}
    for kind, name in names.items():
        data = folder.absolute() / f"{name}.jsonl"
        data.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[kind]),
            encoding="utf-8",
        )
        task = {
            "task": name,
            "tag": task_name(suite),
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
        }
        task |= {
            "test_split": "test",
            "doc_to_target": "target",
            "target_delimiter": "",
            "num_fewshot": 0,
            **TASKS[kind],
        }
        task["metadata"] = {"version": 1.0, "suite": suite.name, "sha256": suite.sha256}
        data.with_suffix(".yaml").write_text(
            yaml.safe_dump(task, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
    return list(names.values())


# ---- command line ----------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Print lm-eval's table of a checkpoint. Its own 14,000 tasks are looked through only for names that --include lacks."""
    lm = as_lm(load_checkpoint(args.ckpt or best_checkpoint()))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    names, folder = args.tasks.split(","), args.include
    if folder and not Path(folder).is_dir():
        raise UserError(
            f"--include {folder} is not a folder; make it with: python harness.py export --cases FILE --to {folder}"
        )
    included = manager = TaskManager(include_path=folder, include_defaults=False)
    if not manager.task_index.keys() >= set(names):
        manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if name not in manager.task_index]:
        known = f"; in {folder} there are {', '.join(included.all_tasks)}" if folder else ""
        raise UserError(f"no task of lm-eval is called {', '.join(unknown)}{known}")
    results = simple_evaluate(
        model=lm, tasks=names, task_manager=manager, limit=args.limit, log_samples=False
    )
    if args.json:
        kept = {
            key: results[key]
            for key in ("results", "groups", "n-samples", "versions", "config")
            if key in results
        }
        print(json.dumps(kept, indent=2, default=handle_non_serializable))
    else:
        print(
            "\n".join(make_table(results, key) for key in ("results", "groups") if key in results)
        )
