"""Tables: holes shown, digits justified, LaTeX that compiles (tests/analysis/test_paper.py)."""

import pandas as pd
import pytest

from analysis.tables import cross_table, escape, latex, number


def _runs() -> pd.DataFrame:
    rows = [
        ("bf16", "small", 2.10, 1),
        ("bf16", "small", 2.14, 2),
        ("nvfp4", "small", 2.15, 1),
        ("bf16", "large_1", 1.9, 1),
    ]
    return pd.DataFrame(rows, columns=["precision", "model", "val_loss", "seed"])


def test_a_cell_is_mean_spread_and_count_and_a_hole_is_a_hole() -> None:
    table = cross_table(_runs(), rows="precision", columns="model", metric="val_loss")
    assert table.loc["bf16", "small"] == "2.120 +- 0.028 (2)"
    assert table.loc["nvfp4", "small"] == "2.150 (1)"
    assert table.loc["nvfp4", "large_1"] == "--"
    with pytest.raises(KeyError, match="no column loss; there are: precision, model"):
        cross_table(_runs(), rows="precision", columns="model", metric="loss")


def test_latex_has_rules_signs_and_no_raw_underscore() -> None:
    table = cross_table(_runs(), rows="precision", columns="model", metric="val_loss")
    text = latex(table, caption="Loss in %", label="loss")
    assert r"\toprule" in text
    assert r"2.120 $\pm$ 0.028 (2)" in text
    assert r"large\_1" in text
    assert r"\caption{Loss in \%}" in text
    assert escape("a_b^c\\") == r"a\_b\textasciicircum{}c\textbackslash{}"


def test_numbers_keep_four_digits() -> None:
    assert number(0.123456) == r"\ensuremath{0.1235}"
    assert number(3.0e12) == r"\ensuremath{3 \times 10^{12}}"
    assert number(float("nan")) == "--"
