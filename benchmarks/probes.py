"""Scoring probes, beside a loop over the candidates."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.measure import OUT, ROOT
from model import ModelConfig, Transformer
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.evaluation.cases import known_suites, load_suite, merge_suites
from pocketlm.evaluation.likelihood import query_likelihoods
from pocketlm.evaluation.scoring import encode_case, score_cases
from pocketlm.files import expand_globs
from pocketlm.tokenizer.build import build_tokenizer


def bench_probes(args: argparse.Namespace) -> int:
    """Encoding and scoring a suite, beside one forward pass for each candidate; the two have to agree."""
    if args.ckpt:
        checkpoint = load_checkpoint(args.ckpt)
        model, tokenizer, what = checkpoint.model, checkpoint.tokenizer, args.ckpt
    else:
        torch.manual_seed(0)
        tokenizer, what = (
            build_tokenizer("gpt2", ROOT / "data"),
            "the default run's model, of random weights",
        )
        model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, max_seq_len=256)).eval()
    suite = merge_suites(
        load_suite(path) for path in expand_globs(args.cases, "suite", known_suites)
    )
    cases = suite.cases[: args.limit]

    def timed(work: Callable) -> tuple[float, list]:
        begin = time.perf_counter()
        made = work()
        return time.perf_counter() - begin, made

    encoding, encoded = timed(
        lambda: [encode_case(tokenizer, case, model.config.max_seq_len) for case in cases]
    )
    requests = [r for e in encoded if e.case.type != "generate" for r in (*e.requests, *e.alone)]

    @torch.inference_mode()
    def one_at_a_time() -> list[float]:
        sums = []
        for request in requests:
            ids = torch.tensor([request.context + request.continuation])
            logprobs = model(ids[:, :-1]).log_softmax(-1)[0, len(request.context) - 1 :]
            sums.append(logprobs.gather(1, ids[0, len(request.context) :, None]).sum().item())
        return sums

    loop, sums = timed(one_at_a_time)
    answers = query_likelihoods(model, requests)
    apart = max(
        abs(total - answers[request].logprob) for total, request in zip(sums, requests, strict=True)
    )
    ours = sorted(
        timed(lambda: score_cases(model, tokenizer, encoded))[0] for _ in range(args.repeat)
    )
    OUT.print(
        f"{what}: {len(cases)} cases, {len(requests)} candidates, {torch.get_num_threads()} threads"
    )
    OUT.print(
        f"  encoding {encoding:.2f} s, scoring {statistics.median(ours):.2f} s (all: {' '.join(f'{s:.2f}' for s in ours)})"
    )
    OUT.print(
        f"  a forward pass for each candidate: {loop:.2f} s, {loop / statistics.median(ours):.1f} times as long"
    )
    OUT.print(f"  largest difference of a log-probability: {apart:.1e} nats")
    return 0
