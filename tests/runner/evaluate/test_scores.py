"""Scores against closed forms."""

import math

import numpy as np
import pytest
import torch

from runner.evaluate.scores import calibration_error, predictions, repetition


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
