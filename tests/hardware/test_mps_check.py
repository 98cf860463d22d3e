"""Training and sampling on Apple's GPU, as far as a machine without one can tell.

`OnMps` has every tensor say that it lies on MPS, so that the code takes its branches for it, and `Guard` watches every
operation for what MPS lacks or gets wrong. `mps_check.check_device`, which asks the GPU itself, is shown faulty devices.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import model
import train
from model import MPS_INNER_LIMIT, ModelConfig, Transformer
from pocketlm import optim
from pocketlm.checkpoint.runs import Run
from pocketlm.config.loading import load_config
from pocketlm.config.sampling import SamplingParams
from pocketlm.config.sections import Config, TrainingConfig
from pocketlm.data.prepare import prepare
from pocketlm.errors import UserError
from pocketlm.evaluation.likelihood import Query, query_likelihoods
from pocketlm.hardware import mps_check
from pocketlm.hardware.devices import (
    available_accelerators,
    check_matmul_sizes,
    check_recomputation,
    choose_hardware,
)
from pocketlm.inference.engine import Engine, Token
from pocketlm.inference.generate import generate
from pocketlm.inference.placement import place
from pocketlm.model import loss
from pocketlm.optim import build_optimizer, clip_gradients
from pocketlm.training import loop

ROOT = Path(__file__).parents[2]
MPS_OPS = set(
    json.loads(Path(__file__).with_name("mps_ops.json").read_text())
)  # what the headers of torch 2.13's macOS wheel register
aten = torch.ops.aten


class OnMps(TorchFunctionMode):
    """Tensors say that they are on MPS; what is asked for there is made at `place`. Attention is given what it computes rightly there."""

    def __init__(self, place: str = "cpu"):
        super().__init__()
        self.place = place

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func == Tensor.device.__get__:
            return torch.device("mps")
        if func is F.scaled_dot_product_attention:
            check_attention(*args, **kwargs)
        args, kwargs = (
            map(self.moved, args),
            {name: self.moved(value) for name, value in (kwargs or {}).items()},
        )
        return func(*args, **kwargs)

    def moved(self, value: Any) -> Any:
        return (
            self.place if isinstance(value, (str, torch.device)) and str(value) == "mps" else value
        )


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    *,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    assert all(x.is_contiguous() for x in (q, k, v)), "strided input to attention"
    assert not enable_gqa and q.size(1) == k.size(1) == v.size(1), "grouped heads"
    half = q.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled("mps")
    assert not (is_causal and half), "is_causal in half precision"
    assert not is_causal or q.size(2) == k.size(2), "is_causal of unequal lengths"


class Guard(TorchDispatchMode):
    """Fails at an operation that MPS lacks or computes wrongly; keeps the inner dimensions of matmuls, and dtypes."""

    def __init__(self, place: str = "cpu"):
        super().__init__()
        self.place = place
        self.inner: set[int] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if composite(func, "Implicit"):  # in inference mode these arrive whole
            with self:
                if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        name = func.overloadpacket.__name__
        assert func.namespace != "aten" or registered(name) or composite(func, "Explicit"), (
            f"MPS has no {name}"
        )
        if func.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
            inner = args[-1].size(-2)
            assert inner < MPS_INNER_LIMIT, f"{name} with an inner dimension of {inner}"
            self.inner.add(inner)
        result = func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor):
                assert tensor.dtype != torch.float64 and not tensor.is_complex(), (
                    f"{name} of {tensor.dtype}"
                )
                self.dtypes.add(tensor.dtype)
                assert tensor.is_meta == (self.place == "meta"), f"{name} on the wrong device"
        return result


def registered(name: str) -> bool:
    """Whether MPS has the operation; one over a list of tensors is the same for each of them."""
    return not {
        name,
        name.removesuffix("_"),
        name.removeprefix("_foreach_").removesuffix("_"),
    }.isdisjoint(MPS_OPS)


def composite(func: Any, kind: str) -> bool:
    """Whether the operation is made of others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), f"Composite{kind}Autograd")


