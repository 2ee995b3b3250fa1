"""Problems solved with more and less compute, by a model whose mistakes are known."""

import json
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runner.data.answer_parsers import MarkedNumber
from runner.data.arithmetic import steps, value_of
from runner.data.problems import prepare
from runner.data.problems_config import ProblemsConfig
from runner.data.sums_config import SumsConfig
from runner.data.tokenizers_config import TokenizerConfig
from runner.evaluate.scorers_config import Likelihood
from runner.evaluate.solving import curve, solve
from runner.evaluate.solving_config import ForcedBudgets, SolvingConfig
from runner.generate.budget_forcing import BudgetForcing, think
from runner.generate.calculator_tool import CalculatorConfig
from runner.generate.generate import Completion
from runner.generate.sampling import Sampling
from runner.machine.errors import ConfigError

SEQ = 48
CORPUS = prepare(
    ProblemsConfig(sources=(SumsConfig(count=60),), val_fraction=0.3), TokenizerConfig(kind="bytes")
)
CFG = SolvingConfig(name="sums", problems=12, parser=MarkedNumber(mark="#"), max_new_tokens=40)


class Adder(nn.Module):
    """Writes out sums of three numbers; each result is `error` too large with probability `odds`.

    What it has written it takes for true.
    """

    vocab_size = 257

    def __init__(self, error: int, odds: float) -> None:
        super().__init__()
        self.error, self.odds = error, odds
        self.unused = nn.Parameter(torch.zeros(1))
        self.following = cache(self._following)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.full((*tokens.shape, 257), -1e4)
        for row, ids in enumerate(tokens.tolist()):
            text = bytes(i if i < 256 else 0 for i in ids).decode("latin-1")
            for place in range(len(ids)):
                for following, share in self.following(text[: place + 1]).items():
                    logits[row, place, following] = math.log(share)
        return logits

    def _following(self, text: str) -> dict[int, float]:
        prompt, colon, written = text.partition(":")
        if not colon:
            return {256: 1.0}
        a, b, c = prompt.split("+")
        first = f"<{a}+{b}="
        choices = {first + f"{int(a) + int(b) + wrong}>" for wrong in (0, self.error)}
        found = re.match(re.escape(first) + r"(\d+)>", written)
        if found:
            second = f"{found[0]}<{found[1]}+{c}="
            total = int(found[1]) + int(c)
            choices = {f"{second}{total + wrong}>" for wrong in (0, self.error)}
            found = re.match(re.escape(second) + r"(\d+)>", written)
            if found:
                choices = {f"{found[0]}#{found[1]}\0"}
        fitting = sorted(one for one in choices if one.startswith(written) and one != written)
        if not fitting:
            return {256: 1.0}
        heads = [one[len(written)] for one in fitting]  # the right one sorts first
        shares = [1.0] if len(set(heads)) == 1 else [1.0 - self.odds, self.odds]
        pairs = zip(dict.fromkeys(heads), shares, strict=True)
        return {256 if head == "\0" else ord(head): share for head, share in pairs}


def _trained(model: nn.Module, folder: Path | None = None, seq: int = SEQ) -> Any:
    cfg = SimpleNamespace(
        train=SimpleNamespace(sequence_length=seq),
        eval=SimpleNamespace(batch_size=4),
        task=None,
        model=None,
        precision=None,
    )
    precision = SimpleNamespace(autocast=nullcontext)
    return SimpleNamespace(
        model=model, corpus=CORPUS, cfg=cfg, precision=precision, folder=folder, suffix=""
    )


@dataclass(frozen=True)
class Knowing:
    """A scorer that computes the answer itself."""

    def build(self, trained: Any) -> "Knowing":
        return self

    def score(self, prompts: Any, answers: Any) -> list[float]:
        pairs = zip(prompts, answers, strict=True)
        return [float(answer.endswith(f"#{value_of(prompt[:-1])}")) for prompt, answer in pairs]


