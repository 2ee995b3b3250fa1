"""Approaches 1 and 2: known optima, rejected budgets, and the bias of a parabola."""

import numpy as np
import pandas as pd
import pytest

from analysis.envelope import envelope
from analysis.isoflop import Method, isoflop
from tests.analysis.known import EXPONENT, best_size, budgets, curves


@pytest.mark.parametrize("method", ["parabola", "akima"])
def test_the_exponent_of_the_best_size_is_found(method: Method) -> None:
    found = isoflop(budgets(1e-3), flops="flops", n="n", loss="loss", method=method, bootstraps=50)
    row = found.exponents.set_index("quantity").loc["n"]
    assert row["low"] - 0.01 < EXPONENT < row["high"] + 0.01
    assert row["exponent"] == pytest.approx(EXPONENT, abs=0.02)
    tokens = found.exponents.set_index("quantity").loc["tokens"]
    assert tokens["exponent"] == pytest.approx(1 - row["exponent"], abs=1e-2)


@pytest.mark.parametrize("method", ["parabola", "akima"])
@pytest.mark.parametrize(("span", "off"), [(5.0, 1.0), (25.0, 1.0), (16.0, 3.0)])
def test_the_best_size_has_no_bias_however_wide_and_lopsided_the_sizes(
    method: Method, span: float, off: float
) -> None:
    table = budgets(span=span, sizes=11, off=off)
    found = isoflop(table, flops="flops", n="n", loss="loss", method=method, bootstraps=2)
    true = best_size(found.budgets["flops"].to_numpy())
    assert found.budgets["n"].to_numpy() == pytest.approx(true, rel=1e-3)
    assert found.budgets["bias"].abs().max() < 0.05  # before it is subtracted
    assert found.exponents["exponent"].iloc[0] == pytest.approx(EXPONENT, abs=1e-4)
    assert "subtracted" in found.counts()


def test_intervals_of_a_spline_through_one_run_a_size_are_not_empty() -> None:
    table = budgets(2e-3, seeds=1)
    found = isoflop(table, flops="flops", n="n", loss="loss", method="akima", bootstraps=300)
    assert found.noise == pytest.approx(2e-3, rel=0.5)
    width = np.log(found.budgets["n_high"] / found.budgets["n_low"])
    assert (width > 0.2).all()
    row = found.exponents.set_index("quantity").loc["n"]
    assert row["low"] < EXPONENT < row["high"]
    assert 0.02 < row["high"] - row["low"] < 0.5
    later = found.at(1e23).set_index("quantity")
    true = float(best_size(np.array([1e23]))[0])
    assert later.loc["n", "low"] < true < later.loc["n", "high"]
    product = later.loc["n", "estimate"] * later.loc["tokens", "estimate"]
    assert 6 * product == pytest.approx(1e23, rel=0.01)


def test_a_run_far_off_is_listed_with_its_row() -> None:
    table = budgets(1e-3, sizes=9)
    assert isoflop(table, flops="flops", n="n", loss="loss", bootstraps=2).outliers.empty
    table.loc[31, "loss"] += 0.1
    found = isoflop(table, flops="flops", n="n", loss="loss", bootstraps=2)
    assert found.outliers["row"].tolist() == [31]
    assert found.outliers["deviations"][0] > 10
    assert "outliers: 1" in found.counts()
    table.loc[3, "n"] = np.inf
    with pytest.raises(ValueError, match="column n, row 3: inf must be a finite number"):
        isoflop(table, flops="flops", n="n", loss="loss")


def test_budgets_without_a_minimum_are_rejected_with_the_reason() -> None:
    table = budgets(sizes=11)
    few = table[table["flops"] < 2e18].sort_values("n").iloc[:6]  # 3 sizes, 2 seeds
    below = table[np.isclose(table["flops"], 1e19)].sort_values("n").iloc[:8]
    upside = pd.DataFrame(
        {"flops": 1e22, "n": np.geomspace(1e8, 1e10, 6), "loss": 3 - np.linspace(-1, 1, 6) ** 2}
    )
    rest = table[table["flops"] > 5e19]
    empty = rest.iloc[[0]].assign(loss=np.nan)
    found = isoflop(
        pd.concat([few, below, upside, rest, empty]),
        flops="flops",
        n="n",
        loss="loss",
        bootstraps=20,
    )
    assert list(found.budgets["rejected"]) == [
        "3 sizes are fewer than 4",
        "the minimum lies outside the sizes",
        "",
        "",
        "the parabola opens downwards",
    ]
    assert "1 left out: a value is missing" in found.counts()
    with pytest.raises(
        ValueError, match=r"0 of 1 budgets have a minimum.*3 sizes are fewer than 4"
    ):
        isoflop(few, flops="flops", n="n", loss="loss")
    with pytest.raises(KeyError, match="no column C; there are: flops"):
        isoflop(table, flops="C", n="n", loss="loss")


def test_one_bad_run_moves_a_robust_minimum_little() -> None:
    table = budgets(2e-4, sizes=9)
    clean = isoflop(table, flops="flops", n="n", loss="loss", bootstraps=2).budgets["n"]
    table.loc[3, "loss"] *= 1.2
    spoilt = isoflop(table, flops="flops", n="n", loss="loss", bootstraps=2).budgets["n"]
    assert spoilt[0] == pytest.approx(clean[0], rel=0.15)


def test_the_envelope_of_curves_grows_with_the_exponent_of_the_law() -> None:
    columns: dict[str, str] = {"run": "run", "n": "n", "flops": "flops", "loss": "loss"}
    table = curves(6, 60)
    found = envelope(table, **columns, bootstraps=20)
    assert found.exponents["exponent"][0] == pytest.approx(EXPONENT, abs=2e-3)
    assert found.bias < -0.02  # of six sizes; it is subtracted
    assert 0 < found.unused < 1
    errors = np.random.default_rng(0).normal(0.0, 5e-3, 6)[table["run"].astype(int) - 1]
    row = envelope(table.assign(loss=table["loss"] + errors), **columns).exponents.loc[0]
    assert row["low"] < EXPONENT < row["high"]
    assert 0.01 < row["high"] - row["low"] < 0.2
    few = table[table["run"].isin([1, 3, 4, 6])]  # one degree of freedom for how runs differ
    row = envelope(few.assign(loss=few["loss"] + errors[few.index]), **columns).exponents.loc[0]
    assert row["low"] < EXPONENT < row["high"]
    assert found.exponents["low"][0] == pytest.approx(EXPONENT, abs=3e-3)
    with pytest.raises(ValueError, match="2 sizes are too few"):
        envelope(table[table["run"] < 3], **columns)