@contextmanager
def on_mps(place: str = "cpu") -> Iterator[Guard]:
    """Attention is what it decomposes to in training on MPS."""
    with OnMps(place), Guard(place) as guard, sdpa_kernel(SDPBackend.MATH):
        yield guard


# ---- a training step -------------------------------------------------------------------------------------------------

SIZES = dict(vocab_size=50_257, max_seq_len=32, n_layers=2, d_model=64)
LLAMA = ModelConfig(**SIZES)
GPT2 = ModelConfig(
    **SIZES,
    n_kv_heads=None,
    mlp="gelu",
    position="learned",
    norm="layernorm",
    bias=True,
    dropout=0.1,
)
MICROGPT = ModelConfig(
    **SIZES,
    n_kv_heads=None,
    mlp="relu",
    position="learned",
    norm_gain=False,
    embed_norm=True,
    final_norm=False,
    tie_embeddings=False,
)
kinds = pytest.mark.parametrize("kind", [LLAMA, GPT2, MICROGPT], ids=["llama", "gpt2", "microgpt"])
chunks = pytest.mark.parametrize("chunk", [24, 0])  # of 64 tokens
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
halves = pytest.mark.parametrize("half", [False, True], ids=["32-true", "bf16-mixed"])


def settings(kind: ModelConfig, chunk: int, **training: Any) -> Config:
    return Config(
        model=kind,
        training=TrainingConfig(seq_len=32, micro_batch_size=2, loss_chunk=chunk, **training),
    )


def batch(vocab_size: int) -> dict[str, Tensor]:
    """Two rows, each of two documents; a target is missing."""
    rows = torch.randint(vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(32) >= 20).long().expand(2, 32)
    return {
        "input_ids": rows[:, :-1],
        "targets": rows[:, 1:].index_fill(1, torch.tensor(7), loss.IGNORE_INDEX),
        "doc_ids": documents,
    }


def loss_sum(net: Transformer, config: Config, rows: dict[str, Tensor]) -> Tensor:
    """The loss as the training module computes it."""
    return train.LitTransformer.loss_sum(
        SimpleNamespace(model=net, hidden=net.hidden, config=config), rows
    )


def step(
    net: Transformer,
    config: Config,
    rows: dict[str, Tensor],
    half: bool = False,
    fused: bool = True,
) -> None:
    t = config.training
    stepper = build_optimizer(
        net,
        optimizer=t.optimizer,
        lr=t.lr,
        weight_decay=t.weight_decay,
        betas=t.betas,
        eps=t.eps,
        fused=fused,
    )
    with (
        torch.autocast("mps", torch.bfloat16, enabled=half),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        value = loss_sum(net, config, rows)
    (value / rows["targets"].numel()).backward()
    clip_gradients(
        net.parameters(),
        t.grad_clip,
        rows["targets"].numel() / (rows["targets"] != loss.IGNORE_INDEX).sum(),
    )
    stepper.step()


@kinds
@chunks
@halves
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_training_step_does_only_what_mps_does_rightly(
    kind: ModelConfig, chunk: int, half: bool, optimizer: str
) -> None:
    net, config = Transformer(kind), settings(kind, chunk, optimizer=optimizer)
    rows = batch(kind.vocab_size)
    with on_mps() as guard:
        step(net, config, rows, half)
        step(net, config, {name: ids for name, ids in rows.items() if name != "doc_ids"}, half)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert (torch.bfloat16 in guard.dtypes) == half and torch.float16 not in guard.dtypes
    assert MPS_INNER_LIMIT // 2 in guard.inner  # the head went in pieces: this was the path of MPS
    assert guard.inner <= mps_check.inner_dimensions(
        kind, config.training
    )  # and all of it is what the check at the start tries


@kinds
@chunks
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_step_makes_every_tensor_on_the_device_and_never_waits_for_one(
    kind: ModelConfig, chunk: int, optimizer: str
) -> None:
    """Meta tensors have no numbers: `.item()` fails on them, and so does arithmetic with a tensor of the CPU."""
    with torch.device("meta"):
        net, rows = (
            Transformer(kind),
            {name: ids.to("meta") for name, ids in batch(kind.vocab_size).items()},
        )
    config = settings(kind, chunk, optimizer=optimizer)
    with OnMps("meta"):
        step(net, config, rows, fused=False)  # no kernel of the fused optimizers is there
    with on_mps("meta"):
        loss_sum(net, config, rows).backward()
        clip_gradients(net.parameters(), 1.0)
        optim.orthogonalise(net.layers[0].mlp.up_proj.weight.detach()[None])


@chunks
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)]
)  # is_causal; a mask in its place
@pytest.mark.parametrize("documents", [False, True])
def test_on_mps_loss_and_gradients_are_those_of_any_device(
    monkeypatch, documents: bool, chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    kind = ModelConfig(vocab_size=101, max_seq_len=32, n_layers=2, d_model=16)
    net, config, rows = Transformer(kind).to(dtype), settings(kind, chunk), batch(101)
    if not documents:
        del rows["doc_ids"]
    plain = loss_sum(net, config, rows)
    expected = torch.autograd.grad(plain, list(net.parameters()))
    monkeypatch.setattr(model, "MPS_INNER_LIMIT", 21)
    monkeypatch.setattr(loss, "MPS_INNER_LIMIT", 21)
    with OnMps():
        ours = loss_sum(net, config, rows)
        gradients = torch.autograd.grad(ours, list(net.parameters()))
    assert ours.item() == pytest.approx(plain.item(), rel=tolerance)
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).abs().max() < tolerance * b.abs().max()


