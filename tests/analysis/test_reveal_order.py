"""Classes of orders on histories whose class is known; the page shows a text appear."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest

from analysis.reveal_order import draw_order, order_of

CHROMIUM = shutil.which("chromium")
N = 64
SEQUENTIAL = list(range(N))
SKETCH = sorted(range(N), key=lambda place: (place % 4 != 0, place))  # every fourth, then the rest


def _blocks(seed: int) -> list[int]:
    """Return the order in which blocks of 8 are written, at random, each from left to right."""
    blocks = list(range(N // 8))
    random.Random(seed).shuffle(blocks)
    return [8 * block + place for block in blocks for place in range(8)]


def _steps(order: list[int]) -> list[int]:
    steps = [0] * len(order)
    for step, place in enumerate(order):
        steps[place] = step
    return steps


def test_three_histories_are_told_apart() -> None:
    left = order_of(_steps(SEQUENTIAL))
    assert (left.kind, left.tau, left.sketch, left.runs) == ("left to right", 1.0, 0.0, 1 / N)
    assert left.jump == pytest.approx(3 / N)
    sketch = order_of(_steps(SKETCH))
    assert sketch.kind == "sketch first"
    assert sketch.sketch == pytest.approx(0.67, abs=0.01)
    assert sketch.runs == pytest.approx(0.5)
    for seed in range(20):
        blocks = order_of(_steps(_blocks(seed)))
        assert blocks.kind == ("left to right" if blocks.tau > 0.8 else "interleaved")
        assert blocks.runs <= 1 / 8


def test_the_statistics_are_those_of_their_definitions() -> None:
    backwards = order_of(_steps(SEQUENTIAL[::-1]))
    assert (backwards.tau, backwards.sketch) == (-1.0, 1.0)
    shuffled = [order_of(_steps(random.Random(i).sample(range(N), N))) for i in range(200)]
    assert sum(order.tau for order in shuffled) / 200 == pytest.approx(0.0, abs=0.03)
    assert sum(order.jump for order in shuffled) / 200 == pytest.approx(1.0, abs=0.04)
    # Two at once: 6 pairs, of which those of one step are 0; 0 and 3 first, then 1 and 2.
    tied = order_of([0, 1, 1, 0])
    assert tied.tau == pytest.approx((1 + 1 + 0 + 0 - 1 - 1) / 6)
    assert tied.sketch == pytest.approx(0.5)
    assert order_of([3]).kind == ""
    assert math.isnan(order_of([]).tau)


def test_the_page_shows_a_text_in_its_order(tmp_path: Path) -> None:
    made = draw_order(["<b>", "x ", "y"], [2, 0, 1], tmp_path, "run", prompt="a < b")
    page = (tmp_path / "order.html").read_text()
    assert "&lt;b&gt;" in page
    assert "a &lt; b" in page
    assert [page.count(f'data-at="{step}"') for step in range(3)] == [1, 1, 1]
    assert made[0].stat().st_size > 5000
    assert json.loads((tmp_path / "order.json").read_text())["tau"] == pytest.approx(-1 / 3)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")
def test_the_page_plays_a_text_in_a_browser(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    draw_order(["a", "b", "c"], [2, 0, 1], tmp_path, "run", prompt="> ")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((tmp_path / "order.html").as_uri())
        shown = page.locator("pre span:not(.hidden)")
        assert shown.all_inner_texts() == ["a", "b", "c"]
        for step, texts in ((-1, []), (0, ["b"]), (1, ["b", "c"])):
            page.locator("#step").fill(str(step))
            assert shown.all_inner_texts() == texts
        page.get_by_role("button", name="play").click()
        page.wait_for_function("document.querySelectorAll('pre span:not(.hidden)').length == 3")
        assert errors == []
        browser.close()
