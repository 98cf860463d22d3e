"""The embedding's gradient as rows: the same training as with a dense gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Embedding
from tests.support.losses import (
    assert_equal,
    assert_same_losses,
    compute,
    loss_function,
    make_batches,
    ten_clipped_losses,
)
from tests.support.models import random_ids, random_model


@pytest.fixture
def use_dense_gradients(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes the embedding's gradient a matrix from then on."""

    def dense_forward(table: Embedding, ids: Tensor) -> Tensor:
        return F.embedding(ids, table.weight)

    return lambda: monkeypatch.setattr(Embedding, "forward", dense_forward)


# 0: not in chunks. 7 leaves a rest of the 26 tokens; 1,000 is more than there are.
@pytest.mark.parametrize("chunk", [0, 7, 1000])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.usefixtures("float64")
def test_rows_added_to_a_tied_heads_gradient_are_the_dense_gradient(
    use_dense_gradients: Callable, chunk: int, packed: bool, micro_batches: int
) -> None:
    """With tokens that occur often, over one batch and accumulated over two."""
    model, batches = random_model(), make_batches(micro_batches, packed)
    ours = compute(model, loss_function(model, chunk), batches)
    use_dense_gradients()
    assert_equal(ours, compute(model, loss_function(model, chunk), batches))


@pytest.mark.usefixtures("float64")
def test_ten_steps_with_rows_are_those_with_dense_gradients(use_dense_gradients: Callable) -> None:
    model = random_model()
    ours = ten_clipped_losses(model, loss_function(model, 7), make_batches(2))
    use_dense_gradients()
    model = random_model()
    theirs = ten_clipped_losses(model, loss_function(model, 7), make_batches(2))
    # 1e-9: the roundings of ten steps, which Adam magnifies where it divides by small gradients
    assert_same_losses(ours, theirs, 1e-9)


@pytest.fixture
def sparse_arguments(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that records the argument `sparse` of each embedding."""
    arguments, embedding = [], F.embedding

    def recorded_embedding(*args: Any, sparse: bool = False, **kwargs: Any) -> Tensor:
        arguments.append(sparse)
        return embedding(*args, sparse=sparse, **kwargs)

    monkeypatch.setattr(F, "embedding", recorded_embedding)
    return arguments


def test_rows_are_for_a_tied_embedding_on_a_cpu_alone(sparse_arguments: list[bool]) -> None:
    """An untied one would be left with a sparse gradient, which neither the clip nor Muon takes.

    A GPU has no use for it.
    """
    for tie_embeddings in (True, False):
        for device in ("cpu", "meta"):
            random_model(tie_embeddings=tie_embeddings).to(device)(random_ids().to(device))
    assert sparse_arguments == [True, False, False, False]


def test_a_compiled_model_makes_no_rows() -> None:
    """Inductor has no sparse tensors; this reads the graph that it would get."""
    torch._dynamo.reset()
    embeddings: list[torch.fx.Node] = []

    def read_graph(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        embeddings.extend(node for node in graph.graph.nodes if node.target is F.embedding)
        return graph.forward

    torch.compile(random_model().hidden, backend=read_graph, dynamic=False)(random_ids())
    assert len(embeddings) == 1
    arguments = [*embeddings[0].args, *embeddings[0].kwargs.values()]
    assert not any(argument is True for argument in arguments)
