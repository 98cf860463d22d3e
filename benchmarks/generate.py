"""Generation beside transformers' `generate`, on the same weights and in the same run.

Greedy, from a prompt of 32 random tokens, whose reading is part of the time; the batch is so many such prompts, in the engine as
clients that come at once. The prompt of 512 is timed to its first token. Contenders take turns, `--repeat` times; the median is shown
with all of them. The limit is what the weights alone take to be read, by the bandwidth measured here for a sum over 512 MB.
"""

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.measure import OUT
from model import Transformer
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.inference.engine import Engine, GenerationRequest, decode_in_torch
from pocketlm.inference.placement import place
from pocketlm.model.quantization import weight_bytes

PROMPT, LONG = 32, 512


@dataclass(frozen=True)
class Contender:
    """Something that generates: so many tokens behind each of these prompts (B, T); greedy, never ending early."""

    name: str
    generate: Callable[[Tensor, int], None]
    bytes_per_step: int  # of weights


def bandwidth() -> float:
    """Bytes a second of a sum over memory that no cache holds, the best of five."""
    numbers = torch.ones(2**26, dtype=torch.int64)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begin)
    return numbers.numel() * 8 / min(seconds)


def ours(path: str, dtype: str, in_torch: bool = False) -> Contender:
    checkpoint = load_checkpoint(path)
    place(checkpoint, "cpu", dtype)
    model = checkpoint.model

    def generate(prompts: Tensor, count: int) -> None:
        engine = Engine(model, len(prompts), prompts.size(1) + count)
        if in_torch:
            engine.take = decode_in_torch
        for ids in prompts.tolist():
            engine.add(GenerationRequest(ids, SamplingParams(temperature=0, max_new_tokens=count)))
        while engine.busy:
            engine.step()

    how = "in torch" if in_torch or Engine(model, 1, 1).why_torch else "in C"
    embedding = (
        0
        if model.config.tie_embeddings
        else model.embed_tokens.weight.numel() * model.embed_tokens.weight.element_size()
    )
    return Contender(f"this, {dtype}, {how}", generate, weight_bytes(model) - embedding)


def theirs(path: str, dtype: str) -> Contender:
    """LlamaForCausalLM with the checkpoint's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = load_checkpoint(path).model
    c = model.config
    if (c.mlp, c.position, c.norm, c.norm_gain, c.embed_norm, c.final_norm) != (
        "swiglu",
        "rope",
        "rmsnorm",
        True,
        False,
        True,
    ):
        raise UserError(
            f"{path} is no Llama, which transformers has to be for the comparison; leave --beside out"
        )
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings, attention_bias=c.bias, mlp_bias=c.bias,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": p
        for name, p in model.state_dict().items()
    }
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    llama.load_state_dict(weights)
    llama.to(getattr(torch, dtype))

    @torch.inference_mode()
    def generate(prompts: Tensor, count: int) -> None:
        made = llama.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
        )
        assert made.size(1) == prompts.size(1) + count

    return Contender(
        f"transformers, {dtype}",
        generate,
        weight_bytes(model) * getattr(torch, dtype).itemsize // 4,
    )


def bench_generate(args: argparse.Namespace) -> int:
    """Tokens a second alone and in a batch, and the time to the first token behind a long prompt."""
    model: Transformer = load_checkpoint(args.ckpt).model
    context, size = model.config.max_seq_len, model.config.vocab_size
    if PROMPT + args.tokens > context:
        raise UserError(
            f"--tokens {args.tokens} behind {PROMPT} do not fit the context of {context}; take {context - PROMPT} or fewer"
        )
    draw = torch.Generator().manual_seed(0)
    short = torch.randint(size, (args.batch, PROMPT), generator=draw)
    long = torch.randint(size, (1, min(LONG, context - 1)), generator=draw)
    contenders = [theirs(args.ckpt, dtype) for dtype in args.beside]
    contenders += [ours(args.ckpt, dtype) for dtype in args.dtypes]
    contenders += [ours(args.ckpt, "bfloat16", in_torch=True)] if args.torch else []
    works = {"alone": (short[:1], args.tokens), "batch": (short, args.tokens), "first": (long, 1)}
    works = {name: works[name] for name in args.works}
    rates: dict[tuple[str, str], list[float]] = {}  # tokens a second of each run
    for contender in contenders:
        contender.generate(short[:1], 2)  # what only the first call takes
    for _ in range(args.repeat):
        for name, (prompts, count) in works.items():
            for contender in contenders:
                begin = time.perf_counter()
                contender.generate(prompts, count)
                rates.setdefault((contender.name, name), []).append(
                    len(prompts) * count / (time.perf_counter() - begin)
                )
    memory = bandwidth()
    OUT.print(
        f"{args.ckpt}: {model.config.n_parameters:,} parameters; {platform.platform()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; memory is read at {memory / 1e9:.1f} GB/s"
    )
    columns = {
        "alone": f"tokens/s, {args.tokens} tokens",
        "batch": f"tokens/s, {args.batch} prompts",
        "first": f"ms to the first token behind {long.size(1)}",
    }
    table = Table(box=None)
    table.add_column("")
    for name in works:
        for column in (
            columns[name],
            "ratio",
            *(["of the limit"] if name == "alone" else []),
            "each",
        ):
            table.add_column(column, justify="right")
    for contender in contenders:
        row = [contender.name]
        for name in works:
            each, middle = rates[contender.name, name], median(rates[contender.name, name])
            ratio = f"{middle / median(rates[contenders[0].name, name]):.2f}x"
            if name == "first":
                row += [f"{1e3 / middle:,.0f}", ratio, " ".join(f"{1e3 / one:.0f}" for one in each)]
            else:
                limit = (
                    [f"{middle * contender.bytes_per_step / memory:.0%}"] if name == "alone" else []
                )
                row += [f"{middle:,.1f}", ratio, *limit, " ".join(f"{one:.1f}" for one in each)]
        table.add_row(*row)
    OUT.print(table)
    return 0