@pytest.mark.parametrize("chunk", [3, 7, 100])
def test_no_matmul_of_the_chunked_loss_sums_as_many_terms_as_the_limit(
    monkeypatch, chunk: int
) -> None:
    monkeypatch.setattr(loss, "MPS_INNER_LIMIT", 6)
    hidden, weight = (torch.randn(*shape, requires_grad=True) for shape in [(2, 50, 4), (11, 4)])
    with on_mps() as guard:
        loss.chunked_cross_entropy(hidden, weight, torch.randint(11, (2, 50)), chunk).backward()
    assert (
        3 <= max(guard.inner) < 6
    )  # the entries, and a chunk of 7 tokens or more, go in pieces of 3


# ---- generation and scoring ------------------------------------------------------------------------------------------


@kinds
@dtypes
def test_generation_and_scoring_do_only_what_mps_does_rightly(
    kind: ModelConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Transformer(kind).to(dtype).eval()
    params = SamplingParams(
        max_new_tokens=20,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        num_samples=2,
        seed=0,
    )
    draw = Engine._sample

    def drawn_on_the_cpu(engine: Engine, logits: Tensor) -> list[Token]:
        with _disable_current_modes():
            return draw(engine, logits)

    monkeypatch.setattr(Engine, "_sample", drawn_on_the_cpu)
    with on_mps():
        assert (
            len(list(generate(net, torch.arange(20)[None], params, eos_id=5))) > 12
        )  # beyond the context of 32
        answers = query_likelihoods(
            net,
            [Query((1, 2, 3), (4, 5, 6)), Query((1, 2, 3), (7,)), Query((8, 9), (4, 5))],
            top_k=5,
        )
    assert len(answers) == 3


# ---- the guard itself ------------------------------------------------------------------------------------------------


def float64_rope(patch: pytest.MonkeyPatch) -> None:
    tables = model.rope_tables
    patch.setattr(
        model, "rope_tables", lambda *sizes: tuple(table.double() for table in tables(*sizes))
    )


def complex_rope(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        model,
        "rotate",
        lambda x, cos, sin: torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        ).flatten(-2),
    )


def whole_vocabulary(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loss, "matmul", torch.matmul)


def whole_head(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transformer, "logits", lambda net, hidden: F.linear(hidden, net.head_weight))


def exact_orthogonalise(patch: pytest.MonkeyPatch) -> None:
    def by_svd(matrices: Tensor) -> Tensor:
        u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
        return u @ vt

    patch.setattr(optim, "orthogonalise", by_svd)


def strided_attention(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tensor, "contiguous", lambda x: x)


