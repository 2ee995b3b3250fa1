"""The pictures of the tutorial: `python docs/pictures.py FOLDER` trains 44 tiny models there first.

    rates_4     2 sizes x 2 seeds, 60 steps
    rates_40    2 sizes x fp32, bf16 x 5 learning rates x 2 seeds

Needs what `make debian` installs (chromium) and the extra `dev`. The pictures go to docs/images;
report_400.png, of made-up numbers, is not made here.
"""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
PORT = 5391
SERVER = f"http://127.0.0.1:{PORT}"
COMMON = [
    "data=stdlib",
    "model=gpt_pico,gpt_nano",
    "seed=1,2",
    "schedule.warmup=0.1",
    "train.sequence_length=64",
    "train.batch_size=16",
    "train.steps=60",
    "eval.every=20",
    "eval.tokens=8192",
    "track.system_every_s=1",
]
SWEEPS = {
    "rates_4": [],
    "rates_40": ["precision=fp32,bf16", "optim.lr=1e-3,3e-3,1e-2,3e-2,1e-1"],
}
FIGURES = {"val_loss_by_step": "figure_curves", "map_model_lr": "figure_map"}
_BUTTON = "[data-component-id='mlflow.{}']"
_ASSISTANT = _BUTTON.format("assistant.chat_panel.close")
_BANNER = _BUTTON.format("experiment_page.shared_view.dismiss")
_DESCRIPTION = _BUTTON.format("experiment.metadata_editor.expand_button")


def main(root: Path) -> None:
    """Train, draw, serve, photograph."""
    runner = [sys.executable, "-m", "runner"]
    espalier = [sys.executable, "-m", "runner.commands.cli"]
    for name, axes in SWEEPS.items():
        grid = [f"root={root}", f"name={name}", *COMMON, *axes]
        subprocess.run([*runner, "-m", *grid], check=True)
        drawn = f"{root}/plots/{name}"
        for verb in (["plots", name, "--out", drawn], ["report", name]):
            subprocess.run([*espalier, *verb, "--root", str(root)], check=True)
    for figure, image in FIGURES.items():
        small(root / "plots" / "rates_40" / f"{figure}.png", f"{image}.png", 800)
    server = [*espalier, "ui", "--root", str(root), "--port", str(PORT)]
    with serving(server, root / "ui.log") as said, sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        of_40 = next(line for line in said if line.startswith("rates_40"))
        runs = of_40.split()[1]
        shoot_mlflow(page, runs)
        for name in SWEEPS:
            page.goto((root / "sweeps" / name / "report.html").as_uri())
            shoot(page, f"report_{name.rpartition('_')[2]}.png")
        page.set_viewport_size({"width": 390, "height": 844})
        shoot(page, "report_phone.png")


def shoot_mlflow(page: Page, runs: str) -> None:
    """Photograph the runs, their description, their charts, and one run's charts."""
    page.goto(runs)
    page.locator(_ASSISTANT).click(timeout=60_000)
    page.locator(_BANNER).click()
    page.wait_for_timeout(3_000)
    shoot(page, "mlflow_runs.png")
    page.locator(_DESCRIPTION).click()
    page.wait_for_timeout(3_000)
    shoot(page, "mlflow_description.png")
    page.goto("about:blank")
    page.goto(f"{runs}&compareRunsMode=CHART")
    page.locator(_BANNER).click(timeout=60_000)
    page.wait_for_timeout(12_000)
    shoot(page, "mlflow_compare.png")
    page.goto("about:blank")
    page.goto(runs)
    page.locator("a[href*='/runs/']:has-text('gpt_')").first.click(timeout=60_000)
    page.get_by_role("tab", name="Model metrics").click(timeout=60_000)
    page.get_by_placeholder("Search metric charts").fill("loss")
    page.wait_for_timeout(12_000)
    shoot(page, "mlflow_run.png")


def shoot(page: Page, name: str) -> None:
    """Write what the page shows to docs/images."""
    page.screenshot(path=IMAGES / name)
    small(IMAGES / name, name, 1000)


def small(file: Path, name: str, width: int) -> None:
    """Write an image with few colours, at most `width` pixels wide, to docs/images."""
    with Image.open(file) as image:
        image.thumbnail((width, 4 * width))
        palette = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    palette.save(IMAGES / name, optimize=True)


@contextmanager
def serving(command: list[str], log: Path) -> Iterator[list[str]]:
    """Run `espalier ui` until the block ends; yield the lines that it prints."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        while not answers():
            time.sleep(1)
        yield log.read_text().splitlines()
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does; the server is its child
        process.wait()


def answers() -> bool:
    """Return whether the server answers."""
    try:
        urllib.request.urlopen(SERVER, timeout=5).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
