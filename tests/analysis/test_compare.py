import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.compare import over_seeds, paired_difference


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


def test_one_seed_has_no_spread_and_bad_columns_are_named() -> None:
    one = over_seeds(_table()[:1], ["kind"], "loss")
    assert np.isnan(one["std"].iloc[0])
    with pytest.raises(KeyError, match="no column width"):
        over_seeds(_table(), ["width"], "loss")
    with pytest.raises(ValueError, match="add the key"):
        paired_difference(
            pd.concat([_table(), _table()]), key="kind", baseline="a", metric="loss", pair=["seed"]
        )
