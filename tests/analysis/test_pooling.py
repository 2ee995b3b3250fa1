"""A mean says what its runs differ in besides the seed; a series is what they differ in."""

import re
from itertools import product
from pathlib import Path

import pandas as pd
import pytest

from analysis import plots
from analysis.paired import over_seeds, paired_difference
from analysis.pooling import PooledWarning, pooled, varied
from analysis.runs import Runs
from analysis.tables import cross_table


def _foreign() -> pd.DataFrame:
    """Return a table of somebody else's: two recipes of one format, two rates, three seeds."""
    rows = [
        {"recipe": recipe, "format": "bf16", "lr": lr, "seed": seed, "name": f"{recipe}{lr}{seed}"}
        | {"val_loss": 3.2 + 0.07 * (recipe == "nvfp4") + seed / 100, "wall_s": 5.1 + seed / 7 + lr}
        for recipe, lr, seed in product(("bf16", "nvfp4"), (1e-3, 3e-3), (1, 2, 3))
    ]
    return pd.DataFrame(rows)


def test_every_mean_over_more_than_seeds_says_so() -> None:
    table = _foreign()
    both = re.escape("bf16 in recipe, lr")
    with pytest.warns(PooledWarning, match=both):
        means = over_seeds(table, ["format"], "val_loss")
    with pytest.warns(PooledWarning, match=both):
        cells = cross_table(table, rows="format", columns=None, metric="val_loss")
    assert means.attrs == cells.attrs
    with pytest.warns(PooledWarning, match="bf16 in lr; nvfp4 in lr"):
        over_seeds(table, ["recipe"], "val_loss")
    one_rate = table[(table["lr"] == 1e-3) | (table["seed"] == 3)].drop_duplicates(
        ["recipe", "seed"], keep="last"
    )  # the rate goes with the seed: the pairs are no repeats of one difference
    with pytest.warns(PooledWarning, match="in lr"):
        paired_difference(one_rate, key="recipe", baseline="bf16", metric="val_loss", pair=["seed"])
    pair = ["seed", "lr"]
    paired_difference(table, key="recipe", baseline="bf16", metric="val_loss", pair=pair)
    over_seeds(table, ["recipe"], "val_loss", over=["lr"])  # meant to be: nothing is said
    over_seeds(table[table["lr"] == 1e-3], ["recipe"], "val_loss")  # seeds alone


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"seed": [1, 1]}, "what no column says (seed is the same)"),
        ({"seed": [1, 2], "optimizer": ["adam", "muon"]}, "optimizer"),
        ({"seed": [1, 2], "lr": [1e-3, 1.7e-3]}, "lr"),
        ({"lr": [1e-3, None]}, "lr"),
        ({"betas": [[0.9, 0.95], [0.9, 0.99]]}, "betas"),
        ({"grad_acc": [1, 2], "init_std": [0.02, 0.1], "loss_weight": [1, 2]}, "grad_acc"),
        ({"random_seed": [1, 2], "run_id": ["a", "b"], "train_loss": [2.0, 2.1]}, ""),
        ({"seed": [1, 2], "tokens_per_s": [10.5, 11.0], "test_acc": [0.1, 0.2]}, ""),
    ],
)
def test_what_a_foreign_table_pools(columns: dict[str, list[object]], said: str) -> None:
    table = pd.DataFrame({"method": "a", "val_loss": [2.0, 2.1], **columns})
    assert pooled(table, ["method"], "val_loss").endswith(f"a in {said}" if said else "")


def test_a_series_is_named_by_what_runs_differ_in_and_a_figure_notes_the_rest(
    tmp_path: Path,
) -> None:
    table = _foreign().rename(columns={"recipe": "precision", "lr": "optim.lr"})
    table["precision.block"] = table["precision"].map({"bf16": 0, "nvfp4": 16})
    assert varied(table) == ["precision", "optim.lr"]  # the block follows from the name
    runs = Runs(table.assign(state="finished", num_parameters=7), pd.DataFrame())
    with pytest.warns(PooledWarning, match=re.escape("optim.lr")):
        figure, data = plots.against_size(runs, by="precision")
    assert "optim.lr" in data.attrs["pooled"]
    plots.save(tmp_path, "size", figure, data, "word " * 60)
    note = figure._supxlabel  # type: ignore[attr-defined]
    width = note.get_window_extent().width
    assert width <= figure.bbox.width, "the note is not cut at the edges"
    with pytest.raises(ValueError, match=r"apart to pair, here optim\.lr"):
        paired_difference(table, key="precision", baseline="bf16", metric="val_loss", pair=["seed"])
