"""Scores against references: brute force, closed forms, published examples."""

import itertools
import math

import numpy as np
import pytest
import torch

from runner.evaluate.scores import (
    calibration_error,
    exact_match,
    f1,
    majority_at_k,
    normalise,
    pass_at_k,
    predictions,
    repetition,
    rouge,
)


def test_answers_are_compared_as_squad_does() -> None:
    assert normalise("The  Cat, sat!") == "cat sat"
    assert exact_match("the Eiffel tower.", ["Eiffel Tower"]) == 1.0
    assert exact_match("Eiffel", ["Eiffel Tower", "tower"]) == 0.0
    assert f1("the cat sat on the mat", ["a cat on a mat"]) == pytest.approx(2 * 3 / (4 + 3))
    assert f1("dog", ["cat", "a dog"]) == 1.0
    assert f1("", [""]) == 1.0
    assert f1("word", [""]) == 0.0


def test_rouge_counts_common_words_pairs_and_the_longest_common_part() -> None:
    found = rouge("the cat was found under the bed", "the cat was under the bed")
    assert found["rouge1"] == pytest.approx(2 * 6 / (7 + 6))
    assert found["rouge2"] == pytest.approx(2 * 4 / (6 + 5))
    assert found["rougeL"] == pytest.approx(2 * 6 / (7 + 6))
    assert rouge("", "words")["rouge1"] == 0.0


@pytest.mark.parametrize(("samples", "correct", "k"), [(5, 2, 1), (6, 1, 3), (7, 7, 2), (8, 0, 4)])
def test_pass_at_k_is_the_mean_over_all_subsets(samples: int, correct: int, k: int) -> None:
    flags = [True] * correct + [False] * (samples - correct)
    subsets = [any(part) for part in itertools.combinations(flags, k)]
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(subsets) / len(subsets))


def test_too_few_samples_are_no_estimate() -> None:
    with pytest.raises(ValueError, match="at least 5 samples"):
        pass_at_k(4, 1, 5)
    with pytest.raises(ValueError, match="at least 5 answers"):
        majority_at_k(["1"], "1", 5)


def test_majorities_are_taken_over_subsets_and_ties_are_shared() -> None:
    assert majority_at_k(["7", "7", "3"], "7", 3) == 1.0
    assert majority_at_k(["7", "3"], "7", 2) == 0.5
    assert majority_at_k(["7", "7", "3"], "7", 1) == pytest.approx(2 / 3)
    assert majority_at_k([None, None, "7"], "7", 3) == 1.0
    assert majority_at_k([None, None], "7", 2) == 0.0
    answers = [*["7"] * 18, *["3"] * 12]
    drawn = majority_at_k(answers, "7", 9)
    exact = sum(
        math.comb(18, i) * math.comb(12, 9 - i) / math.comb(30, 9) for i in range(5, 10)
    )  # two answers, an odd number of votes: no ties
    assert drawn == pytest.approx(exact, abs=0.03)


def test_repetition_is_the_share_of_ngrams_seen_before() -> None:
    assert repetition([1, 2, 3, 4, 5, 6], n=2) == 0.0
    assert repetition([1, 2, 1, 2, 1, 2], n=2) == pytest.approx(3 / 5)
    assert math.isnan(repetition([1, 2], n=4))


def test_calibration_error_is_zero_for_honest_and_the_gap_for_boastful() -> None:
    draw = np.random.default_rng(0)
    confidence = torch.from_numpy(draw.uniform(0, 1, 200_000)).float()
    honest = torch.from_numpy(draw.uniform(0, 1, 200_000)).float() < confidence
    assert calibration_error(confidence, honest) < 0.01
    sure = torch.full((1000,), 0.9)
    assert calibration_error(sure, torch.arange(1000) < 600) == pytest.approx(0.3, abs=1e-6)
    assert calibration_error(torch.ones(10), torch.ones(10, dtype=torch.bool)) == 0.0


def test_predictions_are_the_likeliest_tokens() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 0.0]])
    confidence, right = predictions(logits, torch.tensor([1, 1]))
    assert confidence[0] == pytest.approx(0.75)
    assert right.tolist() == [True, False]
