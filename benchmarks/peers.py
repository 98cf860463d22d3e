"""Other programs that train the shapes of a config: how each is started, and its time per step.

Peers run from their own checkouts, unchanged except for llm.c, whose batch size is in its source:
two numbers are replaced there before it is compiled. Models of transformers and litgpt are trained
by the plainest loop: autocast, fused AdamW, a clip.
"""

import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.measure import Finished, commit_of, run_watched
from model import ModelConfig
from pocketlm.config.sections import Config
from pocketlm.data.prepare import PreparedData
from pocketlm.errors import UserError
from pocketlm.instruction_sets import limited_set
from pocketlm.shards.bin_files import write_bin

MILLISECONDS = r"(?:time |took )([\d.]+) ?ms"


@dataclass(frozen=True)
class Shape:
    """The task of all contenders: the config's sizes, on the config's tokens, on one device."""

    config: Config
    data: PreparedData
    accelerator: str
    precision: str
    steps: int

    @property
    def dtype(self) -> str:
        """Name of the dtype of matmuls."""
        return {"32-true": "float32", "16-mixed": "float16"}.get(self.precision, "bfloat16")


def step_times(finished: Finished) -> list[float]:
    """Return the seconds of each step, read from a program's own lines."""
    return [float(milliseconds) / 1e3 for milliseconds in re.findall(MILLISECONDS, finished.stdout)]


def check_peers(peers: dict[str, str], model: ModelConfig) -> None:
    """Raise UserError for a peer that is not known, has no checkout, or cannot train the model."""
    for name, path in peers.items():
        if name not in PEERS:
            known = [f"{peer}=PATH" for peer in CHECKOUTS]
            raise UserError(f"--peer {name}: the peers are {', '.join(known)}, transformers")
        file = CHECKOUTS.get(name)
        if file and not (Path(path) / file).is_file():
            raise UserError(
                f"--peer {name}={path}: there is no {file} in it; give a checkout of {name}"
            )
    if "llmc" in peers and not is_gpt2(model):
        raise UserError(
            "--peer llmc trains GPT-2 only; give it a config of that kind, "
            "such as presets/gpt2_124m.yaml"
        )
    if "llmc" in peers and c_compiler() is None:
        raise UserError("--peer llmc needs clang or gcc on the PATH")


def c_compiler() -> str | None:
    """Return the compiler for llm.c."""
    return next((name for name in ("clang", "gcc") if shutil.which(name)), None)


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple


def nanogpt(path: str, shape: Shape, folder: Path) -> tuple[str, Finished]:
    """Run its train.py: float32 on a CPU, where it supports nothing else, or compiled bfloat16."""
    checkout, model, training = Path(path), shape.config.model, shape.config.training
    tokens = folder / "data" / "bench"
    tokens.mkdir(parents=True)
    for name in ("train", "val"):
        write_bin(tokens / f"{name}.bin", getattr(shape.data, name).shards[0], "nanogpt")
    size = model.vocab_size
    with (tokens / "meta.pkl").open("wb") as file:
        pickle.dump({"vocab_size": round_up(size, 64) if size > 1000 else size}, file)
    shutil.copy(checkout / "configurator.py", folder)  # nanoGPT looks for it in the current folder
    on_gpu = shape.accelerator == "cuda"
    flags = {
        "dataset": "bench",
        "device": shape.accelerator,
        "dtype": "bfloat16" if on_gpu else "float32",
        "compile": on_gpu,
        "block_size": training.seq_len,
        "batch_size": training.micro_batch,
        "gradient_accumulation_steps": training.grad_accum_steps,
        "n_layer": model.n_layers,
        "n_head": model.n_heads,
        "n_embd": model.d_model,
        "dropout": float(model.dropout),
        "eval_iters": 1,
        "eval_interval": 1_000_000,
        "log_interval": 1,
        "max_iters": shape.steps,
        "lr_decay_iters": shape.steps,
        "out_dir": "out",
    }
    command = [sys.executable, str(checkout / "train.py")]
    command += [f"--{key}={value}" for key, value in flags.items()]
    return f"nanoGPT {commit_of(checkout)}, {flags['dtype']}", run_watched(command, folder)


def is_gpt2(model: ModelConfig) -> bool:
    """Return whether llm.c can train this model."""
    kind = (model.mlp, model.position, model.norm)
    return kind == ("gelu", "learned", "layernorm") and model.bias and model.tie_embeddings


