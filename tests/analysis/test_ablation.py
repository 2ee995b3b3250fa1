"""Effects that were put into a table are found in it, and drawn."""

from itertools import product
from pathlib import Path

import pandas as pd
import pytest

from analysis.ablation import ablate, effects
from analysis.runs import Runs

EFFECTS = {"a": -0.3, "b": 0.1}


def _runs() -> Runs:
    rows = []
    for a, b, seed in product((None, 16), ("x", "y"), (1, 2, 3)):
        loss = (
            2.0
            + 0.05 * seed
            + EFFECTS["a"] * (a == 16)
            + EFFECTS["b"] * (b == "y")
            + 0.001 * seed * (b == "y")
        )
        label = f"{'on' if a else 'off'} b={b} seed={seed}"
        rows.append(
            {
                "label": label,
                "state": "finished",
                "part.a": a,
                "part.b": b,
                "seed": seed,
                "val_loss": loss,
            }
        )
    rows.append(rows[0] | {"state": "failed", "val_loss": 99.0, "seed": 4})
    return Runs(pd.DataFrame(rows), pd.DataFrame())


def test_main_effects_are_paired_in_all_other_factors(tmp_path: Path) -> None:
    factors = {"first": ("part.a", 0, 16), "second": ("part.b", "x", "y")}
    (figure,) = effects(_runs(), factors=factors, folder=tmp_path / "f", name="n", title="t")
    assert figure.stat().st_size > 1000
    found = pd.read_csv(tmp_path / "results.csv").set_index("value")
    assert found["difference"].to_dict() == pytest.approx({"first": -0.3, "second": 0.102})
    assert list(found["n"]) == [6, 6]
    assert found["low"]["second"] < 0.102 < found["high"]["second"]
    assert found["p_holm"]["second"] == pytest.approx(
        max(found["p"]["second"], 2 * found["p"].min())
    )
    means = pd.read_csv(tmp_path / "f" / "n_means.csv")
    assert list(means["n"]) == [3] * 4


def test_choices_are_compared_with_their_baseline(tmp_path: Path) -> None:
    ablate(
        _runs(),
        choice=lambda row: "on" if row["part.a"] == 16 else "off",
        baseline="off",
        pair=["part.b", "seed"],
        folder=tmp_path / "f",
        name="n",
        title="t",
    )
    found = pd.read_csv(tmp_path / "results.csv").set_index("choice")
    assert found["difference"]["on"] == pytest.approx(-0.3)
    assert found["percent"]["on"] == pytest.approx(-30 / found["mean"]["off"])
    assert (tmp_path / "f" / "n.png").exists()
