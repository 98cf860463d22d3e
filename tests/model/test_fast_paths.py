"""What makes training fast changes nothing: each fast path against the plain one, and against transformers.

The fast paths are rows in place of a matrix for the gradient of a tied embedding, the loss in chunks with a filled-up head,
tiled attention, and the compiled loss. Compared are the loss, every parameter's gradient, and the losses of ten steps.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import model
import train
from model import Embedding, Transformer
from pocketlm.checkpoint.runs import Run
from pocketlm.config.loading import load_config
from pocketlm.data.prepare import prepare
from pocketlm.hardware.devices import Hardware
from pocketlm.model import attention
from pocketlm.model.attention import TiledAttention
from pocketlm.model.loss import IGNORE_INDEX
from pocketlm.optim import build_optimizer, clip_gradients
from pocketlm.training import loop
from tests.model.test_model import (  # noqa: F401  a fixture
    BFLOAT16,
    assert_parity,
    assert_same_ten_steps,
    assert_was_compiled,
    float64,
)
from tests.support.gpt2 import gpt2_pair, in_our_names
from tests.support.models import (
    FLOAT32,
    FLOAT64,
    T,
    random_model,
    random_ids,
    reference_of,
    relative_error,
)

ROUNDING = 1e-12  # in float64, of the largest value: 1e-16 a rounding, and sums of some 100 terms in two layers

Batch = dict[str, Tensor]
Nats = Callable[[Batch], Tensor]
Found = tuple[Tensor, dict[str, Tensor]]

documents = pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
chunks = pytest.mark.parametrize(
    "chunk", [0, 7, 1000]
)  # 0: not in chunks; 7 leaves a rest of 26, and 1,000 is more than there are
tying = pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])


def batches(count: int, packed: bool = False, vocab_size: int = 61, length: int = T) -> list[Batch]:
    """Batches of two rows, in which some entries occur often, many never, and some targets are missing."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        rows = torch.randint(vocab_size // 4, (2, length + 1), generator=generator)
        rows[:, ::5] = torch.randint(vocab_size, rows[:, ::5].shape, generator=generator)
        targets = rows[:, 1:].clone()
        targets[0, 2] = targets[1, -3:] = IGNORE_INDEX
        made.append({"input_ids": rows[:, :-1], "targets": targets})
        if packed:
            borders = torch.randint(1, length, (2, 3), generator=generator)
            made[-1]["doc_ids"] = (torch.arange(length)[None, :, None] >= borders[:, None]).sum(-1)
    return made


def nats_of(net: Transformer, chunk: int) -> Nats:
    """The loss as the training module computes it, eagerly."""
    module = SimpleNamespace(
        model=net, config=SimpleNamespace(training=SimpleNamespace(loss_chunk=chunk))
    )
    return lambda batch: train.LitTransformer.loss_sum(module, batch)


def value_and_gradients(
    net: Transformer, nats: Nats, seen: list[Batch], half: bool = False
) -> Found:
    """Nats of all batches, and the gradients that their backward passes leave behind one after the other."""
    net.zero_grad()
    total = torch.zeros(())
    for batch in seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = nats(batch)
        (value / 9).backward()  # what comes from above must be passed on
        total = total + value.detach()
    return total, {name: p.grad.clone() for name, p in net.named_parameters()}