def llmc(path: str, shape: Shape, folder: Path) -> tuple[str, Finished]:
    """Compile train_gpt2.c as its Makefile does, with our batch, and run it on random weights."""
    checkout, compiler, training = Path(path), c_compiler(), shape.config.training
    assert compiler, "check_peers has found one"
    source = (checkout / "train_gpt2.c").read_text()
    source = source.replace("int B = 4;", f"int B = {training.micro_batch};")
    source = source.replace("int T = 64;", f"int T = {training.seq_len};")
    (folder / "train_gpt2.c").write_text(source)
    limited = limited_set()
    target = limited.flags if limited else ["-march=native"]
    flags = ["-Ofast", *target, "-fopenmp", "-DOMP", f"-I{checkout}", "-Wno-unused-result"]
    command = [compiler, *flags, "train_gpt2.c", "-lm", "-o", "train_gpt2"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    write_llmc_weights(folder / "gpt2_124M.bin", shape.config.model)
    for name in ("train", "val"):
        file = folder / "dev" / "data" / "tinyshakespeare" / f"tiny_shakespeare_{name}.bin"
        write_bin(file, getattr(shape.data, name).shards[0], "llmc")
    command = ["stdbuf", "-oL", "./train_gpt2"]
    finished = run_watched(command, folder, enough=(MILLISECONDS, shape.steps))
    return f"llm.c {commit_of(checkout)}, {compiler}, float32", finished


def write_llmc_weights(path: Path, model: ModelConfig) -> None:
    """Write random weights in llm.c's file format, version 3."""
    V, C, L, T = model.vocab_size, model.d_model, model.n_layers, model.max_seq_len
    padded = round_up(V, 128)
    count = padded * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    header = np.zeros(256, np.int32)
    header[:8] = 20240326, 3, T, V, L, model.n_heads, C, padded
    weights = np.random.default_rng(0).standard_normal(count, np.float32) * 0.02
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(weights.tobytes())


LOOP = """
import sys, time
import torch
{model}
if {device!r} == "cuda":
    torch.set_float32_matmul_precision("high")
model = model.to({device!r}).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
batch = torch.randint({vocabulary}, ({steps}, {rows}, {length} + 1))
for x in batch.to({device!r}):
    begin = time.perf_counter()
    with torch.autocast({device!r}, torch.bfloat16, enabled={dtype!r} == "bfloat16"):
        loss = loss_of(x)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    print(f"took {{(time.perf_counter() - begin) * 1e3:.3f}} ms", flush=True)
"""

TRANSFORMERS = """
from transformers import {kind}Config, {kind}LMHeadModel as Model
torch.manual_seed(0)
model = Model({kind}Config({sizes}, use_cache=False))
loss_of = lambda x: model(input_ids=x[:, :-1], labels=x[:, :-1]).loss
""".replace("{kind}LMHeadModel", "{model_class}")

LITGPT = """
sys.path.insert(0, {path!r})
from litgpt.model import GPT, Config
from litgpt.utils import chunked_cross_entropy
torch.manual_seed(0)
model = GPT(Config({sizes}))
loss_of = lambda x: chunked_cross_entropy(model(x[:, :-1]), x[:, 1:], chunk_size=0)
"""


def run_loop(model: str, shape: Shape, folder: Path) -> Finished:
    """Train a model, given as source text, by the plainest loop."""
    training = shape.config.training
    code = LOOP.format(
        model=model,
        device=shape.accelerator,
        dtype=shape.dtype,
        vocabulary=shape.config.model.vocab_size,
        steps=shape.steps,
        rows=training.micro_batch,
        length=training.seq_len,
    )
    return run_watched([sys.executable, "-c", code], folder)


def keywords(**values: object) -> str:
    """Return keyword arguments as source text."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def transformers(_: str, shape: Shape, folder: Path) -> tuple[str, Finished]:
    """Train its GPT-2 for a config with gelu, else its Llama, in the precision of our run."""
    m = shape.config.model
    if m.mlp == "gelu":
        kind, model_class = "GPT2", "GPT2LMHeadModel"
        sizes = keywords(
            vocab_size=m.vocab_size,
            n_positions=m.max_seq_len,
            n_embd=m.d_model,
            n_layer=m.n_layers,
            n_head=m.n_heads,
            resid_pdrop=m.dropout,
            embd_pdrop=m.dropout,
            attn_pdrop=m.dropout,
        )
    else:
        kind, model_class = "Llama", "LlamaForCausalLM"
        sizes = keywords(
            vocab_size=m.vocab_size,
            hidden_size=m.d_model,
            intermediate_size=m.d_ff,
            num_hidden_layers=m.n_layers,
            num_attention_heads=m.n_heads,
            num_key_value_heads=m.n_kv_heads,
            max_position_embeddings=m.max_seq_len,
            tie_word_embeddings=m.tie_embeddings,
        )
    source = TRANSFORMERS.format(kind=kind, model_class=model_class, sizes=sizes)
    finished = run_loop(source, shape, folder)
    return f"transformers {version('transformers')}, {kind}, {shape.dtype}", finished


def litgpt(path: str, shape: Shape, folder: Path) -> tuple[str, Finished]:
    """Train its GPT with a Llama's parts; its own requirements have to be installed."""
    checkout, m = Path(path), shape.config.model
    sizes = keywords(
        block_size=m.max_seq_len,
        padded_vocab_size=round_up(m.vocab_size, 64),
        n_layer=m.n_layers,
        n_embd=m.d_model,
        n_head=m.n_heads,
        n_query_groups=m.n_kv_heads,
        intermediate_size=m.d_ff,
        rotary_percentage=1.0,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
    )
    finished = run_loop(LITGPT.format(path=str(checkout), sizes=sizes), shape, folder)
    return f"litgpt {commit_of(checkout)}, {shape.dtype}", finished


CHECKOUTS = {  # a file that a checkout has
    "nanogpt": "train.py",
    "llmc": "train_gpt2.c",
    "litgpt": "litgpt/model.py",
}
PEERS = {"nanogpt": nanogpt, "llmc": llmc, "transformers": transformers, "litgpt": litgpt}
