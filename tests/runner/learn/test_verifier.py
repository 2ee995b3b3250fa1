"""Verifiers: what is scored, the losses, and the scores that a trained one gives."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from kernels.philox import NoiseKey
from models.config import plain
from models.decoder_config import DecoderConfig
from runner.commands.cli import app
from runner.data.judged_answers_config import SolutionsConfig, SolutionSource
from runner.data.special_tokens import WithTokens
from runner.data.tokenizers import SymbolTokenizer
from runner.evaluate.answer_scorer import AnswerScorer
from runner.evaluate.scorers_config import VerifierScore
from runner.learn.tasks.verifier import Verifier
from runner.learn.tasks.verifier_config import VerifierConfig
from runner.machine.errors import CheckpointError, ConfigError
from runner.records.cells import Cell, make_cells
from runner.records.inputs import InputConfig
from runner.records.trained_model import load_model
from tests.conftest import compose_tiny, write_text
from tests.folders import chat_folder
from tests.workers import train_here

TOKENIZER = WithTokens(SymbolTokenizer(10), ["<score>"])
# Two answers: prompts of 3 and 2 ids, steps of 2 + 1 and of 3 ids.
BATCH = {
    "tokens": torch.tensor([[1, 2, 3, 4, 5, 6, 9], [1, 2, 4, 5, 9, 9, 9]]),
    "targets": torch.tensor([[-100, -100, 4, 5, 6, -100, -100], [-100, 4, 5, 9] + 3 * [-100]]),
    "labels": torch.tensor([[-1.0, -1, -1, 1, 1, 0, -1], [-1, -1, 1, 1, 1, -1, -1]]),
    "step_ends": torch.tensor([[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0]]).bool(),
    "index": torch.arange(2),
}


class Scores(nn.Module):
    """Logits of the score by place, of the text all 0."""

    vocab_size = 11

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 11)
        logits[..., 10] = torch.arange(tokens.shape[1]).float() - 3.0
        return logits


@pytest.mark.parametrize(
    ("score", "places", "labels"),
    [
        ("end", [[5], [4]], [[0.0], [1.0]]),
        ("token", [[3, 4, 5], [2, 3, 4]], [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
        ("step", [[4, 5], [4]], [[1.0, 0.0], [1.0]]),
    ],
)
def test_scores_are_read_and_judged_where_the_config_says(
    score: Any, places: list[list[int]], labels: list[list[float]]
) -> None:
    task = Verifier(VerifierConfig(score=score, lm_weight=0.5), TOKENIZER)
    assert [row.nonzero()[:, 0].tolist() for row in task.where(BATCH)] == places
    expected = []
    for row, (at, right) in enumerate(zip(places, labels, strict=True)):
        p = [1 / (1 + math.exp(3.0 - place)) for place in at]
        judged = [-math.log(q if r else 1 - q) for q, r in zip(p, right, strict=True)]
        learnt = (BATCH["targets"][row] >= 0).nonzero()[:, 0]
        text = [math.log(10 + math.exp(float(place) - 3.0)) for place in learnt]
        expected.append(sum(judged) / len(judged) + 0.5 * sum(text) / len(text))
    out = task.loss(Scores(), BATCH, None)
    assert float(out.total) == pytest.approx(sum(expected), rel=1e-6)
    assert int(task.count(BATCH)) == 2
    values = task.validate(Scores(), BATCH)
    assert values["val_auc"] == (0.0, 1)  # the wrong answer is longer, so its score is higher
    assert values["val_accuracy"] == (1.0, 2)
    assert values["val_lm_loss"][1] == 6


def test_micro_batches_change_nothing() -> None:
    model = DecoderConfig(depth=1, width=16, num_heads=2).build(11, 0)
    task = Verifier(VerifierConfig(), TOKENIZER)
    noise = NoiseKey(seed=0, step=0, samples=BATCH["index"])
    parts = [{key: value[[row]] for key, value in BATCH.items()} for row in (0, 1)]
    whole = task.loss(model, BATCH, noise).total
    apart = sum(task.loss(model, one, replace(noise, samples=one["index"])).total for one in parts)
    torch.testing.assert_close(whole, apart)


def _solutions(file: Path, *, steps: bool) -> SolutionSource:
    """Write sums, each with a right answer and one that is wrong in its last digit."""
    rows: list[dict[str, Any]] = []
    for number in range(60):
        for wrong in (0, 1):
            prompt = f"{number % 10}+{number // 10}="
            answer = ["ok", "bad"][wrong]
            if steps:
                rows.append({"prompt": prompt, "steps": ["so", answer], "labels": [1, 1 - wrong]})
            else:
                rows.append({"prompt": prompt, "answer": answer, "label": not wrong})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SolutionSource(path=str(file), layout="steps" if steps else "labelled")


def _cell(
    root: Path, *overrides: str, form: Any = "text", steps: bool = False, inputs: Any = None
) -> Cell:
    given = ["train.sequence_length=48", "optim.lr=1e-2", "train.steps=40", "eval.every=40"]
    node = compose_tiny(root, root / "text.txt", "task=verifier", *given, *overrides)
    source = _solutions(root / f"solutions{steps}.jsonl", steps=steps)
    data = SolutionsConfig(sources=(source,), form=form, val_fraction=0.2)
    node |= {"data": plain(data, target=True), "inputs": inputs or {}}
    (cell,) = make_cells([("", node)])
    return cell


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verifier")
    write_text(folder / "text.txt")
    return folder


def test_a_verifier_learns_and_scores_answers_from_the_command_line(root: Path) -> None:
    cell = _cell(root)
    logged = train_here(cell)
    assert logged["val_auc"][-1] > 0.95
    right, wrong = AnswerScorer(cell.folder, batch_size=1).score("3+4=", ["ok", "bad"])
    assert right.end > 0.8 > 0.2 > wrong.end
    inputs = {"judge": InputConfig(runs=(cell.fingerprint,))}
    trained: Any = SimpleNamespace(cfg=SimpleNamespace(root=str(root), inputs=inputs))
    prompts, answers = ["3+4="] * 3, ["bad", "", "ok"]
    scores = VerifierScore(input="judge").build(trained).score(prompts, answers)
    assert scores == pytest.approx([wrong.end, 0.0, right.end], rel=1e-5)
    with pytest.raises(ConfigError, match=r"input 'x', and the run has: judge"):
        VerifierScore(input="x").build(trained)
    call = ["score", cell.fingerprint, "--root", str(root), "--problem", "3+4="]
    done = CliRunner().invoke(app, [*call, "--answer", "ok", "--answer", "bad\n\nok"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows[0]["answer"] == "ok"
    assert rows[0]["score"] == pytest.approx(right.end, rel=1e-5)
    assert len(rows[1]["steps"]) == 2
    scorer = VerifierScore().build(_evaluated(cell))
    found = scorer.score(["3+4=", "1+1=", "3+4="], ["bad", "", "ok"])
    assert found == pytest.approx([wrong.end, 0.0, right.end], rel=1e-4)
    with pytest.raises(ConfigError, match=r"the input 'other', and the run has: verifier; set"):
        VerifierScore(input="other").build(_evaluated(cell))
    for answer, message in ((" ", "answer 1 is empty"), ("x" * 60, "the verifier reads 48")):
        with pytest.raises(ConfigError, match=message):
            AnswerScorer(cell.folder).score("3+4=", [answer])


def _evaluated(verifier: Cell) -> Any:
    """Return what a run with the verifier as an input hands to evaluations."""
    inputs = {"verifier": InputConfig(runs=(verifier.fingerprint,))}
    return SimpleNamespace(cfg=SimpleNamespace(root=verifier.config.root, inputs=inputs))


def test_steps_are_judged_from_a_chat_model_whose_vocabulary_grows(root: Path) -> None:
    folder = chat_folder(root / "hf")
    cell = _cell(root, f"init=hf:{folder}", form="chat", steps=True)
    logged = train_here(cell)
    assert logged["val_auc"][-1] > 0.9
    right, wrong = AnswerScorer(cell.folder).score("3+4=", ["so\nok", "so\nbad"])
    assert len(right.steps) == len(wrong.steps) == 2
    assert right.steps[0] == pytest.approx(wrong.steps[0], abs=1e-5)
    assert right.least > 0.5 > wrong.least >= wrong.product


def test_a_verifier_starts_from_a_run_without_its_token(root: Path) -> None:
    (before,) = make_cells([("", compose_tiny(root, root / "text.txt", "train.steps=2"))])
    train_here(before)
    short = ["train.steps=2", "eval.every=2", "optim.lr=1e-9"]
    cell = _cell(root, *short, inputs={"init": {"runs": [before.fingerprint]}})
    train_here(cell)
    (old, _, _), (new, _, _) = load_model(before.folder), load_model(cell.folder)
    assert new.vocab_size == old.vocab_size + 1
    for name, weight in old.state_dict().items():
        torch.testing.assert_close(new.state_dict()[name][: len(weight)], weight)
    other = _cell(root, *short, "model.width=32", inputs={"init": {"runs": [before.fingerprint]}})
    with pytest.raises(CheckpointError, match="a checkpoint of another model"):
        train_here(other)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=text"], "task=verifier needs answers with labels: add data=solutions"),
        (["task.lm_weight=-1"], "task.lm_weight=-1.0 must be at least 0"),
    ],
)
def test_what_cannot_be_judged_is_refused(root: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_cells([("", compose_tiny(root, root / "text.txt", "task=verifier", *overrides))])
