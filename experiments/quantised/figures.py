"""Loss against bytes, one line a scheme, what is on the front; differences paired by size, seed."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

NAME = "quantised"
SCHEME, WIDTH, BYTES = "work.scheme", "model.width", "checkpoint_bytes"
TASKS = ["val_accuracy", "repeat_gain"]
SPEEDS = ["speed_1", "speed_8"]
FACTS = ["loss_delta_low", "loss_delta_high", "kl", "top1_agreement"]
FACTS += [f"{name}_delta" for name in TASKS]
FACTS += ["bits_per_weight", BYTES, *SPEEDS, "emulated", "calibration_tokens", "quantise_s"]
FULL = "fp32"


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure, results.csv and gptq.csv; return the figure."""
    done = runs.finished
    small = _beside_before(done)
    table = over_seeds(small, [WIDTH, SCHEME], "loss_delta", facts=FACTS)
    table = table.rename(columns={"mean": "loss_delta"})
    spread = small.groupby([WIDTH, SCHEME])["loss_delta"].agg(["min", "max"]).reset_index()
    spread = spread.rename(columns={"min": "least_delta", "max": "most_delta"})
    table = table.merge(spread, on=[WIDTH, SCHEME])
    full = _full(done)
    # Of all seeds in full plus what a scheme adds: one whose seeds are not whole is no better.
    table["loss"] = table[WIDTH].map(full.set_index(WIDTH)["loss"]) + table["loss_delta"]
    table = pd.concat([table, full]).sort_values([WIDTH, BYTES], ignore_index=True)
    table["pareto"] = [_is_best(table, row) for _, row in table.iterrows()]
    table.to_csv(folder.parent / "results.csv", index=False)
    ratios = _ratios(small)
    ratios.to_csv(folder.parent / "gptq.csv", index=False)
    print(table.to_string(index=False), ratios.to_string(index=False), sep="\n\n")
    return [plots.save(folder, NAME, _draw(table), table, runs.count())]


def _beside_before(done: pd.DataFrame) -> pd.DataFrame:
    """Return the quantised runs beside the models before.

    speed_1 and speed_8 are the speeds of decoding 1 and 8 texts over theirs, NAME_delta what is
    added to the score of a task.
    """
    small, before = done[done[SCHEME].notna()], done[done[SCHEME].isna()]
    small = small.merge(before[[WIDTH, "seed", *TASKS]], on=[WIDTH, "seed"], suffixes=("", "_was"))
    for name in TASKS:
        small[f"{name}_delta"] = small[name] - small[f"{name}_was"]
    ratios = {
        f"speed_{n}": small[f"tokens_per_s_{n}"] / small[f"tokens_per_s_{n}_before"] for n in (1, 8)
    }
    return small.assign(**ratios)


def _full(done: pd.DataFrame) -> pd.DataFrame:
    """Return rows of the models before; four bytes a parameter."""
    full = done[done[SCHEME].isna()]
    rows = over_seeds(full, [WIDTH], "val_loss", facts=["num_parameters"])
    rows = rows.rename(columns={"mean": "loss"}).drop(columns="std")
    rows[BYTES] = 4 * rows.pop("num_parameters")
    return rows.assign(**{SCHEME: FULL, "loss_delta": 0.0, "bits_per_weight": 32.0})


def _is_best(table: pd.DataFrame, row: pd.Series) -> bool:
    """Return whether nothing of as many bytes or fewer has a lower loss."""
    smaller = table[table[BYTES] <= row[BYTES]]
    return bool((smaller["loss"] >= row["loss"]).all())


def _ratios(small: pd.DataFrame) -> pd.DataFrame:
    """Return what GPTQ adds to the loss over what rounding to nearest adds, least to most."""
    added = small.pivot(index=[WIDTH, "seed"], columns=SCHEME, values="loss_delta").reset_index()
    rows = []
    for scheme in ("int4-g32", "int3-g32"):
        pair = added.dropna(subset=[scheme, f"gptq-{scheme}"])  # a grid may not be whole
        for width, own in pair.groupby(WIDTH):
            ratios = own[f"gptq-{scheme}"] / own[scheme]
            mean = own[f"gptq-{scheme}"].mean() / own[scheme].mean()
            rows.append((width, scheme, mean, ratios.min(), ratios.max(), len(own)))
    return pd.DataFrame(rows, columns=[WIDTH, SCHEME, "ratio", "least", "most", "n"])


def _draw(table: pd.DataFrame) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.6), layout="constrained")
    colours = plt.get_cmap("tab20")
    for number, (scheme, own) in enumerate(table.groupby(SCHEME)):
        full = scheme == FULL
        look = {"color": "black", "marker": "s"} if full else {"color": colours(number % 20)}
        look = {"marker": "o", "ms": 3, "lw": 1.0, **look}
        axes[0].plot(own[BYTES] / 1024, own["loss"], label=scheme, **look)
        if not full:
            axes[1].plot(own[WIDTH], own["loss_delta"].clip(lower=1e-5), **look)
    front = table[table["pareto"]].sort_values(BYTES)
    axes[0].step(front[BYTES] / 1024, front["loss"], "k:", where="post", lw=0.8, label="front")
    axes[0].set(xlabel="weights on disk (KiB)", ylabel=plots.AXES["val_loss"], xscale="log")
    axes[0].set_ylim(top=table.loc[table[SCHEME] == FULL, "loss"].max() + 0.1)  # ternary is above
    axes[1].set(xlabel="width", ylabel="loss added (nats)", yscale="log")
    axes[1].set_xticks(sorted(table[WIDTH].unique()))
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", fontsize=7, ncols=6
    )
    return figure
