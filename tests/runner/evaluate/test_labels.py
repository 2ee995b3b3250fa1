"""Texts with the likeliest of two labels, by a model whose opinion of each text is known."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from runner.data.labelled_texts import LabelledFile
from runner.data.problems import prepare
from runner.data.problems_config import ProblemsConfig
from runner.data.tokenizers_config import TokenizerConfig
from runner.evaluate.labels import give_labels, macro_f1
from runner.evaluate.labels_config import LabelsConfig
from runner.machine.errors import ConfigError, DataError

WORDS = (" negative", " positive")


class Critic(nn.Module):
    """Writes " positive" with probability sigmoid(`goods - bads of the last review + bias`)."""

    vocab_size = 257

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.bias, self.read = bias, set()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.full((*tokens.shape, 257), -1e4)
        for row, ids in enumerate(tokens.tolist()):
            text = bytes(i if i < 256 else 0 for i in ids).decode("latin-1").rstrip("\0")
            for place in range(len(text)):
                for char, share in self._following(text[: place + 1]).items():
                    logits[row, place, ord(char)] = math.log(share)
        return logits

    def _following(self, text: str) -> dict[str, float]:
        before, mark, written = text.rpartition("Sentiment:")
        if not mark:
            return {"\1": 1.0}
        self.read.add(before)
        review = before.rpartition("Review: ")[2]
        odds = review.count("good") - review.count("bad") + self.bias
        positive = 1 / (1 + math.exp(-odds))
        shares = dict(zip(WORDS, (1 - positive, positive), strict=True))
        fitting = {
            w[len(written)]: p
            for w, p in shares.items()
            if w[: len(written)] == written and len(w) > len(written)
        }
        same = len(written) == 0
        return {" ": 1.0} if same else dict.fromkeys(fitting, 1.0) if len(written) > 1 else fitting


ROWS = [("good", 1), ("good good", 1), ("good bad bad", 0), ("bad", 0), ("bad bad", 0), ("so", 1)]


def _file(path: Path, rows: list[tuple[str, int]] = ROWS, **given: Any) -> LabelledFile:
    path.write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    return LabelledFile(path=str(path), columns=("sentence", "label"), **given)


def _trained(model: nn.Module, source: LabelledFile, folder: Path | None = None) -> Any:
    corpus = prepare(
        ProblemsConfig(sources=(source,), val_fraction=0.5), TokenizerConfig(kind="bytes")
    )
    train = SimpleNamespace(sequence_length=100)
    cfg = SimpleNamespace(train=train, task=None, model=None, precision=None)
    precision = SimpleNamespace(autocast=nullcontext)
    return SimpleNamespace(
        model=model, corpus=corpus, cfg=cfg, precision=precision, folder=folder, suffix=""
    )


def test_the_likeliest_word_is_the_label_and_medians_mend_a_bias(tmp_path: Path) -> None:
    source = _file(tmp_path / "test.tsv")
    cfg = LabelsConfig(source=source, name="sst")
    values = give_labels(cfg, _trained(Critic(bias=0.5), source, tmp_path))
    assert values["sst/accuracy"] == values["sst/f1"] == 1.0, "so, neither, is taken for positive"
    lines = [json.loads(x) for x in (tmp_path / "answers_sst.jsonl").read_text().splitlines()]
    for (text, label), line in zip(ROWS, lines, strict=True):
        odds = text.count("good") - text.count("bad") + 0.5
        shares = {k: math.exp(v) for k, v in line["log_probabilities"].items()}
        assert shares["positive"] == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-5)
        assert sum(shares.values()) == pytest.approx(1.0)
        assert line["reference"] == WORDS[label].strip()
    biased = give_labels(cfg, _trained(Critic(bias=-2.5), source))
    assert (biased["sst/accuracy"], biased["sst/f1"]) == (0.5, pytest.approx(1 / 3))
    assert biased["sst/accuracy_calibrated"] == biased["sst/f1_calibrated"] == 1.0
    assert biased["sst/accuracy_stderr"] == pytest.approx(math.sqrt(0.3 / 6))
    assert biased["sst/log_loss"] > values["sst/log_loss"]
    few = give_labels(replace(cfg, limit=2), _trained(Critic(), source))
    assert few["sst/accuracy"] == 1.0, "good and bad: evenly spaced"


def test_worked_examples_stand_before_each_text_labels_in_turn(tmp_path: Path) -> None:
    source = _file(tmp_path / "test.tsv", [("good", 1), ("bad", 0)])
    examples = _file(tmp_path / "train.tsv", [("fine", 1), ("poor", 0), ("fair", 1), ("weak", 0)])
    cfg, model = LabelsConfig(source=source, examples=examples, shots=2), Critic()
    assert give_labels(cfg, _trained(model, source))["labels/accuracy"] == 1.0
    asked = {text for text in model.read if text.count("Review: ") == 3}
    before = {text.rpartition("Review: ")[0] for text in asked}
    assert len(asked) == 2
    assert len(before) == 1, "the same before each"
    assert before.pop().count(" negative\n\n") == 1
    with pytest.raises(ConfigError, match=r"train.tsv has 4 worked examples.*shots=6; lower it"):
        give_labels(replace(cfg, shots=6), _trained(model, source))
    with pytest.raises(ConfigError, match=r"line 1 and 4 worked examples are \d+ tokens, and"):
        give_labels(replace(cfg, shots=4), _trained(model, source))
    with pytest.raises(ValueError, match="give both or neither"):
        LabelsConfig(source=source, shots=2)
    assert cfg.content_hash() != replace(cfg, examples=None, shots=0).content_hash()


def test_f1_is_the_mean_over_labels() -> None:
    given, right = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 2])
    # sklearn.metrics.f1_score(right, given, average="macro") of these
    assert macro_f1(given, right, 3) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_bad_lines_are_named_with_a_way_out(tmp_path: Path) -> None:
    file, columns = tmp_path / "bad.tsv", ("sentence", "label")

    def refused(text: str, message: str, **given: Any) -> None:
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            list(LabelledFile(path=str(file), **given).problems())

    refused("good\t1\nbad\t2\n", "line 2: label='2' is none of the labels 0, 1", columns=columns)
    refused("good\t1\nbad\n", "line 2 has 1 columns, not 2", columns=columns)
    refused("\t1\n", "line 1: sentence is empty; mend", columns=columns)
    refused("text\tlabel\ngood\t1\n", "line 2 has no 'sentence'; it has text, label; name")
    refused("sentence\tlabel\n", "holds no text")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"sentence": "good", "label": 1}\n{"sentence": "bad", "label": null}\n')
    named = LabelledFile(path=str(rows), values=("None", "1"))
    with pytest.raises(DataError, match=r"line 2: label=None is none of the labels None, 1"):
        list(named.problems())
    assert next(LabelledFile(path=str(rows)).problems()).solution == " positive"
    with pytest.raises(ValueError, match=r"path='x.txt' must end in .tsv, .jsonl"):
        LabelledFile(path="x.txt")
    with pytest.raises(ValueError, match="a word for each label"):
        LabelledFile(path="x.tsv", values=("0", "1", "2"))
    with pytest.raises(ValueError, match=r"must have \{\} once"):
        LabelledFile(path="x.tsv", form="Review:")
