"""Weights of 8 or 4 bits, from which generation reads two or three and a half times fewer bytes than from bfloat16.

    python quantize.py checkpoints/final.ckpt --dtype int8 --to checkpoints/final.int8.ckpt
    python quantize.py checkpoints/final.ckpt --dtype int4 --report --cases 'cases/*.yaml'

int8: w = q * scale, q from -127 to 127, a scale for each output. int4: w = q * scale + low, q from 0 to 15, a scale and a low
for each 32 inputs; the embedding and the head stay int8 there. Norms and biases are as they were, and so are activations:
bfloat16 where the device multiplies it, else float32.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from errors import UserError, run_main
from model import Transformer

if TYPE_CHECKING:
    from config import Config

QUANTIZED = ("int8", "int4")
GROUP = 32  # inputs that share an int4 scale; decode.c says it too
FEW = 16  # rows up to which the packed matmul of torch is faster than to unpack the matrix and multiply by that


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> int8 of that shape, and (out,) scales in float32.

    >>> q, scale = quantize_int8(torch.tensor([[0.5, -1.27, 0.01]]))
    >>> q.tolist(), round(scale.item(), 4)
    ([[50, -127, 1]], 0.01)
    """
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> int16 words (out, in / 4) as `pack_int4` packs them; (out, in / 32, 2) scale and low in bfloat16."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low = groups.amin(-1).bfloat16()
    scale = ((groups.amax(-1) - low.float()) / 15).clamp(min=1e-12).bfloat16()
    q = ((groups - low.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 15)
    return pack_int4(q.flatten(1)), torch.stack([scale, low], -1)


def pack_int4(q: Tensor) -> Tensor:
    """Numbers from 0 to 15, (out, in) -> (out, in / 4) int16: of each 64, word j holds those at j, j + 16, j + 32, j + 48."""
    planes = q.to(torch.int32).unflatten(1, (-1, 4, 16))
    words = planes[:, :, 0] | planes[:, :, 1] << 4 | planes[:, :, 2] << 8 | planes[:, :, 3] << 12
    return words.flatten(1).to(torch.int16)  # the upper half of the range wraps around


def unpack_int4(words: Tensor) -> Tensor:
    """The other way, to int16."""
    shifts = torch.tensor([0, 4, 8, 12], dtype=torch.int16, device=words.device)[:, None]
    return (words.unflatten(1, (-1, 1, 16)) >> shifts & 15).flatten(1)


class Quantized(nn.Module):
    """A matrix of integers. `.to(dtype)` sets the dtype of what it works on; its own numbers stay as they are."""

    dtype: torch.dtype

    def _apply(self, fn, recurse: bool = True) -> nn.Module:  # what nn.Module.to calls
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(torch.empty(0, device=buffer.device)).device)
        return self


class QuantizedLinear(Quantized):
    """x -> x weight^T + bias, by one of the functions above."""

    quantizer: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.dtype = linear.weight.dtype
        weight, scale = type(self).quantizer(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())


class Int8Linear(QuantizedLinear):
    """weight (out, in) int8, scale (out,) float32."""

    quantizer = staticmethod(quantize_int8)

    def matrix(self) -> Tensor:
        return (self.weight * self.scale[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows, n_in = x.numel() // x.size(-1), x.size(-1)
        # torch's packed matmul reads beyond the end of other widths, and with float32 it is ten times slower
        if rows > FEW or n_in % 32 or x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return F.linear(x, self.matrix(), bias)
        y = torch._weight_int8pack_mm(x.reshape(rows, -1), self.weight, self.scale.bfloat16()).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


class Int4Linear(QuantizedLinear):
    """weight (out, in / 4) words of four, scale (out, in / 32, 2) with the lows."""

    quantizer = staticmethod(quantize_int4)

    def matrix(self) -> Tensor:
        groups = unpack_int4(self.weight).unflatten(1, (-1, GROUP))
        scale, low = self.scale.to(self.dtype)[..., None].unbind(-2)  # (out, groups, 1)
        return (groups * scale + low).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(), None if self.bias is None else self.bias.to(x.dtype))


class Int8Embedding(Quantized):
    """Ids -> rows of an int8 matrix; where the head is tied, of the head's."""

    def __init__(self, matrix: Int8Linear):
        super().__init__()
        self.dtype = matrix.dtype
        self.register_buffer("weight", matrix.weight)
        self.register_buffer("scale", matrix.scale)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.weight[ids] * self.scale[ids][..., None]).to(self.dtype)


def quantize(model: Transformer, dtype: str) -> Transformer:
    """Put integer matrices in the place of the model's own; it is the same model then. Raises UserError."""
    assert dtype in QUANTIZED
    if dtype == "int4" and all(module.in_features % 64 for module in model.layers.modules() if isinstance(module, nn.Linear)):
        raise UserError(f"int4 needs widths that 64 divides, and this model's are {model.config.d_model} and {model.config.d_ff}; use int8")
    for layer in model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, Int4Linear(module) if dtype == "int4" and module.in_features % 64 == 0 else Int8Linear(module))
    embedding = Int8Linear(as_linear(model.embed_tokens.weight))
    model.lm_head = embedding if model.lm_head is None else Int8Linear(model.lm_head)
    model.embed_tokens = Int8Embedding(embedding)
    return model


