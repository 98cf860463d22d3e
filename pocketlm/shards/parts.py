"""Parts: a corpus that several processes prepare side by side, each its part.

    shards/parts-<key>-of-8/3/   part 3, a folder of shards like any other
    shards/parts-<key>-of-8/settings.json

`<key>` is that of the whole corpus. When all parts are there, they are joined: the folder gets the
manifests of joined.py and the name `shards/<key>`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pocketlm.corpus.chunks import Split
from pocketlm.corpus.pieces import Part
from pocketlm.errors import UserError
from pocketlm.files import atomic_write
from pocketlm.shards.format import ShardHeader, TokenShard
from pocketlm.shards.joined import join_shards

SETTINGS = "settings.json"
IN_WORDS = {
    "version": "version {} of the preparation",
    "digest": "another content of the files",
    "fingerprint": "another tokenizer of the same name",
}


@dataclass(frozen=True)
class PartSet:
    """The parts of one preparation: a folder with a folder for each part that is complete."""

    folder: Path
    count: int

    def folder_of(self, part: Part) -> Path:
        """Return the folder of a part."""
        return self.folder / str(part.index + 1)

    def missing(self) -> list[Part]:
        """Return the parts that are not complete."""
        parts = [Part(index, self.count) for index in range(self.count)]
        return [part for part in parts if not self.folder_of(part).is_dir()]

    def settings(self) -> dict[str, Any]:
        """Return the settings of the preparation; empty if they cannot be read."""
        try:
            settings = json.loads((self.folder / SETTINGS).read_text())
        except (OSError, ValueError):
            return {}
        return settings if isinstance(settings, dict) else {}

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Create the folder, and write the settings into it."""
        if self.settings() != settings:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder / SETTINGS) as unfinished:
                unfinished.write_text(json.dumps(settings, indent=1))

    def open(self, split: Split, part: Part) -> TokenShard:
        """Return a shard of a part. Raises UserError, with the command that repairs it."""
        try:
            return TokenShard(self.folder_of(part) / f"{split}.bin")
        except UserError as error:
            raise UserError(f"{error}: {command_for(part)} with the same config") from None

    def join(self, splits: tuple[Split, ...]) -> dict[Split, ShardHeader]:
        """Write the manifests and the account of the whole. Raises UserError for a damaged part."""
        parts = [Part(index, self.count) for index in range(self.count)]
        headers = {}
        for split in splits:
            with ThreadPoolExecutor() as pool:  # hashing releases Python's global lock
                shards = list(pool.map(partial(self.open, split), parts))
            headers[split] = join_shards(self.folder / f"{split}.json", shards)
        with atomic_write(self.folder / "account.json") as unfinished:
            unfinished.write_text(json.dumps(total_account(list(map(self.folder_of, parts)))))
        return headers


def total_account(folders: list[Path]) -> dict[str, Any]:
    """Return the sum of the accounts of the parts. Raises UserError if one cannot be read."""
    size, left_out, characters = 0, Counter[str](), Counter[str]()
    for folder in folders:
        try:
            entry = json.loads((folder / "account.json").read_text())
            size += entry["bytes"]
            left_out.update(entry["left_out"])
            characters.update(entry["characters"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{folder / 'account.json'} is missing or damaged; delete its folder to prepare it "
                "again"
            ) from None
    kept = {reason: count for reason, count in left_out.items() if count}
    return {"bytes": size, "left_out": kept, "characters": characters}


def find_sets(shards: Path, key: str | None = None) -> Iterator[PartSet]:
    """Yield the sets of parts in the folder of shards: all, or those of a key."""
    for folder in sorted(shards.glob(f"parts-{key or '*'}-of-*")):
        if match := re.fullmatch(r"parts-\w+-of-(\d+)", folder.name):
            yield PartSet(folder, int(match[1]))


def complete_set(shards: Path, key: str, settings: dict[str, Any]) -> PartSet | None:
    """Return a set of parts to join; None if none was begun.

    Raises UserError for parts that are missing, or that were prepared with other settings.
    """
    mine = list(find_sets(shards, key))
    complete = next((parts for parts in mine if not parts.missing()), None)
    if complete or not (mine or list(find_sets(shards))):
        return complete
    others = [
        (parts, other)
        for parts in find_sets(shards)
        if parts not in mine and (other := parts.settings()).get("source") == settings["source"]
    ]
    name = settings["source"]
    if not mine:
        for parts, other in others:
            raise UserError(
                f"the parts of {name} in {parts.folder} were prepared with "
                f"{difference(other, settings)}: use what they were prepared with to join them, "
                f"or delete that folder to prepare {name} in one process"
            )
        return None
    nearest = min(mine, key=lambda parts: len(parts.missing()))
    missing = nearest.missing()
    text = f"{words_for(missing)} of {name} {'is' if len(missing) == 1 else 'are'} not prepared"
    for parts, other in others:
        if parts.count == nearest.count and set(missing) - set(parts.missing()):
            text += f" ({parts.folder} has it with {difference(other, settings)})"
    commands = ", ".join(map(command_for, missing[:3])) + ", ..." * (len(missing) > 3)
    raise UserError(
        f"{text}; run {commands} with the same config, or delete {nearest.folder} to prepare "
        f"{name} in one process"
    )


def words_for(parts: list[Part]) -> str:
    """Name parts of one set.

    >>> words_for([Part(2, 8)]), words_for([Part(0, 2), Part(1, 2)])
    ('part 3 of 8', 'parts 1, 2 of 2')
    """
    numbers = ", ".join(str(part.index + 1) for part in parts)
    return f"part{'s' * (len(parts) > 1)} {numbers} of {parts[0].count}"


def command_for(part: Part) -> str:
    """Return the command that prepares a part."""
    return f"python data.py --part {part}"


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Name the first setting in which two preparations differ.

    >>> difference({"data.val_share": 0.1}, {"data.val_share": 0.05})
    'data.val_share 0.1, not 0.05'
    """
    for key, value in ours.items():
        if theirs.get(key) != value:
            if key in IN_WORDS:
                return IN_WORDS[key].format(theirs.get(key))
            return f"{key} {theirs.get(key)!r}, not {value!r}"
    return "the same settings and another key"
