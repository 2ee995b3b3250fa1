"""Curves of a metric against what else was logged."""

import pandas as pd
import pytest

from analysis.runs import Runs


def _runs() -> Runs:
    """Two runs; the loss of validation is logged at other steps than the time."""
    rows = [("a", s, "wall_s", 2.0 * s) for s in (10, 20, 40)]
    rows += [("a", s, "val_loss", 3.0 - s / 100) for s in (10, 15, 30, 40)]
    rows += [
        ("a", s, "val_loss", 1.0) for s in (5, 45)
    ]  # before and after all that is known of the time
    rows += [("b", s, "val_loss", 9.0) for s in (10, 15)]  # and no time at all
    history = pd.DataFrame(rows, columns=["fingerprint", "step", "key", "value"])
    return Runs(pd.DataFrame({"fingerprint": ["a", "b"], "state": "finished"}), history)


def test_an_axis_logged_at_other_steps_is_interpolated() -> None:
    got = _runs().curves("val_loss", "wall_s")
    assert got["fingerprint"].tolist() == ["a"] * 4
    assert got["x"].tolist() == [20.0, 30.0, 60.0, 80.0]
    assert got["value"].tolist() == pytest.approx([2.9, 2.85, 2.7, 2.6])


def test_against_steps_nothing_is_lost_and_an_unknown_metric_names_the_known() -> None:
    assert len(_runs().curves("val_loss", "step")) == 8
    with pytest.raises(KeyError, match=r"'flops'; there are: val_loss, wall_s"):
        _runs().curves("val_loss", "flops")
