"""Texts of several adapters on one model: those of one adapter advance together.

A step is then as many forward passes as adapters are in use; the weights of the base are there
once. What has been read of a prompt is shared among texts of one adapter only.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.adapter_choice import AdapterChoice, put_adapters
from runner.data.tokenizers import Tokenizer
from runner.generate.autoregressive import Autoregressive
from runner.generate.request import Event, Request
from runner.generate.text_row import TextRow
from runner.machine.errors import ConfigError
from runner.records.trained_model import load_model


def refuse_beside_adapters(
    names: Iterable[str], asked: Mapping[str, bool], folder: Path, own_way: bool
) -> None:
    """Refuse what does not go with adapters that requests choose.

    Args:
        names: of the adapters.
        asked: by option, whether it is given.
        folder: of the run that they are to be put on.
        own_way: whether its model does otherwise than add one token after the other.

    Raises:
        ConfigError: an option is given, or the model goes its own way.
    """
    which = f"--adapter {', '.join(names)}"
    given = [option for option, is_given in asked.items() if is_given]
    if given:
        raise ConfigError(
            f"{which}: texts of adapters are computed in the dtype of the weights, not compiled "
            f"and without a draft; leave {' and '.join(given)} out, or serve each adapter's run "
            "alone"
        )
    if own_way:
        raise ConfigError(
            f"{which}: adapters are chosen on models that add one token after the other, which "
            f"that of {folder.name} does not; serve each adapter's run alone"
        )


def load_adapters(
    model: Any, tokenizer: Tokenizer, runs: Mapping[str, Path], *, average: bool = False
) -> AdapterChoice:
    """Put the adapters of runs on the model that is their base, in place.

    Args:
        runs: by the name of an adapter the folder of its run.
        average: take their averaged weights.

    Raises:
        ConfigError: a run has no adapter, another base, one in few bits, or another tokenizer.
    """
    adapted = {}
    for name, folder in runs.items():
        other, theirs, _ = load_model(folder, average=average)
        if theirs.dumps() != tokenizer.dumps():
            raise ConfigError(
                f"--adapter {name} has another tokenizer or chat template than the model it is to "
                f"be put on; serve its run alone: {folder}"
            )
        adapted[name] = other
    weight = next(model.parameters())
    try:
        return put_adapters(
            model, {n: m.to(weight.device, weight.dtype) for n, m in adapted.items()}
        )
    except ValueError as error:
        raise ConfigError(f"--adapter: {error}") from None


class ByAdapter:
    """See `runner.generate.engine.Strategy`.

    Args:
        plain: how texts go on.
        choice: of the model that `plain` computes with.
    """

    def __init__(self, plain: Autoregressive, choice: AdapterChoice) -> None:
        self.plain, self.choice, self.context = plain, choice, plain.context

    def check(self, request: Request) -> None:
        """See `Strategy`."""
        if request.adapter is not None and request.adapter not in self.choice.names:
            raise ValueError(
                f"adapter={request.adapter!r} is none of: {', '.join(self.choice.names)}"
            )
        self.plain.check(request)

    def admit(self, request: Request) -> TextRow:
        """See `Strategy`."""
        own = f"{request.adapter or ''}\0{request.salt}"
        return self.plain.admit(replace(request, salt=own))

    def read(self, rows: Sequence[TextRow], most: int | None) -> list[Event]:
        """See `Strategy`."""
        groups = list(self._groups(rows).items())[: None if most is None else 1]
        events: list[Event] = []
        for name, group in groups:
            with self.choice.of(name):
                events += self.plain.read(group, most)
        return events

    def advance(self, rows: Sequence[TextRow]) -> list[Event]:
        """See `Strategy`."""
        events: list[Event] = []
        for name, group in self._groups(rows).items():
            with self.choice.of(name):
                events += self.plain.advance(group)
        return events

    def leave(self, row: TextRow) -> None:
        """See `Strategy`."""
        self.plain.leave(row)

    def resume(self, row: TextRow, ids: Sequence[int]) -> Event:
        """See `Strategy`."""
        return self.plain.resume(row, ids)

    def release(self, row: TextRow) -> None:
        """See `Strategy`."""
        self.plain.release(row)

    def num_bytes(self) -> int:
        """See `Strategy`."""
        return self.plain.num_bytes()

    @staticmethod
    def _groups(rows: Sequence[TextRow]) -> dict[str | None, list[TextRow]]:
        groups: dict[str | None, list[TextRow]] = {}
        for row in rows:
            groups.setdefault(row.request.adapter, []).append(row)
        return groups
