"""Pictures of the inside of a model: attention maps, logit lens, loss of each token.

The input is a dict: `tokens` (texts), `losses` and `ranks` (of each token but the first),
`attention` [layers, heads, seq, seq], `gates` (by layer, of each token, where there are memories of
n-grams), `lens` (for each layer and token: says, probability, true) and `statistics` by layer.
"""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.plots import save

_MAX_LABELS = 24  # tokens that are named along an axis
_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; color: #222; }}
.text {{ font-family: ui-monospace, monospace; white-space: pre-wrap; line-height: 1.9; }}
.text span {{ border-radius: 3px; }}
table {{ border-collapse: collapse; font: 12px ui-monospace, monospace; }}
.wide {{ overflow-x: auto; }}
td, th {{ padding: 2px 6px; text-align: left; white-space: pre; border-bottom: 1px solid #ddd; }}
img {{ max-width: 100%; }}
</style></head><body><h1>{title}</h1>
<h2>Loss of each token</h2><p>Darker is more surprising; the mean is {mean:.3f} nats, the darkest
{worst:.2f}. Hover for loss, rank and the likeliest token.</p><div class="text">{text}</div>
<h2>Logit lens</h2><p>What each layer would say after each token, and how likely it makes the true
next one (shade).</p>
<div class="wide"><table>{lens}</table></div>
<h2>Attention</h2><p>Rows are layers, columns heads; in each map a row is a token, a column what
it attends to.</p>
<img alt="attention maps" src="data:image/png;base64,{attention}">
<h2>What the layers hold</h2><table>{statistics}</table></body></html>"""


def draw(seen: dict[str, Any], folder: Path, title: str) -> list[Path]:
    """Return the paths of figures and page after writing them, and look.json, to `folder`."""
    maps = np.asarray(seen["attention"], dtype=float)
    figure = attention_maps(maps, seen["tokens"])
    strongest = pd.DataFrame(
        [
            (layer, head, float(maps[layer, head, 1:].max(axis=1).mean()))
            for layer in range(maps.shape[0])
            for head in range(maps.shape[1])
        ],
        columns=["layer", "head", "mean_largest_weight"],
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    made = [save(folder, "attention", figure, strongest, title)]
    losses = pd.DataFrame(
        {"token": seen["tokens"][1:], "loss": seen["losses"], "rank": seen["ranks"]}
    )
    made.append(save(folder, "losses", _loss_bars(losses), losses, title))
    if seen["gates"]:
        layers = {f"layer {layer}": gates for layer, gates in seen["gates"].items()}
        table = pd.DataFrame({"token": seen["tokens"]} | layers)
        made.append(save(folder, "gates", gate_map(table), table, title))
    page = _PAGE.format(
        title=html.escape(title),
        mean=losses["loss"].mean(),
        worst=losses["loss"].max(),
        text=_heat(seen),
        lens=_lens(seen),
        statistics=_statistics(seen["statistics"]),
        attention=base64.b64encode(picture.getvalue()).decode(),
    )
    (folder / "look.html").write_text(page, encoding="utf-8")
    (folder / "look.json").write_text(json.dumps(seen), encoding="utf-8")
    return [*made, folder / "look.html"]


def attention_maps(maps: np.ndarray, tokens: list[str]) -> Figure:
    """Return a figure of `maps` [layers, heads, seq, seq], values from 0 to 1, one panel a head.

    Args:
        tokens: the texts, named along the axes where there are few.
    """
    layers, heads = maps.shape[:2]
    figure, axes = plt.subplots(
        layers,
        heads,
        figsize=(1.6 * heads + 0.6, 1.6 * layers + 0.6),
        squeeze=False,
        layout="constrained",
    )
    named = len(tokens) <= _MAX_LABELS
    for layer in range(layers):
        for head in range(heads):
            axis = axes[layer][head]
            image = axis.imshow(maps[layer, head], cmap="Blues", vmin=0.0, vmax=1.0)
            axis.grid(False)
            axis.set_xticks([])
            axis.set_yticks(range(len(tokens)) if named and head == 0 else [])
            if named and head == 0:
                axis.set_yticklabels([repr(t)[1:-1] for t in tokens], fontsize=5)
            axis.set_title(f"layer {layer}, head {head}", fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.6, label="attention")
    return figure


def gate_map(gates: pd.DataFrame) -> Figure:
    """Return a figure of gates, a row of shades for each layer.

    Args:
        gates: a row for each token: its text in `token`, the gates of each layer in a column.
    """
    layers = gates.drop(columns="token")
    figure, axis = plt.subplots(
        figsize=(max(3.3, 0.11 * len(gates) + 1.4), 0.3 * layers.shape[1] + 1.0),
        layout="constrained",
    )
    image = axis.imshow(layers.T, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axis.set_yticks(range(layers.shape[1]), [str(name) for name in layers])
    axis.set_xticks(
        range(len(gates)), [repr(t)[1:-1] for t in gates["token"]], rotation=90, fontsize=6
    )
    axis.grid(False)
    figure.colorbar(image, label="gate")
    return figure


def _loss_bars(losses: pd.DataFrame) -> Figure:
    figure, axis = plt.subplots(figsize=(7, 2.2), layout="constrained")
    axis.bar(range(len(losses)), losses["loss"], width=0.9)
    axis.set(xlabel="token", ylabel="loss (nats)")
    if len(losses) <= 3 * _MAX_LABELS:
        axis.set_xticks(
            range(len(losses)), [repr(t)[1:-1] for t in losses["token"]], rotation=90, fontsize=6
        )
    return figure


def _heat(seen: dict[str, Any]) -> str:
    top = max(*seen["losses"], 1e-9)
    parts = [html.escape(seen["tokens"][0])]
    for index, (token, loss, rank) in enumerate(
        zip(seen["tokens"][1:], seen["losses"], seen["ranks"], strict=True)
    ):
        prediction = seen["lens"][-1][index]["says"]
        tip = html.escape(f"{loss:.2f} nats, rank {rank}, likeliest {prediction!r}", quote=True)
        shade = f"rgba(200, 60, 30, {0.75 * loss / top:.2f})"
        parts.append(f'<span style="background:{shade}" title="{tip}">{html.escape(token)}</span>')
    return "".join(parts)


def _lens(seen: dict[str, Any]) -> str:
    head = "".join(f"<th>{html.escape(repr(token)[1:-1])}</th>" for token in seen["tokens"][:-1])
    rows = [f"<tr><th>after</th>{head}</tr>"]
    for layer in reversed(range(len(seen["lens"]))):
        cells = "".join(
            f'<td style="background:rgba(0, 114, 178, {0.8 * cell["true"]:.2f})" '
            f'title="{cell["probability"]:.2f}, the true one {cell["true"]:.3f}">'
            f"{html.escape(repr(cell['says'])[1:-1])}</td>"
            for cell in seen["lens"][layer]
        )
        rows.append(f"<tr><th>layer {layer}</th>{cells}</tr>")
    return "".join(rows)


def _statistics(rows: list[dict[str, float]]) -> str:
    names = list(rows[0])
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["layer", *names])
    body = "".join(
        f"<tr><td>{layer}</td>{''.join(f'<td>{row[name]:.4g}</td>' for name in names)}</tr>"
        for layer, row in enumerate(rows)
    )
    return f"<tr>{head}</tr>{body}"
