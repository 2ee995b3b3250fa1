"""The choice of the next token: settings, draws, penalties, masks."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from runner.generate.choosing import History, choose, truncate
from runner.generate.sampling import Sampling

CPU = torch.device("cpu")


def _history(
    how: Sampling,
    *,
    prompt: Sequence[int] = (0,),
    text: Sequence[int] = (),
    size: int = 5,
    **more: object,
) -> History:
    history = History(
        how, **{"ends": (), "constraint": None} | more, prompt=prompt, vocab_size=size, device=CPU
    )  # type: ignore[arg-type]
    for token in text:
        history.add(token)
    return history


def _greedy(logits: Tensor, **more: object) -> int:
    """Return the greedy choice of one row with these settings, beside one without any."""
    history = {
        name: more.pop(name) for name in ("prompt", "text", "ends", "constraint") if name in more
    }
    how = Sampling(temperature=0.0, **more)  # type: ignore[arg-type]
    rows = [_history(how, **history), _history(Sampling(temperature=0.0))]  # type: ignore[arg-type]
    choices = choose(torch.stack([logits, logits]), rows)
    assert choices.ids[1] == int(logits.argmax())
    return choices.ids[0]


def test_cuts_keep_what_they_say_each_row_its_own() -> None:
    scores = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).log()
    cases: list[tuple[dict[str, float], list[int]]] = [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.76}, [0, 1, 2]),
        ({"min_p": 0.2}, [0, 1, 2]),
        ({"top_k": 4, "top_p": 0.8, "min_p": 0.4}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({}, [0, 1, 2, 3, 4]),
    ]
    hows = [Sampling(**case) for case, _ in cases]  # type: ignore[arg-type]
    together = truncate(scores.expand(len(cases), -1).clone(), hows)
    for row, how, (_, kept) in zip(together, hows, cases, strict=True):
        assert row.isfinite().nonzero()[:, 0].tolist() == kept
        assert torch.equal(truncate(scores[None].clone(), [how])[0], row)


def test_a_nucleus_is_the_smallest_set_whether_it_is_wide_or_narrow() -> None:
    """The flat row needs 2,700 of 3,000 tokens, the steep one a few."""
    rows = [torch.zeros(3000), 0.1 * torch.arange(3000.0)]
    kept = truncate(torch.stack(rows), [Sampling(top_p=0.9)] * 2).isfinite()
    for row, scores in zip(kept, rows, strict=True):
        ordered = torch.softmax(scores.double(), 0).sort(descending=True).values
        needed = int((ordered.cumsum(0) < 0.9 - 1e-5).sum()) + 1
        assert abs(int(row.sum()) - needed) <= 1
        assert scores[row].min() >= scores[~row].max()


@pytest.mark.parametrize("more", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_draws_have_the_models_probabilities_and_a_key_of_their_own(more: dict[str, float]) -> None:
    """4000 draws: each share lies within 5 standard deviations, at most 0.04, of the softmax."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    kept = torch.softmax(truncate(logits[None] / 0.7, [Sampling(**more)])[0], 0)  # type: ignore[arg-type]
    rows = [
        _history(Sampling(temperature=0.7, seed=i % 40, sample=i // 40, **more), size=4)  # type: ignore[arg-type]
        for i in range(4000)
    ]
    drawn = choose(logits.expand(4000, -1), rows).ids
    share = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(share, kept, atol=0.04, rtol=0)
    again = choose(logits.expand(9, -1), rows[700:709]).ids
    assert again == drawn[700:709]


def test_logprobs_are_those_of_the_model_whatever_the_settings() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 2)
    how = Sampling(temperature=0.0, presence_penalty=9.0, top_logprobs=2)
    choices = choose(logits, [_history(how, text=[0], size=4), _history(Sampling(seed=3), size=4)])
    expected = torch.log_softmax(logits[0], 0).tolist()
    assert choices.ids[0] == 1
    assert choices.logprobs == pytest.approx([expected[index] for index in choices.ids])
    assert [index for index, _ in choices.top[0]] == [0, 1]
    assert [nats for _, nats in choices.top[0]] == pytest.approx(expected[:2])
    assert 1 not in choices.top


def test_the_repetition_penalty_is_that_of_transformers_over_prompt_and_text() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, seen = torch.tensor([2.0, 1.9, -1.0, 1.2, -1.1]), torch.tensor([0, 2])
    theirs = RepetitionPenaltyLogitsProcessor(1.5)(seen[None], logits[None].clone())[0]
    found = _greedy(logits, prompt=[0], text=[2], repetition_penalty=1.5)
    assert found == int(theirs.argmax()) == 1
    assert _greedy(logits, prompt=[0, 1], text=[2], repetition_penalty=2.0) == 3


def test_presence_and_frequency_count_the_new_text_alone() -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, 0.0])
    assert _greedy(logits, prompt=[0], presence_penalty=3.0) == 0
    assert _greedy(logits, text=[0], presence_penalty=0.6) == 1
    assert _greedy(logits, text=[0], frequency_penalty=0.4) == 0
    assert _greedy(logits, text=[0, 0], frequency_penalty=0.4) == 1
    assert _greedy(logits, text=[3], presence_penalty=-3.0) == 3


def test_bias_least_length_and_constraint_mask_before_the_choice() -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -9.0])
    assert _greedy(logits, logit_bias=((4, 20.0), (0, -1.0))) == 4
    assert _greedy(logits, logit_bias=((0, -torch.inf),)) == 1
    assert _greedy(logits, ends=(0, 1), min_tokens=1) == 2
    assert _greedy(logits, ends=(0, 1), min_tokens=1, text=[2]) == 0
    only = lambda ids: torch.arange(5) == 3 + len(ids)  # noqa: E731
    assert _greedy(logits, constraint=only, text=[3]) == 4


def test_what_cannot_be_chosen_is_the_error_of_its_own_row() -> None:
    def broken(ids: Sequence[int]) -> Tensor:
        raise KeyError("grammar")

    nothing = lambda ids: torch.zeros(5, dtype=torch.bool)  # noqa: E731
    short = lambda ids: torch.ones(3, dtype=torch.bool)  # noqa: E731
    constraints = [broken, nothing, short, None, None]
    rows = [_history(Sampling(), constraint=constraint) for constraint in constraints]
    logits = torch.zeros(5, 5)
    logits[4] = torch.nan
    errors = choose(logits, rows).errors
    assert sorted(errors) == [0, 1, 2, 4]
    assert isinstance(errors[0], KeyError)
    assert "allow none; allow one" in str(errors[1])
    assert "it must be a bool for each of 5 ids" in str(errors[2])


def test_a_choice_that_company_may_decide_is_counted() -> None:
    logits = torch.tensor([[1.0, 1.0 - 5e-5, 0.0], [1.0, 1.0 - 2e-4, 0.0]])
    rows = [_history(Sampling(temperature=0.0), size=3)] * 2
    assert choose(logits, rows).near_ties == [True, False]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_p": 1.5}, r"top_p=1.5 must be in \(0, 1\]"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"min_tokens": 9, "max_new_tokens": 3}, "min_tokens=9 must be in 0 to max_new_tokens=3"),
        ({"presence_penalty": float("inf")}, "presence_penalty=inf must be a number"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "for ids that differ"),
        ({"sample": -1}, "sample=-1 must be in 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)  # type: ignore[arg-type]
