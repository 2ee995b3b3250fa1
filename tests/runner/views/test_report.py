"""The status page in a real browser: sorting, filtering, a phone's width."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from runner.commands.cli import app
from runner.views.report import write_status_page
from runner.views.report_sections import Ended, figures, heat_map, totals, what_next

Run = Callable[..., subprocess.CompletedProcess[str]]
CHROMIUM = shutil.which("chromium")


def test_the_grid_is_a_heat_map_that_tells_holes_seeds_and_what_is_next() -> None:
    points = [
        (m, lr, seed) for m in ("small", "large") for lr in (1e-3, 3e-3, 1e-2) for seed in (1, 2)
    ]
    values, rows = {}, []
    for number, (model, lr, seed) in enumerate(points):
        run = f"{number}"
        values[run] = {"model": model, "optim.lr": lr, "seed": seed}
        state = "failed" if (model, lr) == ("large", 1e-3) else "finished"
        value = 3.0 - 10 * lr - (model == "large") + seed / 1000
        rows.append(Ended(SimpleNamespace(fingerprint=run), state, value, 1800.0))
    assert totals(rows) == "6.00 hours of training, 1.00 of them in cells that failed or diverged"
    grid = heat_map(rows, values, "val_loss")
    assert "val loss by model and optim.lr; the mean over seeds" in grid
    assert '<td class="hole">failed</td>' in grid
    assert '<td class="h0" title="n=2">1.901<small>n=2</small></td>' in grid
    assert heat_map(rows, {}, "val_loss") == ""
    said = what_next("sweep", rows, values, drawn=True)
    assert "2 cells failed: <code>espalier failures sweep; espalier retry sweep</code>" in said
    assert (
        "the best optim.lr, 0.01, is at the edge of the grid: <code>optim.lr=0.033</code>" in said
    )
    assert "one seed" not in said
    alone = {run: own | {"seed": 1} for run, own in values.items() if own["seed"] == 1}
    assert "each point has one seed" in what_next("sweep", rows, alone, drawn=True)


def test_figures_stand_under_their_questions(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.png" for n in ("val_loss_by_step", "pareto_time", "own", "map_a_b")]
    for file in files:
        file.write_bytes(b"png")
    page = figures(files)
    order = [page.index(f'alt="{name}"') for name in ("own", "map_a_b", "pareto_time")]
    assert order == sorted(order)
    assert page.index("What do compute") < page.index("How fast does the loss fall?")


@pytest.fixture
def page_file(espalier: Run, tmp_path: Path) -> Path:
    """The page of three cells: two finished, one failed."""
    espalier("-m", "train.sequence_length=16,70000", "seed=1", "name=w", "eval.every=3")
    espalier("-m", "seed=2", "optim.lr=1e-4", "name=w", "eval.every=3")
    made = CliRunner().invoke(app, ["report", "w", "--root", str(tmp_path)])
    assert made.exit_code == 0, made.output
    return Path(made.output.strip())


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")
def test_the_page_of_an_experiment_has_its_verdict_and_a_table_that_sorts(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    (tmp_path / "results.csv").write_text("choice,mean\nb,2.5\na,1.5\nnone,\n")
    told = {"question": "Is a < b?", "verdict": "Yes."}
    write_status_page(
        [], "x", tmp_path / "x.html", "http://127.0.0.1:5000", [], told, tmp_path / "results.csv"
    )
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((tmp_path / "x.html").as_uri())
        assert "Is a < b?" in page.inner_text("body")
        assert "Verdict. Yes." in page.inner_text("body")
        page.get_by_role("columnheader", name="mean").click()
        assert page.locator("td[data-label=choice]").all_inner_texts() == ["a", "b", "none"]


def test_the_page_stands_alone_and_escapes(page_file: Path) -> None:
    text = page_file.read_text()
    assert "http" not in text.replace("http://127.0.0.1:5000", "")
    assert "Failures by cause" in text
    assert "1 of 3: data, all" in text
    assert text.count("<polyline") == 2
    assert 'href="../../runs/' in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")
def test_a_browser_sorts_filters_and_fits_a_phone(page_file: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_file.as_uri())
        rows = page.locator("#cells tbody tr")
        assert rows.count() == 3
        page.get_by_role("columnheader", name="val loss").click()
        values = [
            float(v)
            for v in page.locator("td[data-label='val loss']").evaluate_all(
                "cells => cells.map(c => c.dataset.value)"
            )
            if v
        ]
        assert len(values) == 2
        assert values == sorted(values)
        page.get_by_role("columnheader", name="val loss").click()
        again = page.locator("td[data-label='val loss']").first.get_attribute("data-value")
        assert float(again or "nan") == values[-1]
        page.get_by_label("filter cells").fill("failed")
        assert page.locator("#cells tbody tr:visible").count() == 1
        page.get_by_label("filter cells").fill("")
        page.set_viewport_size({"width": 375, "height": 700})
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 375, "the page scrolls sideways on a phone"
        assert page.locator("#cells thead").is_hidden()
        log = page.get_by_role("link", name="log").first
        with page.expect_navigation():
            log.click()
        assert errors == []
        browser.close()
