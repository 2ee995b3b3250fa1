"""pass@k, votes, best-of-n, gating and AUC against their definitions and published values."""

import math
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest

from runner.evaluate.answer_metrics import (
    auc,
    auc_within,
    best_at_k,
    gated,
    majority,
    majority_at_k,
    mean_and_error,
    pass_at_k,
)


def test_pass_at_k_of_the_fixture() -> None:
    values = [pass_at_k(16, 5, k) for k in (1, 2, 4, 8, 16)]
    assert values == pytest.approx([0.3125, 0.5417, 0.8187, 0.9872, 1], abs=5e-5)
    with pytest.raises(ValueError, match="k=17 must be in 1 to 16"):
        pass_at_k(16, 5, 17)


def test_every_curve_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 4, 7).tolist(), (rng.random(7) < 0.4).tolist()
    answers = [None if i == 2 else str(i % 3) for i in range(7)]
    for k in range(1, 8):
        subsets = list(combinations(range(7), k))
        best = [right[max(some, key=lambda i: (scores[i], -i))] for some in subsets]
        assert best_at_k(scores, right, k) == pytest.approx(sum(best) / len(best))
        passed = [any(right[i] for i in some) for some in subsets]
        assert pass_at_k(7, sum(right), k) == pytest.approx(sum(passed) / len(passed))
        votes = [majority([answers[i] for i in some]) == "0" for some in subsets]
        assert majority_at_k(answers, "0", k) == pytest.approx(sum(votes) / len(votes))


def test_a_tie_goes_to_the_first_and_what_was_not_parsed_votes_for_nobody() -> None:
    assert majority(["7", "8", "8", "7"]) == "7"
    assert majority([None, None, "8"]) == "8"
    assert majority([None, None]) is None
    assert majority_at_k([None, "8", "9", None], "8", 4) == 1.0
    many = [str(i % 2) for i in range(16)]
    assert majority_at_k(many, "0", 8) == majority_at_k(many, "0", 8), "subsets are not drawn anew"


@pytest.mark.parametrize(
    ("area", "curve"),
    [
        (0.5, [0.30, 0.30, 0.30, 0.30, 0.30, 0.30]),
        (0.68, [0.30, 0.38, 0.45, 0.52, 0.57, 0.62]),
        (0.8, [0.30, 0.42, 0.56, 0.67, 0.76, 0.83]),
        (0.9, [0.30, 0.47, 0.65, 0.81, 0.91, 0.96]),
    ],
)
def test_best_of_n_by_a_binormal_verifier(area: float, curve: list[float]) -> None:
    rng = np.random.default_rng(1)
    right = rng.random((1500, 32)) < 0.3
    shift = math.sqrt(2) * NormalDist().inv_cdf(area)
    scores = rng.normal(size=right.shape) + shift * right
    found = [
        np.mean([best_at_k(s, r, n) for s, r in zip(scores.tolist(), right.tolist(), strict=True)])
        for n in (1, 2, 4, 8, 16, 32)
    ]
    assert found == pytest.approx(curve, abs=0.02)  # standard errors are below 0.012
    assert auc(scores.ravel().tolist(), right.ravel().tolist()) == pytest.approx(area, abs=0.01)


def test_auc_within_a_question_is_not_fooled_by_easy_questions() -> None:
    scores = [[5.0, 6.0, 7.0], [1.0, 2.0, 3.0]]
    right = [[True, True, False], [False, False, True]]
    assert auc_within(scores, right) == pytest.approx(2 / 4)
    pooled = [s for some in scores for s in some], [r for some in right for r in some]
    assert auc(*pooled) == pytest.approx(6 / 9)
    assert auc([1, 1], [True, False]) == 0.5
    assert math.isnan(auc([1, 2], [True, True]))
    assert math.isnan(auc_within([[1.0]], [[True]]))


def test_a_gate_draws_until_an_answer_is_good_enough() -> None:
    assert gated([0.1, 0.7, 0.9], 0.5) == (1, 2)
    assert gated([0.1, 0.3, 0.3], 0.5) == (1, 3)
    assert gated([0.6], 0.5) == (0, 1)


def test_the_error_of_a_mean_is_over_questions() -> None:
    mean, error = mean_and_error([0.0, 1.0, 1.0, 0.0])
    assert (mean, error) == (0.5, pytest.approx(math.sqrt(1 / 3) / 2))
    assert math.isnan(mean_and_error([1.0])[1])
