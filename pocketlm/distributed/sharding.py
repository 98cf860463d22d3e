"""FSDP: each process has a part of every parameter, gradient and optimizer state.

torch's FSDP2 divides each parameter by its rows. The processes put a block's parameters together
while it computes, forward and backward, and then drop them again. The sums are those of DDP.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.overrides import TorchFunctionMode

from model import ModelConfig, Transformer
from pocketlm.checkpoint.format import read_checkpoint, save_checkpoint
from pocketlm.checkpoint.sharded import (
    SHARDS,
    checksums_of,
    describe_shards,
    failures_as_sentences,
    join_tensors,
    read_shards,
    split_tensors,
    stored_tensors,
)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with checkpoints that any number of processes resumes."""

    def setup_environment(self) -> None:
        # the parent's asks for the module, which `connected` does not have yet
        self._setup_distributed()
        self._device_mesh = init_device_mesh(self.root_device.type, (dist.get_world_size(),))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a sharded checkpoint; see pocketlm/checkpoint/sharded.py."""
        path = Path(filepath)
        folder = Path(self.broadcast(unused_folder(path)))
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        tensors = split_tensors(checkpoint)
        with failures_as_sentences(
            f"cannot write {folder}, and the checkpoints before are whole; mend this, and the same "
            "command resumes from the last"
        ):
            save(tensors, checkpoint_id=unfinished)
        checksums: list[dict[str, int]] = [{}] * dist.get_world_size()
        dist.all_gather_object(checksums, self.sealed(unfinished))
        if self.is_global_zero:
            unfinished.rename(folder)
            shards = describe_shards(folder, {k: v for each in checksums for k, v in each.items()})
            save_checkpoint(checkpoint | {SHARDS: shards}, path)

    def sealed(self, folder: Path) -> dict[str, int]:
        """Force what this process has written to the disk; return the checksums of these files."""
        files = [*folder.glob(f"__{self.global_rank}_*")]
        files += [folder / ".metadata"] * self.is_global_zero
        for file in files:
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        return checksums_of(files)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Restore the model and the optimizer from any checkpoint; return the rest of it."""
        path = Path(checkpoint_path)
        state = read_checkpoint(path, whole=False)
        module, [optimizer] = self.lightning_module, self.optimizers
        assert module is not None
        weights = {f"state_dict.{name}": each for name, each in module.state_dict().items()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if SHARDS in state:
            tensors = dict(weights)
            for name, stored in stored_tensors(state, path).items():
                if name not in weights:
                    tensors[name] = like(stored, parameters[int(name.split(".")[1])])
            with failures_as_sentences(f"the shards of {path} cannot be read"):
                read_shards(state, path, tensors, together=True)
        else:
            tensors = split_tensors(state)
            for name, tensor in tensors.items():
                if name in weights:
                    weights[name].copy_(divided_like(tensor, weights[name]))
                else:
                    tensors[name] = divided_like(tensor, parameters[int(name.split(".")[1])])
        state = join_tensors(state, tensors)
        optimizer.load_state_dict(state["optimizer_states"][0])
        return state


def unused_folder(path: Path) -> str:
    """Return a name for the shards of the checkpoint `path`: a step may be saved twice."""
    names = [path.with_suffix(".shards")]
    while names[-1].exists():
        names.append(path.with_name(f"{path.stem}-{len(names) + 1}.shards"))
    shutil.rmtree(names[-1].with_name(f".{names[-1].name}.unfinished"), ignore_errors=True)
    return str(names[-1])


def like(stored: Tensor, parameter: Tensor) -> Tensor:
    """Return an empty tensor for a stored one, divided as the parameter if it has its shape."""
    if stored.dim() and stored.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=stored.dtype)
    return torch.empty_like(stored, device="cpu")


def divided_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor, which all processes have, divided as the parameter, if it has its shape."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    on_device = tensor.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(on_device, mesh, placements, src_data_rank=None)  # sends nothing


class DropValues(TorchFunctionMode):
    """Draw the values that torch's modules give to parameters on the meta device, and drop them.

    `Transformer.draw` then has the random numbers that it has in a model with storage.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            shape = kwargs["tensor"].shape
            function(**kwargs | {"tensor": torch.empty(shape, device="cpu")})
            return kwargs["tensor"]
        return function(*args, **kwargs)


class UndrawnTransformer(Transformer):
    """A model on the meta device, whose parameters `divide` draws."""

    def __init__(self, config: ModelConfig):
        with torch.device("meta"), DropValues():
            super().__init__(config)
        self.random_state = torch.get_rng_state()  # with which a model with storage draws them


@torch.no_grad()
def divide(model: Transformer, mesh: DeviceMesh, device: torch.device) -> None:
    """Divide the parameters among the processes: block by block, and the rest as one.

    An `UndrawnTransformer` is drawn: each process draws the same whole parameters as one that
    trains by itself, one after the other, and keeps its part.
    """
    if isinstance(model, FSDPModule):
        return
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # what is not in a block stays whole until the backward pass, for the loss after `hidden`
    register_fsdp_forward_method(model, "hidden")
    register_fsdp_forward_method(model.layers[0], "values")  # of `value_residual`
    if isinstance(model, UndrawnTransformer):
        model.to_empty(device=device)
        model.reset_tables()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(model.random_state)
            for name, parameter in model.named_parameters():
                whole = torch.empty(parameter.shape)
                model.draw(name, whole)
                parameter.copy_(divided_like(whole, parameter))


def drop_whole_parameters(model: nn.Module) -> None:
    """Drop what a forward pass without a backward pass has put together."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole_model(model: Transformer) -> Transformer | None:
    """Return a copy of a divided model in the first process, and None in the others.

    All processes have to call it.
    """
    drop_whole_parameters(model)
    weights = {}
    for name, parameter in model.state_dict().items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if dist.get_rank() == 0:
            weights[name] = whole.cpu()
    if dist.get_rank():
        return None
    with torch.device("meta"):
        copy = Transformer(model.config)
    copy.load_state_dict(weights, assign=True)
    copy.reset_tables()
    return copy
