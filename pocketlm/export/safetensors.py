"""A checkpoint as a safetensors file: weights, config and tokenizer, without pickle.

Every command reads it like the checkpoint. It has a third of the bytes of a training checkpoint,
which also has the state of the optimizer.
"""

from pathlib import Path

from pocketlm.checkpoint.format import WEIGHT_PREFIX, read_checkpoint, safetensors_metadata
from pocketlm.checkpoint.loading import Checkpoint, load_checkpoint
from pocketlm.conversion.layout import Layout
from pocketlm.export.proof import Reference, compare, our_step, require_parity
from pocketlm.export.tensors import foreign_tensors, write_safetensors
from pocketlm.files import atomic_write

NAMES_OF_CHECKPOINTS = Layout({"lm_head": f"{WEIGHT_PREFIX}lm_head"}, WEIGHT_PREFIX)


def write_file(checkpoint: Checkpoint, reference: Reference, path: Path) -> list[str]:
    """Write a new file and read it back; return the lines of its proof. Raises UserError."""
    state = read_checkpoint(checkpoint.path, metadata_only=True)
    metadata = safetensors_metadata(state, checkpoint.model.state_dict())
    del state  # with the state of a run, which may have twice the bytes of the weights
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        tensors = foreign_tensors(checkpoint.model, NAMES_OF_CHECKPOINTS)
        write_safetensors(unfinished, tensors, metadata)
        checkpoint.free_weights()
        parity = compare(our_step(load_checkpoint(unfinished, mapped=True).model), reference)
        require_parity(parity, reference)
    return [f"read back: {parity}"]
