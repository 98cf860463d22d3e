"""FSDP: a model that is drawn after it is divided has the parameters of one drawn at once."""

import errno
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model import ModelConfig, Transformer
from pocketlm.checkpoint.sharded import failures_as_sentences
from pocketlm.distributed.sharding import UndrawnTransformer, divide, whole_model
from pocketlm.errors import UserError
from tests.support.models import MIXED

SIZES = {"vocab_size": 40, "d_model": 8, "n_heads": 2, "n_layers": 3, "max_seq_len": 8}
KINDS = {
    "llama": {},
    "gpt2": {"mlp": "gelu", "position": "learned", "norm": "layernorm", "bias": True},
    "all": MIXED | {"qk_norm": True, "embed_norm": True, "tie_embeddings": False},
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """The mesh of a single process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_drawn_after_it_is_divided_is_the_one_drawn_at_once(kind, mesh):
    config = ModelConfig(**SIZES, **KINDS[kind])
    torch.manual_seed(5)
    expected = Transformer(config)
    torch.manual_seed(5)
    model = UndrawnTransformer(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.manual_seed(6)  # Lightning seeds again before it divides
    between = torch.get_rng_state()
    divide(model, mesh, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), between)
    whole = whole_model(model)
    assert whole is not None
    for (name, ours), theirs in zip(whole.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for name, table in expected.named_buffers():
        assert torch.equal(model.get_buffer(name), table)


def test_a_full_disk_of_one_process_is_a_sentence():
    """torch raises the failures of all processes in each, as a BaseException."""
    cause = OSError(errno.ENOSPC, "No space left on device")
    message = r"^cannot write a: No space left on device \(in process 3\)$"
    with pytest.raises(UserError, match=message), failures_as_sentences("cannot write a"):
        raise CheckpointException("write", {3: (cause, None)})