def test_curves_of_a_model_that_errs_at_random(tmp_path: Path) -> None:
    cfg = replace(CFG, samples=8, scorer=Knowing(), thresholds=(0.5,))
    values = solve(cfg, _trained(Adder(error=1, odds=0.2), tmp_path))
    assert values["sums/greedy"] == 1.0
    assert values["sums/greedy_stderr"] == 0.0
    ones, passed = values["sums/pass_at_1"], [values[f"sums/pass_at_{k}"] for k in (1, 2, 4, 8)]
    assert 0.5 < ones < 0.8, "64% of the answers have no wrong step"
    assert passed == sorted(passed)
    assert values["sums/majority_at_1"] == pytest.approx(ones)
    assert values["sums/majority_at_8"] > ones
    best = [values[f"sums/best_at_{k}"] for k in (1, 2, 4, 8)]
    assert best == pytest.approx(passed), "who knows the answer picks it where it is"
    assert values["sums/auc"] == values["sums/auc_within"] == 1.0
    assert values["sums/gated_0.5"] == pytest.approx(passed[-1])
    assert values["sums/gated_0.5_tokens"] < values["sums/tokens_at_8"]
    assert values["sums/tokens_at_4"] == 4 * values["sums/sample_tokens"]
    lines = [json.loads(x) for x in (tmp_path / "answers_sums.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    rights = [right for line in lines for right in line["right"]]
    assert sum(rights) / len(rights) == pytest.approx(ones)
    for line in lines:
        assert line["reference"] == str(value_of(line["prompt"][:-1]))
        claims = [all(s.holds for s in steps(text)) for text in line["samples"]]
        assert claims == line["right"]


def test_samples_hang_on_the_seed_of_the_evaluation_alone() -> None:
    cfg, model = replace(CFG, problems=3, samples=3), Adder(error=1, odds=0.2)
    values = solve(cfg, _trained(model))
    assert solve(cfg, _trained(model)) == values
    assert solve(replace(cfg, rows=2), _trained(model)) == values
    assert solve(replace(cfg, seed=1), _trained(model)) != values


def test_a_calculator_mends_arithmetic_and_the_kinds_of_errors_are_counted() -> None:
    wrong = Adder(error=1, odds=0.9)  # greedy, it errs in every step
    values = solve(CFG, _trained(wrong))
    assert (values["sums/greedy"], values["sums/wrong_arithmetic"]) == (0.0, 1.0)
    assert values["sums/wrong_reasoning"] == values["sums/unparsed"] == 0.0
    assert "sums/pass_at_1" not in values
    mended = solve(
        replace(CFG, tools={"calculator": CalculatorConfig(opens="<", after=">")}), _trained(wrong)
    )
    assert mended["sums/greedy"] == 1.0
    assert mended["sums/greedy_tokens"] == values["sums/greedy_tokens"]
    short = solve(replace(CFG, max_new_tokens=12), _trained(wrong))
    assert short["sums/unparsed"] == 1.0
    assert short["sums/greedy_tokens"] == 12


class Follower(Adder):
    """An `Adder` of the last of several problems."""

    def _following(self, text: str) -> dict[int, float]:
        self.read = [*getattr(self, "read", []), text]
        return super()._following(text.rpartition("\n\n")[2])


def test_worked_examples_of_the_training_set_stand_before_a_problem(tmp_path: Path) -> None:
    model, cfg = Follower(error=1, odds=0.1), replace(CFG, shots=2, problems=3)
    values = solve(cfg, _trained(model, tmp_path, seq=120))
    assert values["sums/greedy"] == 1.0
    lines = [json.loads(x) for x in (tmp_path / "answers_sums.jsonl").read_text().splitlines()]
    heads = {text.rpartition("\n\n")[0] for text in model.read if text.count("\n\n") == 2}
    (head,) = heads
    for example in head.split("\n\n"):
        prompt, _, solution = example.partition(":")
        assert MarkedNumber(mark="#").parse(solution) == str(value_of(prompt))
        assert all(one["prompt"] != f"{prompt}:" for one in lines), "it is a training problem"
    assert all("\n" not in one["prompt"] for one in lines), "a scorer is shown the problem alone"
    other = Follower(error=1, odds=0.1)
    solve(replace(cfg, shots_seed=1), _trained(other, seq=120))
    assert not any(text.startswith(head) for text in other.read)
    with pytest.raises(ConfigError, match=r"9 worked examples are \d+ tokens, .*=120; raise it"):
        solve(replace(cfg, shots=9), _trained(model, seq=120))


def test_more_thinking_is_more_accurate_and_costs_what_is_said() -> None:
    forcing = ForcedBudgets(budgets=(5, 40), think_end="#", final="", answer_tokens=4)
    values = solve(replace(CFG, forcing=forcing), _trained(Adder(error=1, odds=0.1)))
    assert values["sums/budget_5"] == 0.0
    assert (values["sums/budget_5_cut"], values["sums/budget_40_cut"]) == (1.0, 0.0)
    assert values["sums/budget_40"] == 1.0
    assert 5 <= values["sums/budget_5_tokens"] <= 9 < values["sums/budget_40_tokens"]


def test_an_end_of_thinking_is_replaced_and_what_is_too_long_is_cut() -> None:
    tokenizer, calls = TokenizerConfig(kind="bytes").build(()), []

    def continues(texts: Any, samplings: Any) -> list[Completion]:
        pairs = list(zip(texts, samplings, strict=True))
        calls.append([(bytes(t).decode(), s.max_new_tokens, s.stop) for t, s in pairs])
        assert len({how.sample for how in samplings}) == len(samplings)
        replies = []
        for text, how in zip(texts, samplings, strict=True):
            said = (
                b"long" * 9 if text[0] == ord("b") and how.stop else b"hm</t>" if how.stop else b"7"
            )
            said = said[: how.max_new_tokens]
            finish = "stop" if said.endswith(b"</t>") else "length"
            shown = said.decode().removesuffix("</t>")
            replies.append(Completion(list(text), list(said), [], shown, finish))  # type: ignore[arg-type]
        return replies

    forcing = BudgetForcing(budget=20, think_end="</t>", waits=2, final="Answer:", answer_tokens=1)
    how = [Sampling(sample=index) for index in range(2)]
    first, second = think(continues, tokenizer, [list(b"a"), list(b"b")], how, forcing)
    assert first.text == "hmWaithmWaithm</t>7"
    assert (first.waits, first.cut, first.spent) == (2, False, 3 * 6 + 1)
    assert second.text == ("long" * 5) + "</t>Answer:7"
    assert (second.waits, second.cut, second.spent) == (0, True, 21)
    assert calls[1] == [("ahmWait", 14, ("</t>",))]
    assert calls[-1][0] == ("ahmWaithmWaithm</t>", 1, ())


def test_likelihood_prefers_what_the_model_would_write() -> None:
    scorer = Likelihood().build(_trained(Adder(error=1, odds=0.2)))
    right, wrong = "<12+34=46><46+56=102>#102", "<12+34=47><47+56=103>#103"
    scores = scorer.score(["12+34+56:"] * 2, [right, wrong])
    tokens = len(right) + 1
    expected = torch.tensor([0.8 * 0.8, 0.2 * 0.8]).log() / tokens
    assert scores == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_curve_has_the_powers_of_two_and_its_end() -> None:
    assert curve(1) == [1]
    assert curve(6) == [1, 2, 4, 6]
    assert curve(16) == [1, 2, 4, 8, 16]


def test_what_cannot_be_measured_is_refused() -> None:
    model = Adder(error=1, odds=0.1)
    with pytest.raises(ConfigError, match=r"no answer that MarkedNumber\(mark='####'\) finds"):
        solve(replace(CFG, parser=None), _trained(model))
    with pytest.raises(ValueError, match="a scorer chooses among samples, and samples=0"):
        replace(CFG, scorer=Knowing())
    with pytest.raises(ValueError, match=r"thresholds=\[0.5\] are of a scorer"):
        replace(CFG, thresholds=(0.5,))
    with pytest.raises(ValueError, match="budgets"):
        ForcedBudgets(budgets=(), think_end="#")

    class Short(Knowing):
        def score(self, prompts: Any, answers: Any) -> list[float]:
            return [1.0]

    class Lost(Knowing):
        def score(self, prompts: Any, answers: Any) -> list[float]:
            return [math.nan for _ in answers]

    with pytest.raises(ConfigError, match=r"gave nan as the score of answer 0.*finite"):
        solve(replace(CFG, scorer=Lost(), samples=2), _trained(model))
    with pytest.raises(ConfigError, match=r"gave 1 scores for 24 answers"):
        solve(replace(CFG, samples=2, scorer=Short()), _trained(model))