def causal_attention(patch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        q, k, v = q.contiguous(), k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(
            q, k, v, None, dropout, is_causal=True, enable_gqa=False
        )

    patch.setattr(model, "attend", attend)


@pytest.mark.parametrize(
    "plant, chunk, message",
    [
        (float64_rope, 24, "of torch.float64"),
        (complex_rope, 24, "of torch.complex64"),
        (whole_vocabulary, 24, "mm with an inner dimension of 50"),
        (whole_head, 0, "mm with an inner dimension of 50"),
        (exact_orthogonalise, 24, "MPS has no _linalg_svd"),
        (strided_attention, 24, "strided input to attention"),
        (causal_attention, 24, "is_causal in half precision"),
    ],
)
def test_the_guard_catches_what_is_planted(
    monkeypatch, plant: Callable, chunk: int, message: str
) -> None:
    plant(monkeypatch)
    net, config = Transformer(LLAMA), settings(LLAMA, chunk, optimizer="muon")
    with pytest.raises(AssertionError, match=message), on_mps():
        step(net, config, batch(50_257), half=plant is causal_attention)


def test_the_guard_catches_an_inner_dimension_of_40_000_in_every_kind_of_matmul() -> None:
    a, b = torch.zeros(1, 16, 40_000), torch.zeros(1, 40_000, 16)
    for product in (
        lambda: a[0] @ b[0],
        lambda: a @ b,
        lambda: torch.addmm(torch.zeros(16), a[0], b[0]),
        lambda: torch.baddbmm(torch.zeros(1, 16, 16), a, b),
        lambda: F.linear(a, b[0].T, torch.zeros(16)),
    ):
        with pytest.raises(AssertionError, match="inner dimension of 40000"), on_mps():
            product()


def test_the_guard_catches_a_look_at_the_device_and_a_tensor_made_elsewhere() -> None:
    with pytest.raises(RuntimeError, match="meta"), on_mps("meta"):
        torch.zeros(2, device="meta").sum().item()
    with pytest.raises(AssertionError, match="wrong device"), on_mps("meta"):
        torch.zeros(2)


# ---- what is chosen for MPS ------------------------------------------------------------------------------------------


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for package in ("fabric", "pytorch"):
        monkeypatch.setattr(
            f"lightning.{package}.accelerators.MPSAccelerator.is_available",
            staticmethod(lambda: True),
        )


TEXT = [
    "data.path=text.txt",
    "data.separator=line",
    "data.tokenizer=byte",
    "training.seq_len=16",
    "training.max_steps=2",
]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small text and a small model's config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(50)))
    (tmp_path / "config.yaml").write_text("model: {n_layers: 1, d_model: 16, n_heads: 2}\n")
    return tmp_path


class Recorder:
    """In the trainer's place: keeps what it was made with and what it was to fit."""

    def __init__(self, **arguments: Any):
        self.arguments, self.global_rank, self.world_size = arguments, 0, 1

    def fit(self, module: L.LightningModule, *loaders: Any, **_: Any) -> None:
        self.module, self.loaders = module, loaders


@pytest.mark.parametrize("precision, chosen", [("auto", "32-true"), ("bf16-mixed", "bf16-mixed")])
def test_a_run_on_mps_has_its_precision_no_pinned_memory_no_workers_and_the_fused_optimizer(
    mac: None, text: Path, monkeypatch, precision: str, chosen: str
) -> None:
    config = load_config("config.yaml", [*TEXT, f"training.precision={precision}"])
    data = prepare(config.data)
    config = config.with_vocab_size(data.tokenizer.vocab_size)
    hardware = choose_hardware(config.hardware, config.training.precision)
    assert hardware.accelerator == "mps" and not hardware.compile
    with monkeypatch.context() as patch:
        patch.setattr(train.L, "Trainer", Recorder)
        module = train.LitTransformer(config, data)
        trainer, _, _ = loop.fit(module, config, data, hardware, Run(""), None)
    assert trainer.arguments["accelerator"] == "mps" and trainer.arguments["precision"] == chosen
    assert module.configure_optimizers().defaults["fused"]
    for loader in trainer.loaders:
        assert not loader.pin_memory and loader.num_workers == 0
        assert {rows.dtype for rows in next(iter(loader)).values()} <= {
            torch.int64,
            torch.int32,
            torch.bool,
        }
    made = L.Trainer(
        accelerator="mps",
        devices=1,
        precision=chosen,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    assert getattr(made.precision_plugin, "device", "mps") == "mps"  # which autocast asks for


def test_neither_the_default_run_nor_a_preset_is_refused_on_mps() -> None:
    for path in [ROOT / "config.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]:
        training = load_config(path).training
        check_matmul_sizes("mps", training.micro_batch_size * training.seq_len)


def test_more_tokens_than_a_gradient_sums_rightly_are_refused_on_mps_only() -> None:
    check_matmul_sizes("mps", MPS_INNER_LIMIT - 1)
    check_matmul_sizes("cuda", MPS_INNER_LIMIT)
    with pytest.raises(UserError, match=r"is 32,767; on MPS.* take a smaller micro_batch_size"):
        check_matmul_sizes("mps", MPS_INNER_LIMIT)


def test_dropout_in_recomputed_blocks_is_refused_on_mps_only() -> None:
    """torch keeps the random state for the second pass on CUDA and the CPU; on MPS gradients were those of other masks."""
    kind = ModelConfig(**SIZES, dropout=0.1, gradient_checkpointing=True)
    check_recomputation("cpu", kind)
    check_recomputation("mps", dataclasses.replace(kind, dropout=0.0))
    check_recomputation("mps", dataclasses.replace(kind, gradient_checkpointing=False))
    with pytest.raises(
        UserError,
        match="model.gradient_checkpointing with model.dropout 0.1 has wrong gradients on MPS",
    ):
        check_recomputation("mps", kind)


# ---- the check at the start ------------------------------------------------------------------------------------------

DEVICE = torch.device("cpu:0")  # the CPU under another name: the device that is checked


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Make DEVICE, and not the CPU it is compared with, compute within a context of one's own."""
    values = mps_check.values

    def plant(fault: Callable) -> None:
        def of_device(device: torch.device, *arguments: Any) -> dict[str, Tensor]:
            with fault() if device == DEVICE else nullcontext():
                return values(device, *arguments)

        monkeypatch.setattr(mps_check, "values", of_device)

    return plant


class Wrong(TorchDispatchMode):
    """Puts `instead` in the place of some operations: instead(operation, its arguments...)."""

    def __init__(self, instead: Callable, *operations: Any):
        super().__init__()
        self.instead, self.operations = instead, operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return (
            self.instead(func, *args, **(kwargs or {}))
            if func.overloadpacket in self.operations
            else func(*args, **(kwargs or {}))
        )


@contextmanager
def attention(instead: Callable) -> Iterator[None]:
    """instead(attention, q, k, v, ...) in attention's place."""
    right = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda *args, **kwargs: instead(right, *args, **kwargs)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = right


def sums_on(operation: Callable, *args: Any) -> Tensor:
    """As M1 and M2 do: from 32,767 terms on, a sum goes on with what lies behind."""
    *rest, a, b = args
    if a.size(-1) < MPS_INNER_LIMIT:
        return operation(*args)
    behind = b.as_strided(
        (*b.shape[:-2], 1, b.size(-1)), b.stride(), b.storage_offset() + b.size(-2) * b.stride(-2)
    )
    return operation(*rest, torch.cat([a, a[..., :1]], dim=-1), torch.cat([b, behind], dim=-2))


def sees_all_in_half(
    right: Callable, q: Tensor, *args: Any, is_causal: bool, **kwargs: Any
) -> Tensor:
    return right(q, *args, is_causal=is_causal and q.dtype == torch.float32, **kwargs)


def sees_one_more(
    right: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    *,
    is_causal: bool,
    **kw: Any,
) -> Tensor:
    """The smallest leak: each token sees the one behind it."""
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(1) if is_causal else mask
    return right(q, k, v, mask, dropout, is_causal=False, **kw)


def permutes_the_batch(right: Callable, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return right(q, *args, **kwargs).flip(0)


HALF = "use training.precision=32-true, or --dtype float32,"
FLOAT = "use hardware.accelerator=cpu, or --device cpu,"
products_of = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)


@kinds
@dtypes
@pytest.mark.parametrize("device", available_accelerators())
def test_the_devices_of_this_machine_pass_and_the_random_state_stays(
    device: str, kind: ModelConfig, dtype: torch.dtype
) -> None:
    before = torch.get_rng_state()
    mps_check.check_device(device, dtype, kind, TrainingConfig())
    mps_check.check_device(device, dtype, kind)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "fault, dtype, message",
    [
        (
            lambda: Wrong(sums_on, *products_of),
            torch.float32,
            rf"in float32: a matmul with 40,000 terms .*; {FLOAT}",
        ),
        (
            lambda: attention(sees_all_in_half),
            torch.bfloat16,
            rf"in bfloat16: attention without gradients sees the future.*; {HALF}",
        ),
        (
            lambda: attention(sees_one_more),
            torch.float32,
            rf"in float32: attention with gradients sees the future.*; {FLOAT}",
        ),
        (
            lambda: attention(permutes_the_batch),
            torch.float32,
            rf"in float32: logits with gradients, off by .*; {FLOAT}",
        ),
        (
            lambda: Wrong(lambda f, *a: 1.1 * f(*a), aten.silu_backward),
            torch.float32,
            r"float32: the gradient of .*, off by 0\.\d+ of",
        ),
        (
            lambda: Wrong(lambda *a, **k: None, aten._fused_adamw_),
            torch.float32,
            r"float32: .* after two steps of AdamW, off by",
        ),
        (
            lambda: Wrong(lambda f, *a: f(*a) * torch.nan, aten.silu),
            torch.float32,
            "in float32: attention with gradients .* by nan of",
        ),
    ],
    ids=[
        "sums go on",
        "leak in half",
        "smallest leak",
        "batch permuted",
        "gradient",
        "optimizer",
        "nan",
    ],
)
def test_the_check_names_what_is_wrong_and_how_to_mend_it(
    faulty: Callable, fault: Callable, dtype: torch.dtype, message: str
) -> None:
    faulty(fault)
    with pytest.raises(UserError, match=message):
        mps_check.check_device(DEVICE, dtype, ModelConfig(**SIZES, d_ff=40_000), TrainingConfig())


def test_a_leak_in_half_precision_does_not_stop_a_run_in_float32(faulty: Callable) -> None:
    faulty(lambda: attention(sees_all_in_half))
    mps_check.check_device(DEVICE, torch.float32, LLAMA, TrainingConfig())


def test_training_and_generation_on_mps_begin_with_the_check(
    mac: None, text: Path, monkeypatch
) -> None:
    asked = []

    def check(*arguments: Any) -> None:
        asked.append(arguments)
        raise UserError("wrong")

    monkeypatch.setattr(mps_check, "check_device", check)
    with pytest.raises(UserError, match="wrong"):
        train.main(["--config", "config.yaml", *TEXT, "training.precision=bf16-mixed"])
    checkpoint = SimpleNamespace(
        config=settings(LLAMA, 24), model=None, quantized=None
    )  # not moved yet
    with pytest.raises(UserError, match="wrong"):
        place(checkpoint, "mps", "float16")
    (device, dtype, kind, training), generation = asked
    assert (device.type, dtype, kind.vocab_size, training.seq_len) == (
        "mps",
        torch.bfloat16,
        257,
        16,
    )
    assert generation == (torch.device("mps"), torch.float16, LLAMA, None)


@pytest.mark.parametrize("wrong", products_of[:2])
def test_matmuls_of_each_kind_are_checked(faulty: Callable, wrong: Any) -> None:
    faulty(lambda: Wrong(sums_on, wrong))
    with pytest.raises(UserError, match="40,000 terms"):
        mps_check.check_device(DEVICE, torch.float32, ModelConfig(**SIZES, d_ff=40_000))
