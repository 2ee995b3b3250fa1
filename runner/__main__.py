"""`python -m runner [overrides]` runs one cell; with `-m` it runs a grid of cells."""

import gc
import os
import sys
from dataclasses import replace

from runner.machine.interrupt import answer_at_once, leave_to_python

answer_at_once()

# To compose makes many objects and drops few: Python's own 700 would look through all of them for
# garbage again and again, for a tenth of the time to an answer. A run's process gets it back.
_COLLECT_EVERY = gc.get_threshold()
gc.set_threshold(50_000)

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from runner.commands.choices import choices_of
from runner.commands.completion import script_asked_for
from runner.commands.composer import (
    check_overrides,
    chosen_names,
    open_keys,
    refuse_keys_of_grids,
    to_plain,
)
from runner.commands.hydra_plugin import register
from runner.commands.names import label
from runner.commands.refusals import refusals
from runner.records.cells import make_cells

# Telemetry of the libraries beneath is off unless the user turns it on.
for _name in ("MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "true")

_OF_HYDRA = (hydra.errors.HydraException, OmegaConfBaseException)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
def run_one(composed: DictConfig) -> None:
    """Freeze one cell and run it in this process."""
    with refusals(*_OF_HYDRA):  # here already: Hydra prints all overrides above an exception
        node, overrides = to_plain(composed), list(HydraConfig.get().overrides.task)
        choices = choices_of(node, overrides, chosen_names(composed))
        (cell,) = make_cells([("", node)], [choices])
        cell = replace(cell, label=label(overrides, [overrides], node) or cell.label)
        from runner.launch.single import run_here  # noqa: PLC0415

        leave_to_python()
        gc.set_threshold(*_COLLECT_EVERY)
        code = run_here(cell)
    if code:
        raise SystemExit(code)


def main() -> None:
    """Run Hydra; a user's error exits with its message, without a traceback."""
    script = script_asked_for(sys.argv[1:])
    if script is not None:
        print(script, end="")
        return
    register()
    sys.argv = ["python -m runner", *open_keys(sys.argv[1:])]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    if not {"-m", "--multirun"}.isdisjoint(sys.argv):
        # Hydra would compose everything once more for the mode alone, which -m has chosen.
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    with refusals(*_OF_HYDRA):
        check_overrides(sys.argv[1:])
        refuse_keys_of_grids(sys.argv[1:])
        run_one()


if __name__ == "__main__":
    main()
