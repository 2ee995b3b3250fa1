"""`python -m runner [overrides]` runs one cell; with `-m` it runs a grid of cells."""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from runner.commands.choices import choices_of
from runner.commands.hydra_plugin import chosen_names, open_keys, register, to_plain
from runner.machine.errors import EspalierError
from runner.machine.system_errors import system_error
from runner.records.cells import freeze_cell, join_sweep, make_cells

# Telemetry of the libraries beneath is off unless the user turns it on.
for _name in ("MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "true")


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
def run_one(composed: DictConfig) -> None:
    """Freeze one cell and run it in this process."""
    node, overrides = to_plain(composed), list(HydraConfig.get().overrides.task)
    choices = choices_of(node, overrides, chosen_names(composed))
    (cell,) = make_cells([("", node)], [choices])
    freeze_cell(cell)
    join_sweep(cell.config.name, [cell])
    from runner.launch.single import run_here  # noqa: PLC0415

    code = run_here(cell)
    if code:
        raise SystemExit(code)


def main() -> None:
    """Run Hydra; a user's error exits with its message, without a traceback."""
    register()
    sys.argv[1:] = open_keys(sys.argv[1:])
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        run_one()
    except (EspalierError, hydra.errors.HydraException) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {system_error(error)}")


if __name__ == "__main__":
    main()
