"""Tables: holes shown, digits justified, LaTeX that compiles (tests/analysis/test_paper.py)."""

import pandas as pd
import pytest

from analysis.tables import cross_table, escape, in_words, latex, number, same_word


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


@pytest.mark.filterwarnings("ignore::analysis.pooling.PooledWarning")  # models in one cell
def test_runs_whose_key_is_empty_have_a_row_and_a_column() -> None:
    runs = _runs().assign(kind=[1.0, None, None, 2.0])
    table = cross_table(runs, rows="kind", columns="model", metric="val_loss")
    assert list(table.index) == ["1", "(empty)", "2"]
    assert table.loc["(empty)", "small"] == "2.1450 +- 0.0071 (2)"
    turned = cross_table(runs, rows="model", columns="kind", metric="val_loss")
    assert turned.loc["small", "(empty)"] == "2.1450 +- 0.0071 (2)"


@pytest.mark.parametrize(
    ("values", "cell"),
    [
        ([3.1e-7, 3.3e-7], "3.2e-07 +- 1.4e-08 (2)"),
        ([2.0e9, 2.2e9], "2.1e+09 +- 1.4e+08 (2)"),
        ([0.0001234], "0.00012 (1)"),
        ([0.0, 0.0], "0.000 +- 0.000 (2)"),
        ([117120.0], "117120.000 (1)"),
    ],
)
def test_no_number_is_rounded_away(values: list[float], cell: str) -> None:
    runs = pd.DataFrame({"a": "x", "m": values})
    assert cross_table(runs, rows="a", columns=None, metric="m").loc["x", "m"] == cell


def test_labels_and_keys_are_safe_in_latex() -> None:
    table = pd.DataFrame({"m": ["1"]}, index=["[a] <b> | c\nd"])
    text = latex(table, caption="a", label="50% of #1_x")
    assert r"\label{tab:50--of--1_x}" in text
    assert r"{}[a] \textless{}b\textgreater{} \textbar{} c d & 1 \\" in text


def test_values_are_named_as_they_are_typed() -> None:
    words = in_words(pd.Series([16.0, None, 1e-5]))
    assert list(words) == ["16", "(empty)", "1e-05"]
    assert [same_word(text, words) for text in ("16.0", "1e-5", "7")] == ["16", "1e-05", "7"]
    assert same_word("true", in_words(pd.Series([True, False]))) == "True"
