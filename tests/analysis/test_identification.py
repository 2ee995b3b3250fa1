"""Designs that do not determine a law: it is said, and intervals and forecasts show it."""

import numpy as np
import pandas as pd
import pytest

from analysis.fit import Fit, fit
from analysis.forecast import forecast
from analysis.identification import extrapolation, unidentified
from analysis.laws import CHINCHILLA, DATA_CONSTRAINED
from analysis.report import plain
from analysis.robustness import flat_valleys, profiles
from tests.analysis.known import grid

SIZES = np.array([2e7, 5e7, 1e8, 2e8, 5e8, 1e9, 2e9, 4e9])
LOSSES = [4.3199, 3.6506, 3.2197, 2.9407, 2.6144, 2.4388, 2.326, 2.1974]
FAR = pd.DataFrame({"n": [1e9], "d": [1e12]})  # its loss is 2.220


def _fit(table: pd.DataFrame, bootstraps: int = 20) -> Fit:
    return fit(
        table,
        CHINCHILLA,
        columns={"n": "n", "d": "d"},
        loss="loss",
        bootstraps=bootstraps,
        starts=CHINCHILLA.start_grid()[::60],
    )


def test_twenty_tokens_per_parameter_everywhere_determine_no_law_and_it_is_said() -> None:
    found = _fit(pd.DataFrame({"n": SIZES, "d": 20 * SIZES, "loss": LOSSES}), 200)
    reasons = unidentified(found)
    assert reasons[0] == "d / n is 20 in all runs: their terms cannot be told apart"
    assert {"A", "B", "alpha", "beta"} <= set(reasons[1].rpartition("determine ")[2].split(", "))
    assert "intervals of predictions are conservative" in reasons[2]
    assert extrapolation(found, FAR) == [
        "extrapolation: 1000 tokens per parameter, the fitted runs have 20"
    ]
    far = forecast(found, FAR).iloc[0]
    assert far["low"] < 2.220 < far["high"]
    assert far["high"] - far["low"] > 0.4
    near = forecast(found, FAR.assign(d=2e10)).iloc[0]
    assert near["high"] - near["low"] < 0.15
    assert not extrapolation(found, FAR.assign(d=2e10))
    assert np.isfinite(found.parameters[["low", "high"]]).all().all()
    assert None not in plain(found.report())["parameters"]["A"].values()


def test_columns_that_follow_each_other_or_stand_still_are_named() -> None:
    table = grid(2e-3)
    assert not unidentified(_fit(table))
    one = table[np.isclose(table["d"], table["d"].max())]
    one = pd.concat([one, one.assign(n=one["n"] * 1.1)])
    assert unidentified(_fit(one))[0].startswith("d is 1e+12 in all runs")
    steep = one.assign(d=one["n"] ** 0.5 * 1e6)
    assert unidentified(_fit(steep))[0].startswith("d follows n^0.50 in all runs")


def test_a_profile_is_flat_up_to_the_bound_and_shows_a_minimum_that_was_missed() -> None:
    table = grid(2e-3)
    found = _fit(table[table["d"] < 1e10])  # E and B are hardly told apart
    profile = profiles(found)
    wide = flat_valleys(profile).set_index("parameter")
    for name, (low, high) in CHINCHILLA.bounds.items():
        part = profile.loc[profile["parameter"] == name, "value"]
        assert part.between(low * 0.98 - 0.01, high * 1.02 + 0.01).all(), name
        if wide.loc[name, "low"] < low * 1.001 or wide.loc[name, "high"] > high * 0.999:
            assert wide.loc[name, "flat"], name
    elsewhere = found.theta + np.array([0.05, 0, 0, 0, 0])
    moved = Fit(**{**vars(found), "theta": elsewhere, "objective": found.objective * 1.5})
    assert profiles(moved)["statistic"].min() < -0.1


@pytest.mark.parametrize("unique", [1e10, 1e11])
def test_a_constant_of_repetition_without_repetition_is_flat(unique: float) -> None:
    table = grid(1e-3)
    table = table[(table["d"] <= unique) & (table["n"] < 1e9)].assign(unique=unique)
    found = fit(
        table,
        DATA_CONSTRAINED.fix({"E": 1.69, "alpha": 0.34, "R_N": 5.3}),
        columns={"n": "n", "d": "d", "unique": "unique"},
        loss="loss",
        bootstraps=50,
        starts=np.log(np.array([[400.0, 400.0, np.exp(0.3), 15.0]])),
    )
    allowed = flat_valleys(profiles(found)).set_index("parameter")
    assert allowed.loc["R_D", "flat"]
