"""Generation, compared with transformers' `generate` on the same weights and in the same run.

Greedy, from a prompt of 32 random tokens, whose prefill is part of the time. The batch is several
such prompts; they reach the engine together. The prompt of 512 tokens is timed to its first new
token. Contenders take turns, `--repeat` times; the table shows the median and every run. The limit
is the time to read the weights once, at the bandwidth of a sum over 512 MB measured here. The start
is the time from the start of a process of infer.py to its first token.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.measure import OUT, ROOT, machine
from model import ModelConfig
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.inference.backend import TorchBackend
from pocketlm.inference.engine import Engine, GenerationRequest
from pocketlm.inference.placement import move_to_device
from pocketlm.instruction_sets import multiplies_bfloat16
from pocketlm.model.quantization import weight_bytes

PROMPT, LONG = 32, 512
TEXT = "The history of the river and of the city"  # the prompt of infer.py
Rates = dict[tuple[str, str], list[float]]  # (contender, workload): tokens per second of each run


@dataclass(frozen=True)
class Contender:
    """A generator: prompts (B, T) and a count of greedy tokens that never end early."""

    name: str
    generate: Callable[[Tensor, int], None]
    bytes_per_step: int  # of weights that a decoding step reads


@dataclass(frozen=True)
class Workload:
    """Prompts (B, T), the number of tokens to generate after each, and the column's title."""

    prompts: Tensor
    count: int
    title: str


def bandwidth() -> float:
    """Return the bytes per second of a sum over memory that no cache holds, the best of five."""
    numbers = torch.ones(2**26, dtype=torch.int64)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begin)
    return numbers.numel() * 8 / min(seconds)


def ours(path: str, dtype: str, in_torch: bool = False) -> Contender:
    """Return our engine on a checkpoint."""
    checkpoint = load_checkpoint(path)
    move_to_device(checkpoint, "cpu", dtype)
    model = checkpoint.model

    backend = TorchBackend(model) if in_torch else None

    def generate(prompts: Tensor, count: int) -> None:
        engine = Engine(model, len(prompts), prompts.size(1) + count, backend)
        for ids in prompts.tolist():
            engine.add(GenerationRequest(ids, SamplingParams(temperature=0, max_new_tokens=count)))
        while engine.busy:
            engine.step()

    how = f"in {Engine(model, 1, 1, backend).backend.name}"
    weight = model.embed_tokens.weight
    # A step reads one row of an untied embedding.
    embedding = 0 if model.config.tie_embeddings else weight.numel() * weight.element_size()
    return Contender(f"this, {dtype}, {how}", generate, weight_bytes(model) - embedding)


def is_llama(config: ModelConfig) -> bool:
    """Return whether transformers' LlamaForCausalLM computes the same model."""
    kind = (config.mlp, config.position, config.norm)
    flags = (config.norm_gain, config.embed_norm, config.final_norm, config.qk_norm)
    plain = (
        config.attention_bias != "qkv"
        and config.rope_scaling is None
        and not (config.value_residual or config.embedding_shortcut or config.token_shift)
    )
    return kind == ("swiglu", "rope", "rmsnorm") and flags == (True, False, True, False) and plain


