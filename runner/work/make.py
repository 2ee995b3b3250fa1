"""Documents that a trained model writes: data for another run."""

from collections.abc import Callable

from runner.generate.sampling import Sampling
from runner.generate.text_generator import TextGenerator
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.machine.storage import append_line, read_lines
from runner.records.cells import Cell
from runner.records.contracts import Inputs, Outcome
from runner.records.journal import Journal
from runner.work.config import MakeWork
from runner.work.notes import note_environment
from runner.work.outputs import note_output

_AT_ONCE = 16


def make(
    cfg: MakeWork,
    cell: Cell,
    inputs: Inputs,
    journal: Journal | None,
    ranks: Ranks,
    stop: Callable[[], bool],
) -> Outcome:
    """Write outputs/documents.jsonl, {"text": ...} a line; document i depends on (seed, i) alone.

    Raises:
        ConfigError: there is no input named init.
    """
    if journal is None:  # one process writes; the others have nothing to do
        return "finished"
    if "init" not in inputs:
        raise ConfigError(
            "work=make needs an input named init, the run whose model writes; set inputs.init.runs=[...]"
        )
    note_environment(journal, cell, ranks)
    generator = TextGenerator(
        inputs["init"][0], average=cell.config.inputs["init"].take == "average"
    )
    file = cell.folder / "outputs" / "documents.jsonl"
    partial = file.with_name(f".{file.name}")
    file.parent.mkdir(exist_ok=True)
    done = len(read_lines(partial))
    while done < cfg.documents:
        if stop():
            return "interrupted"
        for text in _some(generator, cfg, cell.config.seed, done):
            append_line(partial, {"text": text})
            done += 1
        journal.metrics(done, {"documents": done})
    partial.rename(file)
    note_output(file, journal)
    return "finished"


def _some(generator: TextGenerator, cfg: MakeWork, seed: int, first: int) -> list[str]:
    """Return the documents from number `first` on, as many as are written at once."""
    numbers = range(first, min(first + _AT_ONCE, cfg.documents))
    how = [
        Sampling(
            max_new_tokens=cfg.tokens, temperature=cfg.temperature, seed=seed * 1_000_003 + number
        )
        for number in numbers
    ]
    return [done.text for done in generator.generate([cfg.prompt] * len(how), how)]
