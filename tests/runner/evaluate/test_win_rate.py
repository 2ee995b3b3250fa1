"""Answers beside those of the model at the start, by a verifier that has learnt from pairs."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.config import plain
from runner.data.judged_answers_config import (
    PreferencesConfig,
    PreferenceSource,
    SolutionsConfig,
    SolutionSource,
)
from runner.evaluate.answer_scorer import AnswerScorer
from runner.machine.errors import ConfigError
from runner.records.cells import Cell, make_cells
from tests.conftest import compose_tiny, write_text
from tests.folders import chat_folder
from tests.workers import train_here

LORA = ["+model/adapter=lora", "optim.lr=2e-2", "train.sequence_length=64"]


def _cell(root: Path, data: Any, *overrides: str, inputs: Any = None) -> Cell:
    given = [f"init=hf:{root / 'hf'}", *LORA, *overrides]
    node = compose_tiny(root, root / "text.txt", *given)
    node |= {"data": plain(data, target=True), "inputs": inputs or {}}
    (cell,) = make_cells([("", node)])
    return cell


def test_a_verifier_of_pairs_judges_both_answers_to_held_out_prompts(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt")
    chat_folder(tmp_path / "hf")
    rows = [{"instruction": f"Say {i}.", "chosen": "the dog", "rejected": "x"} for i in range(60)]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(rows))
    labelled = SolutionSource(path=str(file), layout="alpaca")
    judged = list(labelled.examples())
    assert [answer.labels for answer in judged[0] or ()] == [(1.0,), (0.0,)]
    solutions = SolutionsConfig(sources=(labelled,), val_fraction=0.2)
    pairs = PreferencesConfig(
        sources=(PreferenceSource(path=str(file), layout="alpaca"),), val_fraction=0.2
    )
    verifier = _cell(tmp_path, solutions, "task=verifier", "train.steps=60", "eval.every=60")
    assert train_here(verifier)["val_auc"][-1] > 0.95

    asked = ["task=preference", "+eval/also@eval.also.win_rate=win_rate", "eval.every=20"]
    asked += ["eval.also.win_rate.max_new_tokens=4", "eval.also.win_rate.prompts=5"]
    inputs = {"verifier": {"runs": [verifier.fingerprint]}}
    still = _cell(tmp_path, pairs, *asked, "train.steps=1", "optim.lr=1e-12", inputs=inputs)
    logged = train_here(still)
    assert logged["win_rate/wins"] == [0.5], "the same answers are ties"
    assert logged["win_rate/score"] == logged["win_rate/score_start"]

    moved = _cell(tmp_path, pairs, *asked, "train.steps=20", inputs=inputs)
    logged = train_here(moved)
    lines = [
        json.loads(x) for x in (moved.folder / "texts_win_rate.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 5
    scorer = AnswerScorer(verifier.folder)
    shares = []
    for line in lines:
        own, first = (scorer.score(line["prompt"], [line[k]])[0].end for k in ("answer", "start"))
        assert line["scores"] == pytest.approx([own, first], rel=1e-4)
        shares.append(0.5 if line["answer"] == line["start"] else float(own > first))
    assert logged["win_rate/wins"] == [pytest.approx(sum(shares) / 5)]
    assert any(line["answer"] != line["start"] for line in lines)

    with pytest.raises(ConfigError, match="the input 'verifier', and the run has: none"):
        train_here(_cell(tmp_path, pairs, *asked, "train.steps=2"))
    alone = compose_tiny(
        tmp_path, tmp_path / "text.txt", *asked[1:], "eval.also.win_rate.scorer=null"
    )
    with pytest.raises(ConfigError, match=r"judges no answers; add .*scorer=verifier"):
        make_cells([("", alone)])
