"""Documents that a trained model writes: data for another run."""

from collections.abc import Callable

from runner.generate.sampling import Sampling
from runner.generate.text_generator import TextGenerator
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.machine.storage import append_line, read_lines, truncate_torn_line
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
    truncate_torn_line(partial)
    done = len(read_lines(partial))
    if journal.number > 1:
        journal.restored(done)
    while done < cfg.documents:
        if stop():
            journal.event("checkpointed", step=done)
            return "interrupted"
        # Whole rounds, also where one was cut short: who is sampled beside whom changes last bits.
        for text in _round(generator, cfg, cell.config.seed, done // _AT_ONCE)[done % _AT_ONCE :]:
            append_line(partial, {"text": text})
            done += 1
        journal.metrics(done, {"documents": done})
    partial.rename(file)
    note_output(file, journal)
    return "finished"


def _round(generator: TextGenerator, cfg: MakeWork, seed: int, number: int) -> list[str]:
    """Return the documents of round `number`: as many as are written at once."""
    first = number * _AT_ONCE
    numbers = range(first, min(first + _AT_ONCE, cfg.documents))
    how = [
        Sampling(
            max_new_tokens=cfg.tokens, temperature=cfg.temperature, seed=seed * 1_000_003 + number
        )
        for number in numbers
    ]
    # Of some prompts a tokenizer makes nothing: then a document begins.
    prompt = cfg.prompt if len(generator.tokenizer.encode(cfg.prompt)) else None
    return [done.text for done in generator.generate([prompt] * len(how), how)]
