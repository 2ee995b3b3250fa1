"""Solutions drawn from a model and judged: what they hold; an interruption changes none."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.config import plain
from runner.data.answer_parsers import MarkedNumber
from runner.data.problems_config import ProblemFile, ProblemsConfig
from runner.data.tokenizers_config import TokenizerConfig
from runner.learn.trainer import Trainer
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.machine.storage import read_lines
from runner.records import journal, metrics
from runner.records.cells import Cell, freeze_cell, make_cells
from runner.work import sample as sampling
from runner.work.config import SampleWork

WORK = SampleWork(problems=20, samples=5, pairs=2, max_new_tokens=4, parser=MarkedNumber(mark="#"))


def _cell(compose: Callable[..., dict[str, Any]], data: ProblemsConfig, *more: str) -> Cell:
    node = compose("train.steps=25", "optim.lr=1e-2", "eval.every=25", *more)
    node["data"] = plain(data, target=True)
    if any(override.startswith("inputs") for override in more):
        node["work"] = plain(WORK, target=True)
    (cell,) = make_cells([("", node)])
    freeze_cell(cell)
    return cell


@pytest.fixture
def data(tmp_path: Path) -> ProblemsConfig:
    """Problems that a new model answers by a guess between two."""
    rows = [{"prompt": f"{i}:", "solution": f"#{i % 7 // 4}"} for i in range(100, 300)]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return ProblemsConfig(sources=(ProblemFile(path=str(file)),), val_fraction=0.2)


def _sampled(cell: Cell, start: Cell, stops: list[int | None]) -> list[str]:
    """Run the work, interrupted after so many looks at `stop`; return how each attempt ended."""
    outcomes = []
    for after in stops:
        attempt = journal.claim(cell.folder)
        assert attempt is not None
        writer, looks = journal.Journal(cell.folder, attempt), iter(range(100))
        work: SampleWork = cell.config.work
        stop = (lambda: False) if after is None else (lambda: next(looks) >= after)  # noqa: B023
        inputs = {"init": (start.folder,)}
        outcomes.append(work.run(cell, inputs, writer, Ranks("cpu"), stop))
        writer.event(outcomes[-1])
        writer.close()
    return outcomes


def test_solutions_are_judged_paired_and_the_same_after_an_interruption(
    compose: Callable[..., dict[str, Any]],
    data: ProblemsConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "_BATCH_SIZE", 8)
    start = _cell(compose, data)
    attempt = journal.claim(start.folder)
    assert attempt is not None
    writer = journal.Journal(start.folder, attempt)
    assert Trainer(start, {}, writer, Ranks("cpu")).fit(lambda: False) == "finished"
    tokenizer = TokenizerConfig(kind="bytes").build(())
    (start.folder / "tokenizer.json").write_text(tokenizer.dumps())

    source = f"inputs.init.runs=[{start.fingerprint}]"
    whole, broken = (_cell(compose, data, source, f"root={tmp_path / n}") for n in ("w", "b"))
    assert _sampled(whole, start, [None]) == ["finished"]
    assert _sampled(broken, start, [1]) == ["interrupted"]
    partial = broken.folder / "outputs/.samples.jsonl"
    partial.write_bytes(partial.read_bytes()[:-300])  # killed within a line of a batch
    assert _sampled(broken, start, [1, None]) == ["interrupted", "finished"]
    for name in ("samples.jsonl", "pairs.jsonl"):
        files = [cell.folder / "outputs" / name for cell in (whole, broken)]
        assert files[0].read_bytes() == files[1].read_bytes()

    rows = read_lines(whole.folder / "outputs/samples.jsonl")
    assert len(rows) == 20 * 5
    for row in rows:
        right = f"#{int(row['prompt'][:-1]) % 7 // 4}"
        assert row["label"] == (WORK.parser.parse(row["answer"]) == right[1:])
    share = sum(row["label"] for row in rows) / len(rows)
    assert 0.05 < share < 0.95
    logged = metrics.read(whole.folder)[-1]
    pairs = read_lines(whole.folder / "outputs/pairs.jsonl")
    assert (logged["accuracy"], logged["pairs"]) == (pytest.approx(share), len(pairs))
    labels = {(row["prompt"], row["answer"]): row["label"] for row in rows}
    for pair in pairs:
        assert labels[pair["prompt"], pair["chosen"]]
        assert not labels[pair["prompt"], pair["rejected"]]
    prompts = [pair["prompt"] for pair in pairs]
    assert all(prompts.count(prompt) <= 2 for prompt in prompts)
    both = {p for p, _ in labels} & {p for (p, _), right in labels.items() if right}
    assert set(prompts) <= both
    _refuse_what_cannot_be_sampled(whole, start, writer)
    writer.close()


def _refuse_what_cannot_be_sampled(whole: Cell, start: Cell, writer: journal.Journal) -> None:
    work: SampleWork = whole.config.work
    with pytest.raises(ConfigError, match=r"needs an input named init"):
        work.run(whole, {}, writer, Ranks("cpu"), lambda: False)
    with pytest.raises(
        ConfigError, match=r"line 1: the solution '#.' has no answer .* work.parser"
    ):
        replace(work, parser=None).run(
            whole, {"init": (start.folder,)}, writer, Ranks("cpu"), lambda: False
        )
    for field, value in (("samples", 0), ("temperature", 0.0), ("pairs", 0)):
        with pytest.raises(ValueError, match=f"{field}="):
            replace(work, **{field: value})
