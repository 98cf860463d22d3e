"""Make the pictures of the documentation, into docs/images/.

    python docs/make_pictures.py               # all of them, after the default run
    python docs/make_pictures.py page          # or by name: page, loss, probes, data, sweep,
                                               # scaling, tensorboard

Needs `pip install -r requirements-dev.txt`, Chromium for `page` and `tensorboard`, and the
checkpoints and logs of the default run in `checkpoints/` and `logs/`, the sweep and the study of
docs/sweep.md in `sweeps/`; another folder with all of them is `--run FOLDER`.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pocketlm.config.loading import load_config  # noqa: E402  # needs the root on sys.path
from pocketlm.data.prepare import prepare  # noqa: E402

IMAGES = Path(__file__).parent / "images"
MAX_BYTES = 200_000
PROMPT = "The city of Dubai is the"
SEED, TOKEN = "3", 5  # of the text that the page shows; the token whose alternatives it shows
SIZE = {"width": 1200, "height": 760}


def save_small(picture: Path, name: str) -> Path:
    """Save a picture as docs/images/NAME.png with at most 256 colours; check its size."""
    IMAGES.mkdir(exist_ok=True)
    target = IMAGES / f"{name}.png"
    with Image.open(picture) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
    size = target.stat().st_size
    assert size < MAX_BYTES, f"{target} has {size:,} bytes; the limit is {MAX_BYTES:,}"
    return target


@contextmanager
def browser_page() -> Iterator[Page]:
    """Open a page in the system's Chromium or Chrome."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    assert executable, "there is no chromium or chrome on PATH"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser.new_page(viewport=SIZE)
        browser.close()


def wait_for(url: str, seconds: float = 120) -> None:
    """Wait until an address answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=2).read()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise TimeoutError(f"{url} does not answer")


def make_page(run: Path) -> Path:
    """Show a completion and the alternatives at one of its tokens."""
    command = [sys.executable, ROOT / "serve.py", "--ckpt", run / "checkpoints" / "final.ckpt"]
    server = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(server.stderr.readline, "")
        url = next(filter(None, (re.match(r"http://127.0.0.1:\d+", line) for line in lines)))[0]
        with browser_page() as page:
            page.goto(url)
            page.locator("#prompt").fill(PROMPT)
            page.locator("#seed").fill(SEED)
            page.locator("#seed").press("Tab")
            page.locator("#go").click()
            finished = page.locator("#status", has_text=re.compile(r"^\s*\d+ tokens\b"))
            finished.wait_for(state="attached", timeout=120_000)
            page.get_by_role("button", name="Tokens").click()
            page.locator(".token").nth(TOKEN).click()
            page.locator("#settings").evaluate("element => element.scrollTop = 0")
            IMAGES.mkdir(exist_ok=True)
            shot = IMAGES / "page.full.png"
            page.screenshot(path=shot)
    finally:
        server.terminate()
    return moved(shot, "page")


def moved(shot: Path, name: str) -> Path:
    """Save a screenshot as a small picture, and remove it."""
    target = save_small(shot, name)
    shot.unlink()
    return target


def make_loss(run: Path) -> Path:
    """Copy the loss curve that train.py draws."""
    return save_small(run / "checkpoints" / "loss.png", "loss")


def make_sweep(run: Path) -> Path:
    """Copy the picture of the sweep of docs/sweep.md."""
    return save_small(run / "sweeps" / "microgpt" / "loss.png", "sweep")


def make_scaling(run: Path) -> Path:
    """Copy the picture of the scaling study of docs/sweep.md."""
    return save_small(run / "sweeps" / "scaling" / "loss.png", "scaling")


def make_probes(run: Path) -> Path:
    """Score the run's checkpoints on all suites and plot accuracy against steps."""
    shot = IMAGES / "probes.full.png"
    IMAGES.mkdir(exist_ok=True)
    command = [sys.executable, "evaluate_checkpoints.py", "--cases", "cases/*.yaml"]
    command += ["--checkpoints", str(run / "checkpoints" / "step-*.ckpt"), "--plot", str(shot)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return moved(shot, "probes")


def make_data(_: Path) -> Path:
    """Plot the document lengths of the default corpus."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    config = load_config(ROOT / "config.yaml", [f"data.cache_dir={ROOT / 'data'}"])
    data = prepare(config.data)
    ends = [np.append(shard.offsets, len(shard.tokens)) for shard in data.train.shards]
    lengths = np.concatenate([np.diff(starts) for starts in ends])
    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    axes.hist(lengths, bins=np.arange(0, 405, 5), color="#4477aa")
    row = config.training.seq_len
    axes.axvline(row, color="#cc3311", linestyle="--", label=f"a row: {row} tokens")
    axes.set(
        title=f"wiki: {len(lengths):,} training documents, {lengths.sum():,} tokens",
        xlabel="tokens in a document",
        ylabel="documents",
    )
    axes.legend()
    IMAGES.mkdir(exist_ok=True)
    shot = IMAGES / "data.full.png"
    figure.savefig(shot, dpi=110)
    return moved(shot, "data")


def make_tensorboard(run: Path) -> Path:
    """Show TensorBoard's first screen."""
    port = "6016"
    command = [Path(sys.executable).parent / "tensorboard", "--logdir", run / "logs"]
    server = subprocess.Popen([*command, "--port", port], stderr=subprocess.DEVNULL)
    try:
        url = f"http://localhost:{port}"
        wait_for(url)
        with browser_page() as page:
            page.goto(f"{url}/#timeseries")
            page.wait_for_selector("scalar-card svg, scalar-card canvas", timeout=120_000)
            time.sleep(8)  # the charts are drawn one after the other
            IMAGES.mkdir(exist_ok=True)
            shot = IMAGES / "tensorboard.full.png"
            page.screenshot(path=shot)
    finally:
        server.terminate()
    return moved(shot, "tensorboard")


PICTURES = {
    "page": make_page,
    "loss": make_loss,
    "probes": make_probes,
    "data": make_data,
    "tensorboard": make_tensorboard,
    "sweep": make_sweep,
    "scaling": make_scaling,
}


def main(argv: list[str] | None = None) -> int:
    """Make the pictures that the command line names."""
    parser = argparse.ArgumentParser(description="Make the pictures of the documentation.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"pictures (default: {', '.join(PICTURES)})"
    )
    parser.add_argument(
        "--run", type=Path, default=ROOT, help="folder with checkpoints/ and logs/ (default: here)"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(PICTURES):
        parser.error(f"there is no picture {', '.join(unknown)}; use {', '.join(PICTURES)}")
    for name in args.names or PICTURES:
        target = PICTURES[name](args.run.resolve())
        print(f"{target.relative_to(ROOT)}: {target.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
