"""Probe scoring, compared with a loop over the candidates."""

import argparse
import statistics

import torch

from benchmarks.measure import OUT, ROOT, machine, timed
from model import ModelConfig, Transformer
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.evaluation.cases import known_suites, load_suite, merge_suites
from pocketlm.evaluation.likelihood import query_likelihoods
from pocketlm.evaluation.scoring import encode_case, score_cases, scored_queries
from pocketlm.files import expand_globs
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.build import build_tokenizer


def load_model(ckpt: str | None) -> tuple[Transformer, Tokenizer, str]:
    """Return the model, its tokenizer and its description; by default, one with random weights."""
    if ckpt:
        checkpoint = load_checkpoint(ckpt)
        return checkpoint.model, checkpoint.tokenizer, ckpt
    torch.manual_seed(0)
    tokenizer = build_tokenizer("gpt2", ROOT / "data")
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_seq_len=256)
    return Transformer(config).eval(), tokenizer, "the default run's model, of random weights"


@torch.inference_mode()
def one_at_a_time(model: Transformer, requests: list) -> list[float]:
    """Return the log-probability of each continuation, by one forward pass for each."""
    sums = []
    for request in requests:
        ids = torch.tensor([request.context + request.continuation])
        logprobs = model(ids[:, :-1]).log_softmax(-1)[0, len(request.context) - 1 :]
        sums.append(logprobs.gather(1, ids[0, len(request.context) :, None]).sum().item())
    return sums


def bench_probes(args: argparse.Namespace) -> int:
    """Time encoding and scoring a suite, and a forward pass for each candidate; compare results."""
    model, tokenizer, description = load_model(args.ckpt)
    paths = expand_globs(args.cases, "suite", known_suites)
    cases = merge_suites(load_suite(path) for path in paths).cases[: args.limit]
    context = model.config.max_seq_len
    encoding, encoded = timed(lambda: [encode_case(tokenizer, case, context) for case in cases])
    requests = scored_queries(encoded)
    loop, sums = timed(lambda: one_at_a_time(model, requests))
    likelihoods = query_likelihoods(model, requests)
    difference = max(
        abs(total - likelihoods[request].logprob)
        for total, request in zip(sums, requests, strict=True)
    )
    ours = [timed(lambda: score_cases(model, tokenizer, encoded))[0] for _ in range(args.repeat)]
    median = statistics.median(ours)
    OUT.print(
        f"{description}: {len(cases)} cases, {len(requests)} candidates, "
        f"{torch.get_num_threads()} threads, {machine()}"
    )
    OUT.print(
        f"  encoding {encoding:.2f} s, scoring {median:.2f} s "
        f"(all: {' '.join(f'{seconds:.2f}' for seconds in sorted(ours))})"
    )
    OUT.print(
        f"  a forward pass for each candidate: {loop:.2f} s, {loop / median:.1f} times as long"
    )
    OUT.print(f"  largest difference of a log-probability: {difference:.1e} nats")
    return 0