def theirs(path: str, dtype: str) -> Contender:
    """Return LlamaForCausalLM with the checkpoint's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = load_checkpoint(path).model
    c = model.config
    if not is_llama(c):
        raise UserError(
            f"{path} is not a Llama, which the comparison with transformers needs; "
            "pass --beside without a value"
        )
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        attention_bias=c.attention_bias == "all",
        mlp_bias=c.bias,
        max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    llama = LlamaForCausalLM(config).eval()
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": weight
        for name, weight in model.state_dict().items()
    }
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    llama.load_state_dict(weights)
    llama.to(getattr(torch, dtype))
    itemsize = getattr(torch, dtype).itemsize
    generate = transformers_generate(llama)
    return Contender(f"transformers, {dtype}", generate, weight_bytes(model) * itemsize // 4)


def transformers_generate(llama: torch.nn.Module) -> Callable[[Tensor, int], None]:
    """Return a function that generates exactly `count` tokens."""

    @torch.inference_mode()
    def generate(prompts: Tensor, count: int) -> None:
        generated = llama.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
        )
        assert generated.size(1) == prompts.size(1) + count

    return generate


def workloads(args: argparse.Namespace, config: ModelConfig) -> dict[str, Workload]:
    """Return the workloads of `--works`."""
    context, size = config.max_seq_len, config.vocab_size
    if PROMPT + args.tokens > context and {"alone", "batch"} & set(args.works):
        raise UserError(
            f"--tokens {args.tokens} after a prompt of {PROMPT} do not fit the context of "
            f"{context}; use {context - PROMPT} or fewer"
        )
    draw = torch.Generator().manual_seed(0)
    short = torch.randint(size, (args.batch, PROMPT), generator=draw)
    long = torch.randint(size, (1, min(LONG, context - 1)), generator=draw)
    every = {
        "alone": Workload(short[:1], args.tokens, f"tokens/s, {args.tokens} tokens"),
        "batch": Workload(short, args.tokens, f"tokens/s, {args.batch} prompts"),
        "first": Workload(long, 1, f"ms to the first token after {long.size(1)}"),
    }
    return {name: work for name, work in every.items() if name in args.works}


def time_in_turn(contenders: list[Contender], works: dict[str, Workload], repeat: int) -> Rates:
    """Run every contender on every workload, `repeat` times."""
    rates: Rates = {}
    for _ in range(repeat):
        for name, work in works.items():
            for contender in contenders:
                begin = time.perf_counter()
                contender.generate(work.prompts, work.count)
                seconds = time.perf_counter() - begin
                rate = len(work.prompts) * work.count / seconds
                rates.setdefault((contender.name, name), []).append(rate)
    return rates


def cells(name: str, each: list[float], first: float, of_limit: float) -> list[str]:
    """Return a contender's cells of one workload; `first` is the first contender's rate."""
    middle = median(each)
    ratio = f"{middle / first:.2f}x"
    if name == "first":
        return [f"{1e3 / middle:,.0f}", ratio, " ".join(f"{1e3 / rate:.0f}" for rate in each)]
    limit = [f"{middle * of_limit:.0%}"] if name == "alone" else []
    return [f"{middle:,.1f}", ratio, *limit, " ".join(f"{rate:.1f}" for rate in each)]


def rates_table(
    contenders: list[Contender], works: dict[str, Workload], rates: Rates, memory: float
) -> Table:
    """Return a table with a row for each contender; `memory` is the bandwidth in bytes/s."""
    table = Table(box=None)
    table.add_column("")
    for name, work in works.items():
        limit = ["of the limit"] if name == "alone" else []
        for column in (work.title, "ratio", *limit, "each"):
            table.add_column(column, justify="right")
    for contender in contenders:
        row = [contender.name]
        for name in works:
            first = median(rates[contenders[0].name, name])
            each = rates[contender.name, name]
            row += cells(name, each, first, contender.bytes_per_step / memory)
        table.add_row(*row)
    return table


def seconds_to_output(command: list[str]) -> float:
    """Return the seconds from the start of a process to its first byte on stdout."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        _, stderr = process.communicate()
    if not first or process.returncode:
        raise UserError(f"infer.py failed: {stderr.decode().strip()[-400:]}")
    return seconds


def print_starts(path: str, dtypes: list[str], repeat: int) -> None:
    """Print the time from the start of infer.py to its first token, for each dtype in turn."""
    command = [sys.executable, str(ROOT / "infer.py"), "--ckpt", path, "--device", "cpu"]
    command += ["--prompt", TEXT, "--max-new-tokens", "1"]
    starts: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    for _ in range(repeat):
        for dtype, seconds in starts.items():
            seconds.append(seconds_to_output([*command, "--dtype", dtype]))
    for dtype, seconds in starts.items():
        each = " ".join(f"{one:.2f}" for one in seconds)
        OUT.print(
            f"  infer.py's first token, {dtype}: {median(seconds):.2f} s after the start of the "
            f"process ({each})"
        )


def bench_generate(args: argparse.Namespace) -> int:
    """Print tokens per second for one prompt and for a batch, and the times to a first token."""
    config = load_checkpoint(args.ckpt).model.config
    works = workloads(args, config)
    OUT.print(f"{args.ckpt}: {config.n_parameters:,} parameters; {machine()}")
    if works:
        contenders = [theirs(args.ckpt, dtype) for dtype in args.beside]
        contenders += [ours(args.ckpt, dtype) for dtype in args.dtypes]
        if args.torch:
            dtype = "bfloat16" if multiplies_bfloat16("cpu") else "float32"
            contenders.append(ours(args.ckpt, dtype, in_torch=True))
        warm_up = torch.zeros(1, PROMPT, dtype=torch.long)
        for contender in contenders:
            contender.generate(warm_up, 2)
        rates = time_in_turn(contenders, works, args.repeat)
        memory = bandwidth()
        OUT.print(
            f"{torch.get_num_threads()} threads, torch {torch.__version__}; "
            f"memory is read at {memory / 1e9:.1f} GB/s"
        )
        OUT.print(rates_table(contenders, works, rates, memory))
    if "start" in args.works:
        print_starts(args.ckpt, args.dtypes, args.repeat)
    return 0
