"""Score checkpoints on probes: short prompts whose right continuation is known.

    python evaluate_checkpoints.py --cases cases/wiki_basics.yaml
    python evaluate_checkpoints.py --checkpoints 'checkpoints/*.ckpt' --top-k 5 --cases cases/wiki_basics.yaml

A case is `{name, prompt, target}`; the target carries its leading space. Prompt and target are encoded together, behind
the token that begins a document, and the score is the log-probability of the whole target (nats; 0 is certainty).
Checkpoints are ranked by its mean. `rank` is that of the target's first token among all tokens, 1 the most likely.
"""

import argparse
import csv
import dataclasses
import glob
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from checkpoint import Checkpoint, best_checkpoint, known_checkpoints, load_checkpoint
from config import check_key, parse_yaml
from errors import UserError, run_main
from model import Transformer
from tokenizer import Tokenizer

BATCH = 32  # cases in one forward pass
CASE_KEYS = {"name": True, "prompt": True, "target": True, "category": False, "source": False}  # key: required


@dataclass(frozen=True)
class Case:
    """One probe."""

    name: str
    prompt: str
    target: str
    category: str = ""
    source: str = ""  # where the fact is stated


@dataclass(frozen=True)
class Score:
    """What a checkpoint makes of a case."""

    name: str
    target: str
    logprob: float  # of the whole target, nats
    tokens: int  # of the target
    greedy: bool  # every token of the target was the most likely one
    rank: int  # of the target's first token
    top: list[tuple[str, float]]  # the most likely next tokens and their probabilities


@dataclass(frozen=True)
class Result:
    """A checkpoint and its scores. `names` are all the files with these weights."""

    names: list[str]
    step: int
    tokens: int
    val_loss: float | None
    weights_sha256: str
    scores: list[Score]

    def mean_logprob(self) -> float:
        return statistics.fmean(score.logprob for score in self.scores)

    def share(self, k: int) -> float:
        """Share of the cases whose target's first token is among the k most likely."""
        return statistics.fmean(score.rank <= k for score in self.scores)

    def greedy_share(self) -> float:
        return statistics.fmean(score.greedy for score in self.scores)

    def mrr(self) -> float:
        """Mean reciprocal rank of the first token."""
        return statistics.fmean(1 / score.rank for score in self.scores)


