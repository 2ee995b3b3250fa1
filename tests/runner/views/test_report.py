"""The status page in a real browser: sorting, filtering, a phone's width."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runner.commands.cli import app
from runner.views.report import write_status_page

Run = Callable[..., subprocess.CompletedProcess[str]]
CHROMIUM = shutil.which("chromium")


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
        rows = page.locator("tbody tr")
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
        assert page.locator("tbody tr:visible").count() == 1
        page.get_by_label("filter cells").fill("")
        page.set_viewport_size({"width": 375, "height": 700})
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 375, "the page scrolls sideways on a phone"
        assert page.locator("thead").is_hidden()
        log = page.get_by_role("link", name="log").first
        with page.expect_navigation():
            log.click()
        assert errors == []
        browser.close()
