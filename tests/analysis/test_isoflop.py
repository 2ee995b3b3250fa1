"""Approaches 1 and 2: known optima, rejected budgets, and the bias of a parabola."""

import numpy as np
import pandas as pd
import pytest

from analysis.envelope import envelope
from analysis.isoflop import Method, isoflop
from tests.analysis.known import EXPONENT, TRUE, budgets, curves


@pytest.mark.parametrize("method", ["parabola", "akima"])
def test_the_exponent_of_the_best_size_is_found(method: Method) -> None:
    found = isoflop(budgets(1e-3), flops="flops", n="n", loss="loss", method=method, bootstraps=50)
    row = found.exponents.set_index("quantity").loc["n"]
    assert row["low"] - 0.01 < EXPONENT < row["high"] + 0.01
    assert row["exponent"] == pytest.approx(EXPONENT, abs=0.02)
    tokens = found.exponents.set_index("quantity").loc["tokens"]
    assert tokens["exponent"] == pytest.approx(1 - row["exponent"], abs=1e-2)


def test_the_bias_of_the_parabola_is_reported_as_it_is() -> None:
    found = isoflop(budgets(), flops="flops", n="n", loss="loss", bootstraps=2).budgets
    a, b, alpha, beta = (TRUE[k] for k in ("A", "B", "alpha", "beta"))
    true = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (found["flops"] / 6) ** EXPONENT
    assert np.log(found["n"] / true).to_numpy() == pytest.approx(found["bias"].to_numpy(), abs=1e-4)
    assert (found["bias"].abs() > 0.01).all()


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
    table = curves(25, 120)
    found = envelope(table, run="run", n="n", flops="flops", loss="loss", width=0.02, bootstraps=50)
    row = found.exponents.set_index("quantity").loc["n"]
    assert row["exponent"] == pytest.approx(EXPONENT, abs=0.02)
    assert row["low"] < EXPONENT + 0.02
    assert row["high"] > EXPONENT - 0.02
    assert 0 < found.unused < 1
    with pytest.raises(ValueError, match="2 sizes are too few"):
        envelope(table[table["run"] < 3], run="run", n="n", flops="flops", loss="loss")