def assert_equal(ours: Found, theirs: Found, tolerance: float = ROUNDING) -> None:
    assert abs(ours[0] - theirs[0]) <= tolerance * abs(theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        gradient = ours[1][name]
        assert (
            gradient.layout == torch.strided
            and gradient.dtype == expected.dtype
            and gradient.shape == expected.shape
        )
        assert (gradient - expected).abs().max() <= tolerance * expected.abs().max(), name


def ten_losses(net: Transformer, nats: Nats, seen: list[Batch], half: bool = False) -> Tensor:
    """Mean losses before each of ten clipped AdamW steps."""
    stepper = build_optimizer(
        net, optimizer="adamw", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    losses = []
    for step in range(10):
        batch = seen[step % len(seen)]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            mean = nats(batch) / (batch["targets"] != IGNORE_INDEX).sum()
        stepper.zero_grad()
        mean.backward()
        clip_gradients(net.parameters(), 1.0)
        stepper.step()
        losses.append(mean.detach())
    return torch.stack(losses)


def assert_same_way(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert (
        theirs[-2:].mean() < theirs[:2].mean() - 0.5
    )  # the steps are not so small that nothing could differ
    assert (ours - theirs).abs().max() <= tolerance


# ---- the gradient of a tied embedding, as rows -----------------------------------------------------------------------


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From here on the embedding's gradient is a matrix."""
    return lambda: monkeypatch.setattr(
        Embedding, "forward", lambda table, ids: F.embedding(ids, table.weight)
    )


@chunks
@documents
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.usefixtures("float64")
def test_rows_added_to_a_tied_heads_gradient_are_the_dense_gradient(
    dense: Callable, chunk: int, packed: bool, micro_batches: int
) -> None:
    """With entries that occur often, over one batch and accumulated over two."""
    net, seen = random_model(), batches(micro_batches, packed)
    ours = value_and_gradients(net, nats_of(net, chunk), seen)
    dense()
    assert_equal(ours, value_and_gradients(net, nats_of(net, chunk), seen))


@pytest.mark.usefixtures("float64")
def test_ten_steps_with_rows_are_those_with_dense_gradients(dense: Callable) -> None:
    ours = ten_losses(net := random_model(), nats_of(net, 7), batches(2))
    dense()
    # 1e-9: ten steps' roundings, which Adam's division by the size of small gradients magnifies
    assert_same_way(ours, ten_losses(net := random_model(), nats_of(net, 7), batches(2)), 1e-9)


@pytest.fixture
def as_rows(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each embedding so far was to have a gradient of rows."""
    log, right = [], F.embedding

    def spied(*args: Any, sparse: bool = False, **kwargs: Any) -> Tensor:
        log.append(sparse)
        return right(*args, sparse=sparse, **kwargs)

    monkeypatch.setattr(F, "embedding", spied)
    return log


def test_rows_are_for_a_tied_embedding_on_a_cpu_alone(as_rows: list[bool]) -> None:
    """An untied one would be left with a sparse gradient, which neither the clip nor Muon takes; a GPU has no use for it."""
    for tie_embeddings in (True, False):
        for device in ("cpu", "meta"):
            random_model(tie_embeddings=tie_embeddings).to(device)(random_ids().to(device))
    assert as_rows == [True, False, False, False]


def test_a_compiled_model_makes_no_rows() -> None:
    """Inductor knows no sparse tensors; the graph it would get is looked at here."""
    torch._dynamo.reset()
    found = []

    def look(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        found.extend(node for node in graph.graph.nodes if node.target is F.embedding)
        return graph.forward

    torch.compile(random_model().hidden, backend=look, dynamic=False)(random_ids())
    assert len(found) == 1
    assert not any(
        argument is True for node in found for argument in (*node.args, *node.kwargs.values())
    )


# ---- the loss in chunks, with a head that is filled up to a multiple of 64 -------------------------------------------


@documents
@tying
@pytest.mark.parametrize("chunk", [1, 7, 26, 1000])
@pytest.mark.parametrize("vocab_size", [61, 64, 65])
@pytest.mark.usefixtures("float64")
def test_the_loss_in_chunks_is_the_plain_one_for_the_whole_model(
    chunk: int, vocab_size: int, packed: bool, tie_embeddings: bool
) -> None:
    net, seen = (
        random_model(vocab_size=vocab_size, tie_embeddings=tie_embeddings),
        batches(2, packed, vocab_size),
    )
    ours, theirs = (value_and_gradients(net, nats_of(net, size), seen) for size in (chunk, 0))
    assert_equal(ours, theirs)


@tying
@pytest.mark.parametrize("vocab_size", [61, 64])
@pytest.mark.usefixtures("float64")
def test_ten_steps_with_the_loss_in_chunks_are_those_with_the_plain_one(
    vocab_size: int, tie_embeddings: bool
) -> None:
    ways = []
    for chunk in (7, 0):
        net = random_model(vocab_size=vocab_size, tie_embeddings=tie_embeddings)
        ways.append(ten_losses(net, nats_of(net, chunk), batches(2, vocab_size=vocab_size)))
    assert_same_way(*ways, 1e-9)


# ---- tiled attention, under bfloat16 autocast ------------------------------------------------------------------------

LONG = 40  # tokens, in tiles of 16


@documents
@chunks
def test_under_bfloat16_autocast_gradients_and_ten_steps_are_those_of_float32_within_its_rounding(
    monkeypatch: pytest.MonkeyPatch, packed: bool, chunk: int
) -> None:
    """Bounds as in test_model.py, where they are reasoned."""
    monkeypatch.setattr(attention, "TILE", 16)
    seen = batches(2, packed, length=LONG)
    net = random_model(max_seq_len=LONG)
    expected, gradients = value_and_gradients(net, nats_of(net, chunk), seen)
    found, ours = value_and_gradients(net, nats_of(net, chunk), seen, half=True)
    assert relative_error(found, expected) < BFLOAT16.loss
    errors = {name: relative_error(ours[name], gradient) for name, gradient in gradients.items()}
    assert 1e-4 < max(errors.values()) < BFLOAT16.gradients, errors  # and autocast did something
    ways = []
    for half in (True, False):
        net = random_model(max_seq_len=LONG)
        ways.append(ten_losses(net, nats_of(net, chunk), seen, half))
    assert_same_way(*ways, BFLOAT16.ten_losses)


@pytest.fixture
def forced_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in tiles of 4 rows, whatever the precision."""
    monkeypatch.setattr(attention, "TILE", 4)
    monkeypatch.setattr(
        model, "attend", lambda q, k, v, mask, _: TiledAttention.apply(q, k, v, mask)
    )


@documents
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.usefixtures("float64")
def test_a_model_of_tiled_attention_has_the_loss_and_gradients_of_torchs(
    request: pytest.FixtureRequest, packed: bool, n_kv_heads: int
) -> None:
    net, seen = random_model(n_kv_heads=n_kv_heads), batches(2, packed)
    theirs, way = (
        value_and_gradients(net, nats_of(net, 7), seen),
        ten_losses(net, nats_of(net, 7), seen),
    )
    request.getfixturevalue("forced_tiles")
    net = random_model(n_kv_heads=n_kv_heads)
    assert_equal(value_and_gradients(net, nats_of(net, 7), seen), theirs)
    assert_same_way(ten_losses(net, nats_of(net, 7), seen), way, 1e-9)


@pytest.mark.usefixtures("float64", "forced_tiles")
def test_recomputed_blocks_of_tiled_attention_have_the_same_gradients() -> None:
    nets = [random_model(gradient_checkpointing=recompute).train() for recompute in (False, True)]
    ours, theirs = (
        value_and_gradients(net, nats_of(net, 7), batches(2, packed=True)) for net in nets
    )
    assert_equal(ours, theirs, tolerance=0)


# ---- the compiled loss -----------------------------------------------------------------------------------------------


class Recorder:
    """In the trainer's place: keeps nothing and fits nothing."""

    def __init__(self, **_: Any):
        self.global_rank, self.world_size = 0, 1

    def fit(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture
def module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., train.LitTransformer]]:
    """The module of a run as train.py makes it, its weights far enough from zero to matter."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(50)))
    Path("config.yaml").write_text("model: {n_layers: 2, d_model: 32}\n")
    monkeypatch.setattr(train.L, "Trainer", Recorder)
    fixed = [
        "data.path=text.txt",
        "data.tokenizer=byte",
        f"training.seq_len={T}",
        "training.micro_batch_size=2",
    ]

    def make(compiled: bool, half: bool, *overrides: str) -> train.LitTransformer:
        config = load_config("config.yaml", [*fixed, *overrides])
        data = prepare(config.data)
        config = config.with_vocab_size(data.tokenizer.vocab_size)
        torch._dynamo.reset()
        counters.clear()
        hardware = Hardware("cpu", "bf16-mixed" if half else "32-true", compiled, {})
        L.seed_everything(config.training.seed, verbose=False)
        made = train.LitTransformer(config, data)
        loop.fit(made, config, data, hardware, Run(""), None)
        torch.manual_seed(0)
        for p in made.model.parameters():
            torch.nn.init.normal_(
                p, std=p.size(1) ** -0.5
            ) if p.dim() == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
        return made

    yield make
    torch._dynamo.reset()


# A graph of each precision: both ways of the loss, with and without documents, tied and untied. 20 of 26 tokens: two chunks
@pytest.mark.slow
@pytest.mark.parametrize(
    "half, chunk, packed, tie_embeddings",
    [(False, 0, True, True), (True, 20, False, False)],
    ids=["float32, documents", "bfloat16, chunks"],
)
def test_the_compiled_loss_has_the_gradients_and_ten_steps_of_the_eager_one(
    module: Callable, half: bool, chunk: int, packed: bool, tie_embeddings: bool
) -> None:
    """In float32 as near as two orders of the same sums; in bfloat16 fused operations leave roundings out, and differ by those."""
    options = [f"training.loss_chunk={chunk}", f"model.tie_embeddings={tie_embeddings}".lower()]
    seen, bounds = batches(2, packed, 257), BFLOAT16 if half else FLOAT32
    eager = module(False, half, *options)
    expected, gradients = value_and_gradients(eager.model, eager.train_loss_fn, seen, half)
    way = ten_losses(eager.model, eager.train_loss_fn, seen, half)
    compiled = module(True, half, *options)
    found, ours = value_and_gradients(compiled.model, compiled.train_loss_fn, seen, half)
    assert relative_error(found, expected) < bounds.loss
    errors = {name: relative_error(ours[name], gradient) for name, gradient in gradients.items()}
    assert max(errors.values()) < bounds.gradients, errors
    assert all(
        p.grad.layout == torch.strided and p.grad.dtype == torch.float32
        for p in compiled.model.parameters()
    )
    assert_same_way(
        ten_losses(compiled.model, compiled.train_loss_fn, seen, half), way, bounds.ten_losses
    )
    assert_was_compiled()  # once, for all of it


@pytest.mark.slow
def test_the_compiled_loss_draws_its_dropout_from_torchs_seed_and_its_gradients_are_those_of_the_masks_drawn(
    module: Callable,
) -> None:
    """Along a random direction the gradient is the slope of the loss, between two losses of the same masks."""
    torch.set_default_dtype(torch.float64)
    try:
        made, [batch] = module(True, False, "model.dropout=0.2"), batches(1, True, 257)
    finally:
        torch.set_default_dtype(torch.float32)
    net, nats = made.model.train(), made.train_loss_fn
    assert next(net.parameters()).dtype == torch.float64

    def drawn(seed: int) -> Found:
        torch.manual_seed(seed)
        return value_and_gradients(net, nats, [batch])

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert_equal(first, again, tolerance=0)
    assert abs(first[0] - other[0]) > 1e-3 * first[0]
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in net.named_parameters()
    }
    step, values = 1e-5, []
    for sign in (1, -2):  # to one side, and from there to the other
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.add_(direction[name], alpha=sign * step)
        values.append(drawn(1)[0])
    slope = 9 * sum((gradient * direction[name]).sum() for name, gradient in first[1].items())
    # the third derivative's part is step^2 of values around 1,000, and rounding leaves 1e-16 / step of them
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope.item(), rel=1e-5)
    assert_was_compiled()


def test_without_compile_the_module_trains_on_its_own_loss(module: Callable) -> None:
    """And validation does so always."""
    assert module(False, False).train_loss_fn.__func__ is train.LitTransformer.loss_sum
    made = module(True, False)
    assert made.loss_sum.__func__ is train.LitTransformer.loss_sum
    assert hasattr(made.train_loss_fn, "_torchdynamo_orig_callable")


# ---- transformers ----------------------------------------------------------------------------------------------------


def shifted(ids: Tensor) -> Batch:
    """The targets that transformers makes of labels=ids; the last token has none."""
    return {
        "input_ids": ids,
        "targets": torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE_INDEX)], dim=1),
    }


def their_mean(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def assert_loss_and_gradients(
    net: Transformer,
    nats: Nats,
    their_loss: Tensor,
    theirs: Callable[[], dict[str, Tensor]],
    bounds: Any,
) -> None:
    """A bias of the keys shifts all scores of a query alike, which softmax undoes: its gradient, 0 but for rounding, has the queries'
    as its unit."""
    ids = random_ids()
    mean = nats(shifted(ids)) / ids[:, 1:].numel()
    mean.backward()
    their_loss.backward()
    assert relative_error(mean, their_loss) < bounds.loss
    expected = theirs()
    assert {name for name, _ in net.named_parameters()} == expected.keys()
    for name, p in net.named_parameters():
        assert p.grad.layout == torch.strided
        unit = expected[name.replace("k_proj.bias", "q_proj.bias")].norm()
        assert (p.grad - expected[name]).norm() / unit < bounds.gradients, name


def against_llama(net: Transformer, nats: Nats, bounds: Any) -> None:
    reference = reference_of(net)
    named = lambda: {
        name.removeprefix("model."): p.grad for name, p in reference.named_parameters()
    }  # noqa: E731
    assert_loss_and_gradients(
        net, nats, their_mean(reference(random_ids()).logits, random_ids()), named, bounds
    )


def against_gpt2(net: Transformer, theirs: torch.nn.Module, nats: Nats, bounds: Any) -> None:
    named = lambda: in_our_names({name: p.grad for name, p in theirs.named_parameters()})  # noqa: E731
    assert_loss_and_gradients(
        net, nats, their_mean(theirs(random_ids()).logits, random_ids()), named, bounds
    )


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@tying
@pytest.mark.usefixtures("float64")
def test_in_float64_chunks_and_rows_give_the_loss_and_gradients_of_transformers_llama(
    chunk: int, n_kv_heads: int, tie_embeddings: bool
) -> None:
    net = random_model(n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings)
    against_llama(net, nats_of(net, chunk), FLOAT64)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.usefixtures("float64")
def test_in_float64_chunks_and_rows_give_the_loss_and_gradients_of_transformers_gpt2(
    chunk: int,
) -> None:
    ours, theirs = gpt2_pair(2, 4)
    against_gpt2(ours, theirs, nats_of(ours, chunk), FLOAT64)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.usefixtures("float64", "forced_tiles")
def test_in_float64_tiled_attention_gives_the_logits_gradients_and_ten_steps_of_transformers_llama(
    n_kv_heads: int,
) -> None:
    net = random_model(n_kv_heads=n_kv_heads)
    assert_parity(net, reference_of(net), FLOAT64)
    net = random_model(n_kv_heads=n_kv_heads)
    assert_same_ten_steps(net, reference_of(net), FLOAT64)


@pytest.mark.usefixtures("float64", "forced_tiles")
def test_in_float64_tiled_attention_gives_the_logits_and_gradients_of_transformers_gpt2() -> None:
    ours, theirs = gpt2_pair(2, 4)
    assert relative_error(ours(random_ids()), theirs(random_ids()).logits) < FLOAT64.logits
    against_gpt2(ours, theirs, nats_of(ours, 7), FLOAT64)


def compiled_nats(net: Transformer, chunk: int) -> Nats:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(nats_of(net, chunk), dynamic=False)


@pytest.mark.slow
@pytest.mark.parametrize("chunk, n_kv_heads", [(20, 2)])
def test_the_compiled_loss_in_float32_has_the_value_and_gradients_of_transformers_llama(
    chunk: int, n_kv_heads: int
) -> None:
    """test_model.py has the logits of the compiled model."""
    net = random_model(n_kv_heads=n_kv_heads)
    against_llama(net, compiled_nats(net, chunk), FLOAT32)
    assert_was_compiled()


@pytest.mark.slow
def test_the_compiled_gpt2_in_float32_has_the_logits_loss_and_gradients_of_transformers() -> None:
    ours, theirs = gpt2_pair(2, 4)
    against_gpt2(ours, theirs, compiled_nats(ours, 20), FLOAT32)
    assert_was_compiled()
    torch._dynamo.reset()
    with torch.no_grad():
        logits = torch.compile(ours, dynamic=False)(random_ids())
        assert relative_error(logits, theirs(random_ids()).logits) < FLOAT32.logits
