"""Standard errors over questions: by simulation, clustered, and paired."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from analysis.evaluation import paired_score, score_with_error, standard_error


def test_clusters_widen_the_error_to_what_repeated_sampling_shows() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 10)
    means, clustered, plain = [], [], []
    for _ in range(800):
        passage = rng.normal(0.0, 0.5, 40)[clusters]
        values = 0.5 + passage + rng.normal(0.0, 0.5, 400)
        means.append(values.mean())
        clustered.append(standard_error(values, clusters))
        plain.append(standard_error(values, np.arange(400)))
    assert np.mean(clustered) == pytest.approx(np.std(means), rel=0.1)
    assert np.mean(plain) < 0.6 * np.std(means)


def test_without_clusters_it_is_the_standard_error_of_the_mean() -> None:
    scores = pd.DataFrame({"run": "a", "right": [1, 0, 1, 1, 0, 1]})
    row = score_with_error(scores, score="right", by="run").iloc[0]
    assert row["se"] == pytest.approx(scores["right"].sem())
    assert (row["n"], row["clusters"]) == (6, 6)
    assert row["low"] < 4 / 6 < row["high"]
    unnamed = scores.assign(run=None)
    assert score_with_error(unnamed, score="right", by="run")["n"].tolist() == [6]


def test_pairing_by_question_takes_their_difficulty_out() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(0.0, 1.0, 200)
    rows = [
        (run, q, hard[q] + gain + rng.normal(0.0, 0.1))
        for run, gain in (("a", 0.0), ("b", 0.1))
        for q in range(200)
    ]
    scores = pd.DataFrame(rows, columns=["run", "question", "score"])
    alone = score_with_error(scores, score="score", by="run")["se"].max()
    row = paired_score(scores, score="score", by="run", baseline="a", question="question").iloc[0]
    assert row["difference"] == pytest.approx(0.1, abs=0.05)
    assert row["se"] < alone / 4
    with pytest.raises(ValueError, match="has a question twice"):
        paired_score(
            pd.concat([scores, scores]), score="score", by="run", baseline="a", question="question"
        )
    with pytest.raises(KeyError, match="no column q; there are: run, question, score"):
        paired_score(scores, score="score", by="run", baseline="a", question="q")


def test_answers_that_are_all_alike_still_leave_an_interval() -> None:
    questions = np.arange(50)
    scores = pd.DataFrame(
        {"run": "a", "question": questions, "right": 0.0, "passage": questions // 5}
    )
    alone = score_with_error(scores, score="right", by="run").iloc[0]
    assert alone["low"] == pytest.approx(0.0, abs=1e-12)
    assert 0.03 < alone["high"] < 0.15  # the rule of three says 0.06
    clustered = score_with_error(scores, score="right", by="run", cluster="passage").iloc[0]
    assert clustered["high"] > 2 * alone["high"]
    both = pd.concat([scores, scores.assign(run="b")])
    pairs = {"score": "right", "by": "run", "baseline": "a", "question": "question"}
    gap = paired_score(both, **pairs).iloc[0]
    assert gap["difference"] == gap["se"] == 0.0
    assert gap["low"] == pytest.approx(-gap["high"])
    assert 0.02 < gap["high"] < 0.08


def test_wilsons_interval_is_scipys_but_for_students_t() -> None:
    right = np.repeat([1.0, 0.0], [3, 997])
    scores = pd.DataFrame({"run": "a", "right": right})
    row = score_with_error(scores, score="right", by="run").iloc[0]
    published = binomtest(3, 1000).proportion_ci(method="wilson")
    assert (row["low"], row["high"]) == pytest.approx((published.low, published.high), rel=0.01)
