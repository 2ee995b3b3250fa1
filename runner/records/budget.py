"""The sizes of a run, known before it starts; the plan and analysis read them, none recounts."""

from dataclasses import dataclass, fields
from pathlib import Path

from models import sizes
from runner.machine.errors import ConfigError, DataError
from runner.machine.typed_json import read_record
from runner.records.config import RunConfig
from runner.records.contracts import check


@dataclass(frozen=True)
class Budget:
    """The sizes of a run, as in summary.json.

    `tokens` and `flops` are those of all steps; `flops` counts the full attention matrix.
    """

    steps: int
    vocab_size: int
    num_parameters: int
    num_active_parameters: int
    num_embedding_parameters: int
    tokens: int
    flops: int


def read_budget(file: Path) -> Budget:
    """Return the sizes in a summary.json.

    Raises:
        DataError: it is damaged.
    """
    sizes = read_record(file, dict[str, int])
    names = [field.name for field in fields(Budget)]
    missing = [name for name in names if name not in sizes]
    if missing:
        raise DataError(f"{file} has no {missing[0]!r}; remove it: the run writes it again")
    return Budget(**{name: sizes[name] for name in names})


def check_steps(run: RunConfig, steps: int) -> None:
    """Check that what is planned over the steps of a run that trains fits into `steps` of them.

    That is the schedule of the learning rate, the switch of the precision and the weight average.

    Raises:
        ConfigError: something does not fit; the message names its keys.
    """
    planned = (
        ("schedule", run.schedule),
        ("precision", run.precision),
        ("train.average", run.train.average),
    )
    for path, cfg in planned if steps else ():
        try:
            check(cfg, steps)
        except ValueError as error:
            raise ConfigError(f"{path}.{error}") from None


def flops_per_sequence(run: RunConfig, vocab_size: int) -> tuple[int, int]:
    """Return the FLOPs of training on one sequence: (full attention, its causal half).

    Raises:
        ConfigError: the model's config has no formula for them and they cannot be counted.
    """
    try:
        return sizes.training_flops_per_sequence(run.model, vocab_size, run.train.sequence_length)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def sequences_per_step(run: RunConfig) -> int:
    """Return the number of sequences that a step trains on.

    A sample of data may hold several, and a task may make several of one.
    """
    batch = int(run.train.batch_size)
    for part in (run.data, run.task):
        batch *= int(getattr(part, "sequences_per_sample", 1))
    return batch


def budget(run: RunConfig, vocab_size: int, *, steps: int | None = None) -> Budget:
    """Return the sizes of `run` with a tokenizer of `vocab_size` ids.

    `steps` replaces the number of steps that the run's budget amounts to.
    """
    batch, flops = sequences_per_step(run), flops_per_sequence(run, vocab_size)[0]
    parameters = sizes.num_parameters(run.model, vocab_size)
    active = sizes.num_active_parameters(run.model, vocab_size)
    if steps is None:
        steps = run.train.num_steps(active, flops, batch)
    return Budget(
        steps=steps,
        vocab_size=vocab_size,
        num_parameters=parameters,
        num_active_parameters=active,
        num_embedding_parameters=sizes.num_embedding_parameters(run.model, vocab_size),
        tokens=steps * batch * run.train.sequence_length,
        flops=steps * batch * flops,
    )
