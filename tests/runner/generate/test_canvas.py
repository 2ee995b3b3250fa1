"""A canvas: caches, remasking, guidance, a suffix, tokens that come and go, hooks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.canvas import Canvas
from models.contract import logits, part_logits
from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from runner.generate.canvas_row import CanvasRow
from runner.generate.denoise import Denoise
from runner.generate.denoising import Denoising
from runner.generate.engine import Engine
from runner.generate.generate import Completion, completions
from runner.generate.request import Request

VOCAB, MASK, EXPAND, DELETE = 12, 9, 10, 11


@pytest.fixture(scope="module")
def model() -> Decoder:
    cfg = DecoderConfig(depth=2, width=32, num_heads=2, num_kv_heads=1, causal=False, init_std=0.3)
    return cfg.build(VOCAB, 1).eval()


def _run(
    model: nn.Module, *given: Denoising, prompt: tuple[int, ...] = (1, 2, 3), **how: Any
) -> Any:
    strategy = Denoise(model, context=64, decode=str, mask=MASK, **how)
    requests = [Request(id=str(i), prompt=prompt, how=one) for i, one in enumerate(given)]
    done: list[Completion] = list(completions(Engine(strategy, rows=8), requests))
    return done[0] if len(given) == 1 else done


@pytest.mark.parametrize("shift", [False, True])
def test_a_part_computed_anew_is_what_it_was_as_long_as_nothing_has_changed(
    model: Decoder, shift: bool
) -> None:
    tokens = torch.randint(9, (2, 20), generator=torch.Generator().manual_seed(0))
    tokens[:, 8:] = MASK
    whole = logits(model, tokens)
    kept: list[Any] = [{}, {}]
    torch.testing.assert_close(part_logits(model, tokens, Canvas(kept, 0, 20)), whole)
    for part in (slice(8 - shift, 12), slice(8 - shift, 20)):  # dual, prefix
        again = part_logits(model, tokens[:, part], Canvas(kept, part.start, 20))
        torch.testing.assert_close(again, whole[:, part], rtol=1e-4, atol=1e-5)
    tokens[:, 8] = 3  # within the part: exact as long as the part is the only thing that changes
    again = part_logits(model, tokens[:, 8:], Canvas(kept, 8, 20))
    assert not torch.allclose(again, whole[:, 8:], atol=0.01)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_caches_are_exact_at_the_start_of_a_block_and_save_passes_over_the_rest(
    model: Decoder, cache: str, shift: bool
) -> None:
    read: list[int] = []
    watch = model.register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1]))
    one_step = {"max_new_tokens": 12, "block": 4, "steps": 3, "algorithm": "maskgit_plus"}
    plain = Denoising(**one_step)
    kept = Denoising(**one_step, cache=cache)
    assert _run(model, kept, shift=shift).ids == _run(model, plain, shift=shift).ids
    assert set(read) == {15}, "each block is one pass over everything"
    read.clear()
    several = Denoising(max_new_tokens=12, block=4, cache=cache, algorithm="low_confidence")
    alone = _run(model, several, shift=shift)
    begins = [15 - 4 * left - shift for left in (3, 2, 1)]
    parts = [(15 - begin) if cache == "prefix" else 4 + shift for begin in begins]
    assert read == [size for part in parts for size in (15, part, part, part)]
    watch.remove()
    texts = _run(model, several, plain, several, shift=shift)
    assert texts[0].ids == texts[2].ids == alone.ids, "whatever the company"


class Scripted(nn.Module):
    """Wants at each token the id that `wanted` names, the surer the further to the left."""

    vocab_size = VOCAB

    def __init__(self, wanted: dict[int, list[int]]) -> None:
        super().__init__()
        self.weight, self.wanted, self.seen = nn.Parameter(torch.zeros(1)), wanted, []

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens[0].tolist())
        out = torch.zeros(*tokens.shape, VOCAB)
        answers = self.wanted[min(len(self.seen), max(self.wanted))]
        for place, token in enumerate(answers[: tokens.shape[1]]):
            out[:, place, token] = 20.0 - place
        return out


def test_expand_makes_two_masks_of_one_and_delete_takes_one_out() -> None:
    """Prompt 1, canvas of two, suffix 2: expanded, filled, filled, and a mask too many deleted."""
    script = Scripted(
        {
            1: [0, EXPAND, 0, 0],
            2: [0, 5, 0, 0, 0],
            3: [0, 0, 6, 0, 0],
            4: [0, 0, 0, DELETE, 0],
        }
    )
    how = Denoising(max_new_tokens=2, suffix=(2,), expansions=3)
    done = _run(script, how, prompt=(1,), expand=EXPAND, delete=DELETE)
    assert script.seen == [[1, 9, 9, 2], [1, 9, 9, 9, 2], [1, 5, 9, 9, 2], [1, 5, 6, 9, 2]]
    assert (done.ids, done.finish, done.revealed_at) == ([5, 6], "length", [1, 2])


@pytest.mark.parametrize(
    ("limit", "length"),
    [
        ({"expansions": 3}, 5),
        ({"max_canvas": 4}, 4),
        ({"expansions": 0}, 2),
        ({"suffix": (2,) * 56}, 7),  # what a context of 64 leaves
    ],
)
def test_expansions_end(limit: dict[str, int], length: int) -> None:
    greedy = Scripted({1: [EXPAND] * 2 + [0] * 62})
    how = Denoising(max_new_tokens=2, **limit)
    done = _run(greedy, how, prompt=(1,), expand=EXPAND, delete=DELETE)
    assert len(done.ids) == length


def test_remasking_keeps_to_the_schedule_and_mends() -> None:
    """The expected number of masks is that of the times, whatever is masked again (ReMDM-cap)."""
    history: list[Tensor] = []
    steps, tokens, rows = 8, 40, 16
    flat = Scripted({1: []})
    given = [
        Denoising(
            max_new_tokens=tokens,
            steps=steps,
            algorithm="origin",
            remask=0.5,
            seed=seed,
            temperature=1.0,
        )
        for seed in range(rows)
    ]

    def note(row: CanvasRow) -> None:
        history.append(row.masked.clone())

    strategy = Denoise(flat, context=64, decode=str, mask=MASK, on_tokens=note)
    requests = [Request(id=str(i), prompt=[1], how=how) for i, how in enumerate(given)]
    done = list(completions(Engine(strategy, rows=rows), requests))
    masked = torch.stack(history).view(steps, rows, tokens).double()
    times = torch.linspace(1.0, 1e-3, steps + 1)[1:-1].double()
    spread = (times * (1 - times) / (rows * tokens)).sqrt()
    assert bool(((masked.mean((1, 2))[:-1] - times).abs() < 4 * spread).all())
    assert not masked[-1].any()
    again = (masked[1:] > masked[:-1]).double().mean((1, 2))
    assert bool((again[:-1] > 0.02).all()), "tokens revealed are masked again"
    assert all(len(text.ids) == tokens for text in done)


def test_guidance_is_linear_in_what_the_prompt_adds(model: Decoder) -> None:
    seen: dict[float, Tensor] = {}
    for weight in (0.0, 1.0, 2.0):

        def note(row: CanvasRow, scores: Tensor, weight: float = weight) -> Tensor:
            seen.setdefault(weight, scores.clone())
            return scores

        _run(model, Denoising(max_new_tokens=4, guidance=weight), on_logits=note)
    keep = [index for index in range(VOCAB) if index != MASK]
    first, second = (seen[b] - seen[b - 1.0] for b in (1.0, 2.0))
    torch.testing.assert_close(first[:, keep], second[:, keep], rtol=1e-3, atol=1e-4)
    without = logits(model, torch.tensor([[1, MASK, MASK, *[MASK] * 4]]))[0, 3:]
    torch.testing.assert_close((seen[0.0] - first)[:, keep], without[:, keep], rtol=1e-3, atol=1e-4)


def test_a_penalty_keeps_an_end_away_until_the_last_step() -> None:
    ending = Scripted({1: [0] + [8] * 4})
    how = {"max_new_tokens": 4, "steps": 4, "algorithm": "low_confidence", "ends": (8,)}
    ends: list[int] = []

    def note(row: CanvasRow) -> None:
        ends.append(int((row.tokens == 8).sum()))

    _run(ending, Denoising(**how), prompt=(1,), on_tokens=note)
    assert ends == [1]
    ends.clear()
    _run(ending, Denoising(**how, end_penalty=80.0), prompt=(1,), on_tokens=note)
    assert ends == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"remask": 0.1}, "needs algorithm=origin"),
        ({"cache": "whole"}, "one of none, prefix, dual"),
        ({"cache": "dual", "guidance": 1.0}, "leave one of them out"),
        ({"end_penalty": -1.0}, "a number from 0"),
    ],
)
def test_settings_that_contradict_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Denoising(**wrong)


@pytest.mark.parametrize(
    ("how", "model_kind", "message"),
    [
        ({"block": 2, "max_canvas": 4}, "resizes", "changes the length of its canvas"),
        ({"suffix": (MASK,)}, "fixed", "stands for a token to fill in"),
        ({"suffix": (0,) * 60}, "fixed", "a canvas of 4 pass the context"),
        ({"max_canvas": 62}, "resizes", "a canvas of 62 pass the context"),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    how: dict[str, Any], model_kind: str, message: str
) -> None:
    resizes = {"expand": EXPAND, "delete": DELETE} if model_kind == "resizes" else {}
    with pytest.raises(ValueError, match=message):
        _run(Scripted({1: []}), Denoising(max_new_tokens=4, **how), **resizes)


def test_a_model_without_a_cache_says_so() -> None:
    with pytest.raises(ValueError, match="keeps no keys and values"):
        _run(Scripted({1: []}), Denoising(max_new_tokens=4, cache="dual"))
