"""Export: prepared data as the token files of other programs."""

from pathlib import Path

from pocketlm.config.sections import DataConfig
from pocketlm.data.bin_files import write_bin
from pocketlm.data.prepare import PreparedData, prepare
from pocketlm.errors import UserError


def prepare_and_export(data: DataConfig, program: str | None, folder: Path) -> PreparedData:
    """Prepare the data, and write train.bin and val.bin for a program, nanogpt or llmc, if any.

    Raises UserError, before anything is prepared, for data that has no single file of tokens.
    """
    if program and data.mixture:
        raise UserError(
            "a mixture is drawn row by row while training; export its sources one at a time"
        )
    if program and data.streaming:
        raise UserError("a stream keeps no tokens to export; set data.streaming to false")
    prepared = prepare(data)
    if program:
        write_bin(folder / "train.bin", prepared.train.shards[0], program)
        write_bin(folder / "val.bin", prepared.val.shards[0], program)
    return prepared
