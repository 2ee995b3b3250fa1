import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.paired import (
    beside_baseline,
    detectable,
    holm,
    over_seeds,
    paired_difference,
    reached,
    speed_up,
    unpaired_difference,
)


def _table() -> pd.DataFrame:
    rows = [("a", s, 1.0 + s) for s in range(4)] + [("b", s, 1.1 + s + 0.01 * s) for s in range(3)]
    return pd.DataFrame(rows, columns=["kind", "seed", "loss"])


def test_paired_difference_is_the_paired_t_interval() -> None:
    table = _table()
    got = paired_difference(table, key="kind", baseline="a", metric="loss", pair=["seed"]).iloc[0]
    differences = np.array([0.1, 0.11, 0.12])
    low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert got["difference"] == pytest.approx(0.11)
    assert (got["low"], got["high"]) == pytest.approx((low, high))
    assert (got["n"], got["unpaired"]) == (3, 1)


def test_unpaired_difference_is_welchs() -> None:
    table = pd.concat([_table(), pd.DataFrame({"kind": ["c"], "loss": [9.0]})])
    got = unpaired_difference(table, key="kind", baseline="a", metric="loss").set_index("value")
    a, b = (table.loc[table["kind"] == kind, "loss"] for kind in "ab")
    squares = np.array([part.var() / len(part) for part in (a, b)])
    freedom = squares.sum() ** 2 / (squares**2 / [len(a) - 1, len(b) - 1]).sum()
    half = stats.t.ppf(0.975, freedom) * np.sqrt(squares.sum())
    difference = b.mean() - a.mean()
    assert got["difference"]["b"] == pytest.approx(difference)
    assert (got["low"]["b"], got["high"]["b"]) == pytest.approx(
        (difference - half, difference + half)
    )
    p = 2 * stats.t.sf(abs(difference) / np.sqrt(squares.sum()), freedom)
    assert got["p"]["b"] == pytest.approx(p)
    assert (got["n"]["b"], got["n_baseline"]["b"]) == (3, 4)
    assert got.loc["c", ["low", "high", "p"]].isna().all(), "one run has no spread"
    with pytest.raises(ValueError, match=r"no run has kind=d; there are: \['a', 'b', 'c'\]"):
        unpaired_difference(table, key="kind", baseline="d", metric="loss")


def test_beside_the_baseline_stand_means_facts_and_differences() -> None:
    table = _table().assign(size=[1, 1, 1, 1, 2, 2, 2])
    got = beside_baseline(
        table, key="kind", baseline="a", metric="loss", pair=["seed"], facts=["size"]
    )
    a, b = got.iloc[0], got.iloc[1]
    assert (a["kind"], a["mean"], a["n"], a["size"]) == ("a", 2.5, 4, 1)
    assert np.isnan(a["difference"])
    assert (b["kind"], b["n"], b["size"], b["pairs"]) == ("b", 3, 2, 3)
    assert b["difference"] == pytest.approx(0.11)


def test_one_seed_has_no_spread_and_bad_columns_are_named() -> None:
    one = over_seeds(_table()[:1], ["kind"], "loss")
    assert np.isnan(one["std"].iloc[0])
    with pytest.raises(KeyError, match="no column width"):
        over_seeds(_table(), ["width"], "loss")
    with pytest.raises(ValueError, match="add the column"):
        paired_difference(
            pd.concat([_table(), _table()]), key="kind", baseline="a", metric="loss", pair=["seed"]
        )


def test_holm_keeps_the_order_and_ignores_what_was_not_tested() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, np.nan])).tolist() == pytest.approx(
        [0.03, 0.06, 0.06, np.nan], nan_ok=True
    )
    assert holm(np.array([0.6, 0.9])).tolist() == [1.0, 1.0]


def test_the_p_value_is_that_of_the_paired_t_test() -> None:
    table = _table()
    got = paired_difference(table, key="kind", baseline="a", metric="loss", pair=["seed"]).iloc[0]
    wide = table.pivot(index="seed", columns="kind", values="loss").dropna()
    assert got["p"] == pytest.approx(stats.ttest_rel(wide["b"], wide["a"]).pvalue)
    assert got["p_holm"] == got["p"]


def test_the_detectable_difference_is_detected_as_often_as_promised() -> None:
    size, rng = detectable(1.0, 6), np.random.default_rng(0)
    p = stats.ttest_1samp(rng.normal(size, 1.0, (4000, 6)), 0.0, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.03)
    assert np.isnan(detectable(1.0, 1))


def test_a_speed_up_is_how_much_sooner_a_loss_is_reached() -> None:
    x = np.geomspace(1, 1000, 40)
    runs = pd.DataFrame(
        [(f"{kind}{seed}", kind, seed) for kind in ("slow", "fast", "never") for seed in (1, 2)],
        columns=["fingerprint", "kind", "seed"],
    )
    rate = {"slow": 1.0, "fast": 2.0, "never": 0.001}
    curves = pd.concat(
        [
            pd.DataFrame(
                {"fingerprint": r.fingerprint, "x": x, "value": 5 - np.log(rate[r.kind] * x)}
            )
            for r in runs.itertuples()
        ]
    )
    assert reached(curves, 3.0)["slow1"] == pytest.approx(np.exp(2.0), rel=1e-6)
    got = speed_up(runs, curves, key="kind", baseline="slow", pair=["seed"], target=3.0).set_index(
        "value"
    )
    assert got.loc["fast", "speed_up"] == pytest.approx(2.0, rel=1e-6)
    assert got.loc["never", ["n", "never"]].tolist() == [0, 2]
    from_zero = pd.DataFrame({"fingerprint": "a", "x": [0, 10], "value": [4.0, 3.0]})
    assert reached(from_zero, 3.5)["a"] == pytest.approx(5.0)