def load_cases(path: str) -> list[Case]:
    """The cases of a YAML (or JSON) file. Raises UserError with the line for one that cannot be meant."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the cases {path}: {error}") from None
    values, places = parse_yaml(text, path)
    if not isinstance(values, list) or not values:
        raise UserError(f"{path}: a suite is a list of cases, each {{name, prompt, target}}")
    cases: list[Case] = []
    for index, value in enumerate(values):
        place = places[(str(index),)]
        if not isinstance(value, dict):
            raise UserError(f"{place}: a case is {{name, prompt, target}}, not {value!r}")
        for key, given in value.items():
            check_key(key, list(CASE_KEYS), place, "a case")
            if not isinstance(given, str) or not given.strip():
                raise UserError(f"{place}: {key} is {given!r}; it must be text that is not empty (quote numbers)")
        if missing := [key for key, required in CASE_KEYS.items() if required and key not in value]:
            raise UserError(f"{place}: the case has no {' and no '.join(missing)}")
        case = Case(**value)
        if twin := next((c for c in cases if c.name == case.name or (c.prompt, c.target) == (case.prompt, case.target)), None):
            what = "name" if twin.name == case.name else "prompt and target"
            raise UserError(
                f"{place}: the {what} of {case.name!r} stands already at {places[(str(cases.index(twin)),)]}; change or remove one"
            )
        cases.append(case)
    return cases


def encode_case(tokenizer: Tokenizer, case: Case, context: int) -> tuple[list[int], int]:
    """Ids of prefix, prompt and target, encoded as one text, and where the target's own tokens begin.

    Where the tokenizer merges across the border, the target begins at the first token that the prompt alone does not have.
    """
    joint = tokenizer.encode(case.prompt + case.target)
    alone = tokenizer.encode(case.prompt)
    shared = next((i for i, (a, b) in enumerate(zip(alone, joint, strict=False)) if a != b), min(len(alone), len(joint)))
    ids, start = tokenizer.prefix + joint, len(tokenizer.prefix) + shared
    if start == 0:
        raise UserError(f"the case {case.name!r} leaves nothing before its target: its tokenizer has no token that begins a document")
    if len(ids) > context + 1:
        raise UserError(f"the case {case.name!r} has {len(ids)} tokens and the model a context of {context}; shorten it")
    return ids, start


@torch.inference_mode()
def score_cases(model: Transformer, tokenizer: Tokenizer, cases: list[Case], top_k: int) -> list[Score]:
    """Score each case, in batches of similar length; the padding stands behind the text, where causal attention ignores it."""
    encoded = [encode_case(tokenizer, case, model.config.max_seq_len) for case in cases]
    order = sorted(range(len(cases)), key=lambda i: len(encoded[i][0]))
    scores: dict[int, Score] = {}
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        longest = max(len(encoded[i][0]) for i in chosen) - 1
        batch = torch.zeros(len(chosen), longest, dtype=torch.long)
        for row, i in enumerate(chosen):
            ids = encoded[i][0][:-1]
            batch[row, : len(ids)] = torch.tensor(ids)
        hidden = model.hidden(batch.to(model.embed_tokens.weight.device))
        for row, i in enumerate(chosen):
            ids, start = encoded[i]
            target = torch.tensor(ids[start:])
            logprobs = model.logits(hidden[row, start - 1 : len(ids) - 1]).float().cpu().log_softmax(-1)  # (target tokens, V)
            best = logprobs[0].topk(min(top_k, logprobs.size(-1)))
            scores[i] = Score(
                cases[i].name,
                cases[i].target,
                float(logprobs.gather(1, target[:, None]).sum()),
                len(target),
                bool((logprobs.argmax(-1) == target).all()),
                int((logprobs[0] > logprobs[0, target[0]]).sum()) + 1,
                [(tokenizer.decode([int(t)]), math.exp(p)) for p, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)],
            )
    return [scores[i] for i in range(len(cases))]


def evaluate(paths: list[str], cases: list[Case], tokenizer_name: str | None, top_k: int) -> list[Result]:
    """A result for each set of weights, best first; files with the same weights share one."""
    results: dict[str, Result] = {}
    for path in paths:
        checkpoint: Checkpoint = load_checkpoint(path, tokenizer_name)
        if same := results.get(checkpoint.weights_sha256):
            same.names.append(path)
            continue
        print(f"scoring {path}", file=sys.stderr)
        scores = score_cases(checkpoint.model, checkpoint.tokenizer, cases, top_k)
        if not all(math.isfinite(score.logprob) for score in scores):
            raise UserError(f"{path} gives log-probabilities that are not finite: its weights are broken; leave it out")
        results[checkpoint.weights_sha256] = Result(
            [path], checkpoint.step, checkpoint.tokens, checkpoint.val_loss, checkpoint.weights_sha256, scores
        )
    return sorted(results.values(), key=Result.mean_logprob, reverse=True)


def print_tables(results: list[Result], cases: list[Case], top_k: int) -> None:
    """The ranking over checkpoints, then the cases under the best of them."""
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 150)
    ranking = Table(title=f"{len(cases)} cases", title_justify="left")
    for title in (
        "",
        "checkpoint",
        "step",
        "tokens",
        "val loss",
        "mean log-prob",
        "whole target greedy",
        "first token top-1",
        f"top-{top_k}",
        "MRR",
    ):
        ranking.add_column(title, justify="left" if title in ("", "checkpoint") else "right")
    for place, r in enumerate(results, 1):
        loss = "" if r.val_loss is None else f"{r.val_loss:.4f}"
        ranking.add_row(
            str(place),
            escape("\n= ".join(r.names)),
            f"{r.step:,}",
            f"{r.tokens:,}",
            loss,
            f"{r.mean_logprob():.3f}",
            f"{r.greedy_share():.0%}",
            f"{r.share(1):.0%}",
            f"{r.share(top_k):.0%}",
            f"{r.mrr():.3f}",
        )
    console.print(ranking)
    detail = Table(title=f"{results[0].names[0]}, case by case", title_justify="left")
    for title in ("case", "target", "log-prob", "rank", f"top {top_k} next tokens"):
        detail.add_column(title, justify="right" if title in ("log-prob", "rank") else "left")
    for score in results[0].scores:
        top = "  ".join(f"{token!r} {p:.2f}" for token, p in score.top)
        mark = "[bold]" if score.greedy else ""
        detail.add_row(escape(score.name), mark + escape(repr(score.target)), f"{score.logprob:.2f}", f"{score.rank:,}", escape(top))
    console.print(detail)


def print_json(results: list[Result], cases: list[Case]) -> None:
    summary = [
        dataclasses.asdict(r)
        | {"mean_logprob": r.mean_logprob(), "greedy_share": r.greedy_share(), "top1_share": r.share(1), "mrr": r.mrr()}
        for r in results
    ]
    json.dump({"schema": 1, "cases": [dataclasses.asdict(case) for case in cases], "checkpoints": summary}, sys.stdout, indent=1)
    print()


def print_csv(results: list[Result]) -> None:
    """A row for each checkpoint and case."""
    writer = csv.writer(sys.stdout)
    writer.writerow(["checkpoint", "step", "tokens", "case", "target", "logprob", "target_tokens", "greedy", "rank"])
    for r in results:
        for s in r.scores:
            writer.writerow([r.names[0], r.step, r.tokens, s.name, s.target, f"{s.logprob:.6f}", s.tokens, int(s.greedy), s.rank])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score checkpoints on probes.")
    parser.add_argument(
        "--checkpoints", help="files, as a quoted pattern; by default those of the unnamed run, else of the best run there is"
    )
    parser.add_argument("--cases", required=True, help="a YAML file of {name, prompt, target}")
    parser.add_argument("--tokenizer", help="checked against each checkpoint's own; never needed")
    parser.add_argument("--top-k", type=int, default=5, help="next tokens shown and counted (default %(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV, a row for each checkpoint and case")
    return parser.parse_args(argv)


def default_pattern() -> str:
    """The checkpoints of the unnamed run, or of the named one with the lowest validation loss, which is then said."""
    if glob.glob("checkpoints/*.ckpt"):
        return "checkpoints/*.ckpt"
    pattern = str(best_checkpoint().parent / "*.ckpt")
    print(f"scoring {pattern}", file=sys.stderr)
    return pattern


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.top_k < 1:
        raise UserError(f"--top-k is {args.top_k}; it must be 1 or more")
    cases = load_cases(args.cases)
    pattern = args.checkpoints or default_pattern()
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise UserError(f"no checkpoint matches {pattern!r}; {known_checkpoints()}")
    results = evaluate(paths, cases, args.tokenizer, args.top_k)
    if args.json:
        print_json(results, cases)
    elif args.csv:
        print_csv(results)
    else:
        print_tables(results, cases, args.top_k)
    return 0


if __name__ == "__main__":
    run_main(main)
