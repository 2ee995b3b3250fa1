"""In which order a masked-diffusion model writes a text: statistics, a class, a page and a picture.

The input is the step that revealed each token of the text. The measures are ours: the authors of
Dream-Coder, whose classes these are, show pictures.

Shape legend: n = tokens of the text.
"""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.plots import save

# Every fourth token first, then the rest, has tau 0.62: no lower bound than that of the first class
# tells a sketch. Blocks in random order reach any gap; their long runs tell them from a sketch.
_LEFT_TO_RIGHT, _SKETCH_GAP, _SCATTERED = 0.8, 0.4, 0.25
_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222; }}
pre {{ white-space: pre-wrap; line-height: 1.6; background: #f6f6f6; padding: 1em; }}
pre span {{ border-radius: 3px; }} pre span.hidden {{ background: #ddd !important; color: #ddd; }}
input {{ width: 100%; }}
</style></head><body><h1>{title}</h1><p>{facts}</p>
<label>step <output id="at">{last}</output>
<input id="step" type="range" min="-1" max="{last}" value="{last}"></label>
<pre>{prompt}{text}</pre><button id="play">play</button>
<script>
const slider = document.getElementById("step"), tokens = document.querySelectorAll("span[data-at]");
function show() {{
  document.getElementById("at").value = slider.value;
  for (const token of tokens) token.classList.toggle("hidden", +token.dataset.at > +slider.value);
}}
slider.oninput = show;
document.getElementById("play").onclick = () => {{
  slider.value = -1; show();
  const timer = setInterval(() => {{
    slider.value = +slider.value + 1; show();
    if (+slider.value >= +slider.max) clearInterval(timer);
  }}, 120);
}};
</script></body></html>"""


@dataclass(frozen=True)
class Order:
    """The order in which a text appeared.

    Args:
        tau: Kendall's, between step and place, ties as 0: 1 is left to right, -1 backwards.
        jump: mean distance between tokens revealed one after the other, by n / 3: 1 is random.
        sketch: mean, over the first half of the steps, of the part of the revealed tokens that lie
            right of the leftmost masked one.
        runs: pieces of neighbours revealed one after the other, by n: 1 / n is left to right.
        kind: `left to right` (tau > 0.8), else `sketch first` (sketch > 0.4, runs > 0.25),
            else `interleaved`.
    """

    tau: float
    jump: float
    sketch: float
    runs: float
    kind: str


def order_of(revealed_at: Sequence[int]) -> Order:
    """Return the order of a text from the step that revealed each of its tokens.

    Tokens of one step count from left to right. A text of fewer than two tokens has no order: its
    statistics are NaN and its kind "".
    """
    steps = np.asarray(revealed_at)
    n = len(steps)
    if n < 2:
        return Order(math.nan, math.nan, math.nan, math.nan, "")
    later = np.sign(steps[None, :] - steps[:, None])[np.triu_indices(n, 1)]
    tau = float(later.mean())
    moves = np.diff(np.argsort(steps, kind="stable"))
    jump = float(np.abs(moves).mean() / (n / 3))
    runs = float((1 + (moves != 1).sum()) / n)
    gaps = [_gap(steps, step) for step in np.unique(steps)]
    sketch = float(np.mean(gaps[: max(1, len(gaps) // 2)]))
    if tau > _LEFT_TO_RIGHT:
        kind = "left to right"
    elif sketch > _SKETCH_GAP and runs > _SCATTERED:
        kind = "sketch first"
    else:
        kind = "interleaved"
    return Order(tau, jump, sketch, runs, kind)


def _gap(steps: np.ndarray, now: int) -> float:
    """Return the part of the tokens revealed by `now` that lie right of the leftmost masked one."""
    revealed = steps <= now
    if revealed.all():
        return 0.0
    return float(revealed[int(np.argmin(revealed)) :].sum() / revealed.sum())


def draw_order(
    tokens: Sequence[str], revealed_at: Sequence[int], folder: Path, title: str, prompt: str = ""
) -> list[Path]:
    """Return the paths of picture and page after writing them, and order.json, to `folder`.

    Args:
        tokens: the text of each token.
    """
    order = order_of(revealed_at)
    table = pd.DataFrame({"place": range(len(tokens)), "step": revealed_at, "token": list(tokens)})
    facts = {name: value for name, value in asdict(order).items() if name != "kind"}
    words = f"{order.kind}: " + ", ".join(f"{name} {value:.2f}" for name, value in facts.items())
    picture = save(folder, "order", _picture(table, words), table, title)
    (folder / "order.json").write_text(json.dumps(asdict(order)), encoding="utf-8")
    last = max(revealed_at, default=0)
    spans = "".join(
        f'<span data-at="{at}" style="background:{_shade(at, last)}" title="step {at}">'
        f"{html.escape(token)}</span>"
        for token, at in zip(tokens, revealed_at, strict=True)
    )
    page = _PAGE.format(
        title=html.escape(title), facts=words, last=last, prompt=html.escape(prompt), text=spans
    )
    (folder / "order.html").write_text(page, encoding="utf-8")
    return [picture, folder / "order.html"]


def _picture(table: pd.DataFrame, words: str) -> Figure:
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    axis.scatter(table["place"], table["step"], c=table["step"], cmap="viridis", s=9)
    axis.set(xlabel="place in the text", ylabel="step that revealed it", title=words)
    axis.title.set_fontsize(8)
    return figure


def _shade(step: int, last: int) -> str:
    """Return a colour from yellow (first) to blue (last)."""
    hue = 50 + 170 * step / max(1, last)
    return f"hsl({hue:.0f} 80% 82%)"
