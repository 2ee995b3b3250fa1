"""Solutions of problems by a trained model, judged: data for verifiers and preferences."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from runner.data.answer_parsers import MarkedNumber
from runner.data.problems import split
from runner.data.problems_config import Problem
from runner.generate.sampling import Sampling
from runner.generate.text_generator import TextGenerator
from runner.generate.tool_pool import InTurn
from runner.generate.tools import tools_for
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records.cells import Cell
from runner.records.contracts import Inputs, Outcome
from runner.records.journal import Journal
from runner.work.config import SampleWork
from runner.work.notes import note_environment
from runner.work.outputs import write_in_batches, write_output

_BATCH_SIZE = 64  # problems that are solved together


def sample(
    cfg: SampleWork,
    cell: Cell,
    inputs: Inputs,
    journal: Journal | None,
    ranks: Ranks,
    stop: Callable[[], bool],
) -> Outcome:
    """Write outputs/samples.jsonl and outputs/pairs.jsonl; sample i depends on (seed, i) alone.

    Raises:
        ConfigError: there is no input named init, or a solution has no answer.
    """
    if journal is None:  # the first rank generates alone
        return "finished"
    if "init" not in inputs:
        raise ConfigError(
            "work=sample needs an input named init, the run whose model solves the problems; "
            "set inputs.init.runs=[...]"
        )
    note_environment(journal, cell, ranks)
    hashes = [source["content"] for source in cell.science["data.sources"]]
    problems = split(cell.config.data, hashes)[cfg.split][: cfg.problems]
    references = [_reference(cfg, problem) for problem in problems]
    generator = TextGenerator(
        inputs["init"][0], average=cell.config.inputs["init"].take == "average"
    )

    def judged(batch: int) -> list[dict[str, Any]]:
        some = slice(batch * _BATCH_SIZE, (batch + 1) * _BATCH_SIZE)
        given = problems[some], references[some], some
        return _judged(generator, cfg, cell.config.seed, *given)

    rows = write_in_batches(
        cell.folder,
        "samples.jsonl",
        journal,
        stop,
        total=len(problems) * cfg.samples,
        size=_BATCH_SIZE * cfg.samples,
        batch=judged,
        measured=lambda rows: {"samples": len(rows), "accuracy": _accuracy(rows)},
    )
    if rows is None:
        return "interrupted"
    pairs = list(_pairs(rows, cfg))
    if not pairs:
        raise ConfigError(
            f"no problem has a right and a wrong sample among {cfg.samples}; raise work.samples, "
            "or take a model that solves some of them"
        )
    text = "".join(f"{json.dumps(pair)}\n" for pair in pairs)
    write_output(cell.folder, "pairs.jsonl", text, journal)
    journal.metrics(len(rows), {"pairs": len(pairs), "accuracy": _accuracy(rows)})
    return "finished"


def _reference(cfg: SampleWork, problem: Problem) -> str:
    parser = cfg.parser or MarkedNumber()
    answer: str | None = parser.parse(problem.solution)
    if answer is None:
        raise ConfigError(
            f"{problem.where}: the solution {problem.solution[:80]!r} has no answer that {parser} "
            "finds; set work.parser to the form of the data"
        )
    return answer


def _judged(
    generator: TextGenerator,
    cfg: SampleWork,
    seed: int,
    problems: Sequence[Problem],
    references: Sequence[str],
    where: slice,
) -> list[dict[str, Any]]:
    """Return the samples of problems, in order, each with whether it is right.

    Args:
        where: their places among all problems.
    """
    prompts, samplings = [], []
    for place, problem in enumerate(problems, start=where.start):
        for number in range(cfg.samples):
            prompts.append(problem.prompt)
            samplings.append(
                Sampling(
                    max_new_tokens=cfg.max_new_tokens,
                    temperature=cfg.temperature,
                    top_k=cfg.top_k,
                    seed=seed,
                    sample=place * cfg.samples + number,
                )
            )
    tools = tools_for(list(cfg.tools.values()), generator.tokenizer) if cfg.tools else None
    done = generator.generate(prompts, samplings, tools=tools, pool=InTurn())
    parser = cfg.parser or MarkedNumber()
    wanted = [reference for reference in references for _ in range(cfg.samples)]
    return [
        {"prompt": prompt, "answer": one.text, "label": parser.parse(one.text) == reference}
        for prompt, one, reference in zip(prompts, done, wanted, strict=True)
    ]


def _accuracy(rows: Sequence[dict[str, Any]]) -> float:
    return float(sum(row["label"] for row in rows) / len(rows))


def _pairs(rows: Sequence[dict[str, Any]], cfg: SampleWork) -> Iterator[dict[str, Any]]:
    """Yield the pairs of each problem; a text stands in one pair at most."""
    for start in range(0, len(rows), cfg.samples):
        own = rows[start : start + cfg.samples]
        texts = [
            list(dict.fromkeys(row["answer"] for row in own if row["label"] is label))
            for label in (True, False)
        ]
        wrong = [text for text in texts[1] if text.strip()]  # an empty answer teaches nothing
        for chosen, rejected in list(zip(texts[0], wrong, strict=False))[: cfg.pairs]:
            yield {"prompt": own[0]["prompt"], "chosen": chosen, "rejected": rejected}