def as_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def weight_bytes(model: Transformer) -> int:
    """What all weights take; a shared one counts once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}.values())


# ---- the command -----------------------------------------------------------------------------------------------------


def write_quantized(source: Path, target: Path, dtype: str) -> Transformer:
    """The checkpoint `source` with quantised weights, for `load_checkpoint`; optimizer state is left out."""
    from checkpoint import load_checkpoint, read_checkpoint, save_whole

    model, state = quantize(load_checkpoint(source).model, dtype), read_checkpoint(source)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_whole({"state_dict": weights, "global_step": state["global_step"], "kit": state["kit"] | {"quantized": dtype}}, target)
    return model


def validation_texts(config: "Config", limit: int) -> Iterator[str]:
    """Documents that a run of this config never trains on, up to so many characters."""
    from prepare import split_source
    from sources import open_source

    for part in config.data.sources:
        own = bool(part.val_path or part.val_split)
        source = open_source(part, config.data.cache_dir, validation=own)
        for chunk in split_source(source, 1.0 if own else config.data.val_share):
            if chunk.validation and limit > 0:
                yield chunk.text[:limit]
                limit -= len(chunk.text)


def report(path: str, dtypes: list[str], texts: list[str], suites: list[str]) -> None:
    """What each dtype makes of texts and of probe cases, beside bfloat16, with the difference and its interval over the same cases."""
    from rich.console import Console
    from rich.table import Table

    from cases import Case, joined, load_suite
    from checkpoint import load_checkpoint
    from evaluate_checkpoints import found
    from infer import place
    from results import Result
    from scoring import encode_case, score_cases

    cases = [Case(f"text {n}", "text", text=text) for n, text in enumerate(texts)]
    asked = joined(load_suite(suite) for suite in found(suites, "suite")).cases if suites else ()
    table = Table(
        title=f"{path}: {sum(len(text.encode()) for text in texts):,} bytes of text, {len(asked)} cases", box=None, title_justify="left"
    )
    for column in ("", "MB", "perplexity", "change", "bits per byte", "cases right", "change"):
        table.add_column(column, justify="right" if column else "left")
    first: tuple[float, Result] | None = None
    for dtype in dict.fromkeys(["bfloat16", *dtypes]):
        checkpoint = load_checkpoint(path)
        place(checkpoint, "auto", dtype)
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        encoded = [encode_case(tokenizer, case, model.config.max_seq_len) for case in (*cases, *asked)]
        scores = score_cases(model, tokenizer, encoded)
        of_texts, of_cases = scores[: len(cases)], scores[len(cases) :]
        nats = math.fsum(score.bits_per_byte * score.bytes for score in of_texts) * math.log(2)
        perplexity = math.exp(nats / sum(score.tokens for score in of_texts))
        result = Result([dtype], checkpoint.step, checkpoint.tokens, None, "", tokenizer.fingerprint, of_cases)
        first = first or (perplexity, result)
        row = [dtype, f"{weight_bytes(model) / 1e6:,.1f}", f"{perplexity:,.3f}", f"{perplexity / first[0] - 1:+.2%}"]
        row.append(f"{nats / math.log(2) / sum(score.bytes for score in of_texts):.4f}")
        if result.graded:
            apart, (low, high) = result.ahead_of(first[1])
            row += [f"{result.macro:.2%}", f"{100 * apart:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"]
        table.add_row(*row)
    Console(highlight=False, width=140).print(table)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quantise a checkpoint, or tell what that would do to it.")
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--dtype", nargs="+", choices=QUANTIZED, default=list(QUANTIZED), help="one to write; to report on, both unless given"
    )
    parser.add_argument("--to", metavar="FILE", help="write the quantised checkpoint")
    parser.add_argument("--report", action="store_true", help="perplexity and probe scores beside bfloat16's")
    parser.add_argument(
        "--text", metavar="FILE", help="of which the perplexity is; else the validation documents of the checkpoint's config"
    )
    parser.add_argument("--characters", type=int, default=100_000, help="of that text (default %(default)s)")
    parser.add_argument("--cases", nargs="+", default=[], metavar="SUITE", help="probe suites")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    from checkpoint import load_checkpoint

    args = parse_args(argv)
    if not args.to and not args.report:
        raise UserError("there is nothing to do; give --to FILE, or --report")
    if args.characters < 1:
        raise UserError(f"--characters is {args.characters}; it must be 1 or more")
    checkpoint = load_checkpoint(args.checkpoint)
    if checkpoint.quantized:
        raise UserError(f"{args.checkpoint} is {checkpoint.quantized} already; give the checkpoint that it was made of")
    if args.to:
        if len(args.dtype) > 1:
            raise UserError("--to writes one checkpoint; say --dtype int8, or --dtype int4")
        if Path(args.to).exists():
            raise UserError(f"{args.to} is there already; delete it, or name another file")
        before = weight_bytes(checkpoint.model)
        made = weight_bytes(write_quantized(Path(args.checkpoint), Path(args.to), args.dtype[0]))
        print(f"{args.to}: {args.dtype[0]}, {made / 1e6:,.1f} MB of weights, where float32 has {before / 1e6:,.1f}")
    if args.report:
        try:
            texts = [Path(args.text).read_text(encoding="utf-8")[: args.characters]] if args.text else None
        except UnicodeDecodeError as error:
            raise UserError(f"{args.text} is not UTF-8 at byte {error.start}") from None
        texts = texts or list(validation_texts(checkpoint.config, args.characters))
        if not any(text.strip() for text in texts):
            raise UserError("there is no text to take the perplexity of; give --text FILE")
        report(args.checkpoint, args.dtype, texts, args.cases)
    return 0


if __name__ == "__main__":
    run_main(main)
