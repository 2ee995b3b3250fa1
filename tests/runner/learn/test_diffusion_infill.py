"""Middles of any length: what training hides, what it answers, and how it is counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from kernels.philox import NoiseKey
from runner.commands.cli import app
from runner.data.special_tokens import WithTokens
from runner.data.tokenizers import ByteTokenizer
from runner.evaluate.config import DetailsConfig
from runner.evaluate.infilling import Question, first_line, held_out_lines, read_questions, scored
from runner.evaluate.infilling_config import InfillingConfig
from runner.generate.generate import completions
from runner.generate.text_generator import TextGenerator
from runner.learn.tasks.diffusion_infill_config import DiffusionInfillConfig
from runner.learn.trainer import Trainer
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records import journal, metrics
from runner.records.cells import Cell, freeze_cell, make_cells
from runner.serve.errors import ApiError
from runner.serve.fields import CompletionBody, InfillBody
from runner.serve.requests import Planner
from runner.serve.served_model import ServedModel
from runner.work.train import train
from tests.conftest import compose_tiny, write_text

TOKENIZER = WithTokens(ByteTokenizer(), ["<mask>", "<expand>", "<delete>"])
MASK, EXPAND, DELETE = (TOKENIZER.token_ids[name] for name in TOKENIZER.names)
SEQ, ROWS = 96, 300
TEXT = "".join(f"line {i}: {i * i}\n" for i in range(ROWS))


def _batch() -> dict[str, Tensor]:
    ids = torch.from_numpy(TOKENIZER.encode(TEXT).astype("int64"))
    tokens = torch.stack([ids[7 * row : 7 * row + SEQ + 1] for row in range(ROWS)])
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "index": torch.arange(ROWS)}


def _hidden(**options: Any) -> dict[str, Tensor]:
    task = DiffusionInfillConfig(**options).build(None, TOKENIZER, {})
    key = NoiseKey(seed=0, step=3, samples=torch.arange(ROWS))
    return task.hide(_batch(), key)


def test_a_middle_is_hidden_and_what_stands_around_it_is_given() -> None:
    made, lines = _hidden(), 0
    for row, ids in enumerate(_batch()["tokens"].tolist()):
        tokens, targets = made["tokens"][row].tolist(), made["targets"][row].tolist()
        weights, real = made["weights"][row], made["documents"][row] >= 0
        shown = [t for t, here in zip(tokens, real.tolist(), strict=True) if here]
        first = tokens.index(MASK) if MASK in tokens else 0
        assert tokens[:first] == ids[:first], "the prefix is given"
        asked = [place for place, target in enumerate(targets) if target >= 0]
        assert [tokens[place] for place in asked] == [MASK] * len(asked)
        assert tokens.count(MASK) == len(asked), "each mask has an answer"
        deletes = [place for place in asked if targets[place] == DELETE]
        others = [place for place in asked if targets[place] != DELETE]
        assert int(made["counted"][row]) == len(others) + bool(deletes)
        if not others:
            continue
        time_left = float(weights[others[0]])
        assert torch.allclose(weights[others], torch.tensor(time_left))
        if deletes:
            assert deletes == list(range(deletes[0], deletes[0] + len(deletes)))
            assert float(weights[deletes].sum()) == pytest.approx(time_left, rel=1e-4)
            after = bytes(shown[deletes[-1] + 1 :])
            assert b"\n" + after in bytes(ids), "a line has been hidden, and what follows is given"
            lines += 1
    assert lines > 50


def test_expand_and_delete_are_left_out_where_they_are_not_wanted() -> None:
    plain = _hidden(merge=0.0, max_deletes=0, middle="span", max_middle=9)
    assert not torch.isin(plain["targets"], torch.tensor([EXPAND, DELETE])).any()
    assert bool((plain["documents"] == 0).all()), "nothing is taken out, nothing is padded"
    span = (plain["tokens"] != _batch()["tokens"]).long()
    assert int(span.sum(-1).max()) <= 9
    whole = _hidden(merge=1.0, max_deletes=0)
    masked = whole["targets"] >= 0
    share = (whole["targets"] == EXPAND).sum() / masked.sum()
    assert 0.2 < float(share) < 0.6
    some = _hidden(merge=0.0, max_deletes=20)
    deletes = (some["targets"] == DELETE).sum(-1)
    assert (int(deletes.max()), int(deletes.min())) == (20, 0)
    shift = _hidden(shift=True)
    assert torch.equal(shift["targets"][:, :-1], _hidden()["targets"][:, 1:])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Cell:
    return _train(tmp_path_factory.mktemp("infill"), "train.micro_batch=4")


def _train(root: Path, *overrides: str) -> Cell:
    text = write_text(root / "text.txt")
    options = ["task=diffusion_infill", "model.causal=false", "train.sequence_length=96"]
    node = compose_tiny(root, text, *options, "train.steps=3", "eval.every=3", *overrides)
    (cell,) = make_cells([("", node)])
    freeze_cell(cell)
    attempt = journal.claim(cell.folder)
    assert attempt is not None
    writer = journal.Journal(cell.folder, attempt)
    writer.event(train(cell, cell.inputs, writer, Ranks("cpu"), lambda: False))
    writer.close()
    return cell


def test_the_loss_does_not_depend_on_the_micro_batch(trained: Cell, tmp_path: Path) -> None:
    other = _train(tmp_path, "train.micro_batch=2")
    ours, theirs = (metrics.read(cell.folder) for cell in (trained, other))
    for name in ("loss", "val_infill_loss"):
        here, there = ([row[name] for row in rows if name in row] for rows in (ours, theirs))
        assert len(here) >= 1
        assert here == pytest.approx(there, rel=1e-4)


def _cli(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    return done.output + str(done.exception or "")


def test_a_run_fills_in_middles_and_shows_its_order(trained: Cell) -> None:
    run, root = str(trained.folder), ["--root", str(trained.folder.parents[1])]
    given = ["--prefix", "line 3: ", "--suffix", " is the square", "--tokens", "3"]
    once = _cli("infill", run, *given, "--max-tokens", "6", "--whole", *root)
    assert once.startswith("line 3: ")
    assert once.rstrip("\n").endswith(" is the square")
    assert once == _cli("infill", run, *given, "--max-tokens", "6", "--whole", *root)
    assert "pass the context of 96" in _cli("infill", run, *given[:4], "--tokens", "80", *root)
    assert "leave it out" in _cli("infill", run, *given, "--steps", "2", *root)
    spoken = ("generate", run, "--prompt", "line", "--tokens", "4", *root)
    assert "--compile compiles the step" in _cli(*spoken, "--compile")
    assert "--repetition-penalty does nothing" in _cli(*spoken, "--repetition-penalty", "1.1")
    assert "a canvas has no beams" in _cli(*spoken, "--beams", "2")
    with pytest.raises(ConfigError, match=r"causal=false sees"):
        DetailsConfig().run(_as_trained(trained), 3)
    assert "max_new_tokens=0" in _cli("infill", run, "--tokens", "0", *root)
    out = trained.folder.parents[1] / "looks"
    shown = _cli("order", run, "--prompt", "line", "--tokens", "6", "--out", str(out), *root)
    assert "order.html" in shown, shown
    assert set(json.loads((out / "order.json").read_text())) >= {"tau", "sketch", "kind"}


def test_a_server_fills_in_the_middle_of_a_text(trained: Cell) -> None:
    model = ServedModel(trained.folder, TextGenerator(trained.folder))
    engine = model.engine(rows=2, chunk=1)
    planner = Planner(model, engine)
    body = InfillBody(input_prefix="line 3: ", input_suffix=" is", n_predict=4, seed=1)
    both = CompletionBody(prompt="line 3: ", suffix=" is", max_tokens=4, seed=1, n=2)
    texts = []
    for plan in (planner.infill(body, ""), planner.completion(both, "")):
        assert all(TOKENIZER.decode(request.how.suffix) == " is" for request in plan.requests)
        texts.append([done.ids for done in completions(engine, plan.requests)])
    assert texts[0][0] == texts[1][0]
    assert 0 <= len(texts[0][0]) <= 16
    with pytest.raises(ApiError, match="more are asked for"):
        planner.infill(InfillBody(input_prefix="a" * 90, input_suffix="b", n_predict=9), "")


def test_questions_are_scored_by_their_tests_their_text_and_their_tree(
    trained: Cell, tmp_path: Path
) -> None:
    rows = [
        {
            "prompt": "def f(x):\n",
            "canonical_solution": "    y = x\n",
            "suffix": "    return y\n",
            "test": "def check(f):\n    assert f(3) == 3\n",
            "entry_point": "f",
        }
    ] * 2
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = InfillingConfig(name="lines", file=str(file), canvases=(2, 4), limit=2, batch_size=2)
    values = cfg.run(_as_trained(trained), 3)
    assert values["lines/pass_at_1@2"] == 0.0
    for name in ("exact_match", "same_ast", "length_error", "pass_at_1"):
        mean = (values[f"lines/{name}@2"] + values[f"lines/{name}@4"]) / 2
        assert values[f"lines/{name}"] == pytest.approx(mean)
    (question, _) = read_questions(file)
    right, renamed = "    y = x\n", "    y = (x)  # the same\n"
    for middle, exact in ((right, 1.0), (renamed, 0.0)):
        scores = scored(question, middle, 4)
        assert scores == {
            "exact_match": exact,
            "same_ast": 1.0,
            "pass_at_1": 1.0,
            "length_error": 4.0,
        }
    assert scored(question, "    y = 2\n", 0)["pass_at_1"] == 0.0
    result = Question("7+5=", "12", "\n3+4=07\n")
    assert scored(result, "12", 0)["exact_match"] == 1.0
    assert scored(result, "12\n3+1=04", 8)["exact_match"] == 0.0, "more than the middle"
    assert (first_line("\n  a\nb"), first_line("a\nb"), first_line("")) == ("a", "a", "")


def test_one_line_of_each_function_is_held_out() -> None:
    function = "def f(a):\n    b = a\n    c = b\n    return c\n"
    text = f"import os\n\n{function}\nclass K:\n    def g(self):\n        return 1\n"
    questions = {question.middle.strip(): question for question in held_out_lines(text)}
    assert set(questions) == {"c = b", "return 1"}
    assert questions["c = b"].whole("    c = b\n") == function
    assert list(held_out_lines("def (")) == []


def _as_trained(cell: Cell) -> Any:
    trainer = Trainer(cell, cell.inputs, None, Ranks("cpu"))
    return trainer.setup.trained(3, None, last=True)
