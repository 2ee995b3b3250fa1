"""What a fit is worth: profiles, sensitivity, a second method, forecasts and their score."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.fit import Fit, fit
from analysis.forecast import score, write_forecast
from analysis.laws import CHINCHILLA
from analysis.projection import variable_projection
from analysis.robustness import flat_valleys, profiles, sensitivity
from tests.analysis.known import THETA, TRUE, grid

COLUMNS = {"n": "n", "d": "d"}


def _fit(table: pd.DataFrame, bootstraps: int = 100) -> Fit:
    starts = CHINCHILLA.start_grid()[::50]
    return fit(
        table, CHINCHILLA, columns=COLUMNS, loss="loss", bootstraps=bootstraps, starts=starts
    )


def test_the_profile_of_a_determined_parameter_closes_around_the_truth() -> None:
    found = _fit(grid(2e-3))
    allowed = flat_valleys(profiles(found)).set_index("parameter")
    assert not allowed["flat"].any()
    for name, value in TRUE.items():
        assert allowed.loc[name, "low"] * 0.97 < value < allowed.loc[name, "high"] * 1.03, name


def test_a_parameter_that_the_data_do_not_determine_is_a_flat_valley() -> None:
    table = grid(2e-3)
    table = table[
        np.isclose(table["d"], table["d"].max())
    ]  # one number of tokens: B, beta and E are one
    table = pd.concat([table, table.assign(n=table["n"] * 1.1)])
    exact = CHINCHILLA.predict(THETA, {c: table[c].to_numpy() for c in ("n", "d")})
    noise = np.random.default_rng(1).normal(0.0, 2e-3, len(table))
    found = _fit(table.assign(loss=exact * np.exp(noise)))
    allowed = flat_valleys(profiles(found)).set_index("parameter")
    assert allowed.loc["B", "flat"]


def test_the_interval_of_a_profile_is_measured_from_its_minimum_where_the_fit_missed_it() -> None:
    value = np.linspace(0.0, 40.0, 401)
    rise = ((value - 20) / 7) ** 2
    for missed in (0.0, 1.0):
        profile = pd.DataFrame({"parameter": "A", "value": value, "statistic": rise - missed})
        (allowed,) = flat_valleys(profile).itertuples()
        assert (allowed.low, allowed.high) == pytest.approx((6.28, 33.72), abs=0.01)


def test_sensitivity_names_each_choice_and_changes_little_on_clean_data() -> None:
    table = grid(1e-4).assign(n_all=lambda t: t["n"] * 1.2 + 1e6)
    rows = sensitivity(
        table, _fit(table), columns=COLUMNS, loss="loss", also_n=["n_all"]
    ).set_index("choice")
    assert {"as fitted", "delta 1", "without the 3 highest losses", "n = n_all"} <= set(rows.index)
    assert rows.loc["delta 1", "alpha"] == pytest.approx(TRUE["alpha"], rel=0.01)
    assert rows.loc["without the 3 highest losses", "points"] == 61
    assert abs(rows.loc["n = n_all", "A"] / rows.loc["as fitted", "A"] - 1) > 0.02


def test_sensitivity_leaves_held_out_rows_out_and_survives_a_choice_that_cannot_be_fitted() -> None:
    table = grid(1e-3).sort_values("flops").reset_index(drop=True)
    held = f"flops > {table['flops'][6]}"  # two points more are left than parameters
    found = fit(
        table,
        CHINCHILLA,
        columns=COLUMNS,
        loss="loss",
        holdout=held,
        bootstraps=0,
        starts=CHINCHILLA.start_grid()[::50],
    )
    rows = sensitivity(
        table.assign(few=table["n"].where(table["n"] < 2e7)),
        found,
        columns=COLUMNS,
        loss="loss",
        holdout=held,
        also_n=["few", "none"],
    ).set_index("choice")
    assert rows.loc["as fitted", "points"] == len(found.used)
    assert rows.loc["without the 1 highest losses", "points"] == len(found.used) - 1
    assert "too few for the 5 parameters" in rows.loc["n = few", "why_not"]
    assert "no column none" in rows.loc["n = none", "why_not"]
    assert rows.loc["as fitted", "alpha"] == pytest.approx(float(found.theta[3]), rel=0.2)


def test_variable_projection_agrees_and_keeps_coefficients_from_turning_negative() -> None:
    table = grid(1e-3)
    found = variable_projection(*(table[c].to_numpy() for c in ("n", "d", "loss")))
    for row in found.itertuples():
        assert row.low < TRUE[row.parameter] < row.high, row.parameter
    exact = grid()
    again = variable_projection(*(exact[c].to_numpy() for c in ("n", "d", "loss")))
    assert again["estimate"].tolist() == pytest.approx(list(TRUE.values()), rel=1e-5)
    flat = exact.assign(loss=3.0 - 1e-3 * np.log(exact["n"]))  # nothing falls with the tokens
    bound = variable_projection(*(flat[c].to_numpy() for c in ("n", "d", "loss")))
    assert (bound.set_index("parameter")["estimate"][["A", "B", "E"]] >= 0).all()
    assert bound["at_bound"].any()
    assert bound[["se", "low", "high"]].isna().all(axis=None)
    table = table.assign(d=20 * table["n"])  # one column follows the other
    table["loss"] = CHINCHILLA.predict(THETA, {"n": table["n"], "d": table["d"]})
    table["loss"] *= np.exp(np.random.default_rng(0).normal(0.0, 1e-3, len(table)))
    line = variable_projection(*(table[c].to_numpy() for c in ("n", "d", "loss")))
    assert line[["se", "low", "high"]].isna().all(axis=None)


def test_a_forecast_is_written_once_and_scored(tmp_path: Path) -> None:
    found = _fit(grid(2e-3))
    points = pd.DataFrame({"n": [3e10, 1e11], "d": [6e11, 1e12]})
    file = tmp_path / "forecast.json"
    table = write_forecast(found, points, file, command="x")
    assert (table["low"] < table["loss"]).all()
    with pytest.raises(FileExistsError):
        write_forecast(found, points, file)
    body = json.loads(file.read_text())
    assert body["written"].startswith("20")
    truth = CHINCHILLA.predict(THETA, {c: points[c].to_numpy() for c in ("n", "d")})
    runs = pd.DataFrame({"n": points["n"], "d": points["d"] * 1.001, "loss": truth}).iloc[:1]
    got = score(file, runs, columns=COLUMNS, loss="loss")
    assert got["runs"].tolist() == [1, 0]
    assert got["inside"][0]
    assert abs(got["error"][0]) < 0.01
    assert np.isnan(got["measured"][1])
