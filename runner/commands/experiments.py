"""The folder of an experiment and its grids: sweep.yaml, and others beside it, as quick.yaml."""

from pathlib import Path

from runner.machine.errors import ConfigError
from runner.machine.own_modules import module_command

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def experiment_folder(name: str) -> Path:
    """Return the folder of an experiment, given by name or by path, or by its sweep.yaml.

    Sweeps of its other grids are named after both: diffusion_bound_quick is of diffusion_bound.
    """
    return _folder_and_grid(name)[0]


def sweep_command(experiment: str, grid: str | None, *overrides: str) -> list[str]:
    """Return the command line that composes a grid of an experiment.

    Args:
        grid: NAME of NAME.yaml in the folder (None: that which `experiment` is named after, or
            sweep).

    Raises:
        ConfigError: there is no such experiment, or it has no such grid.
    """
    folder, named = _folder_and_grid(experiment)
    grid = grid or named
    if not (folder / "sweep.yaml").exists():
        if Path("sweeps", experiment, "cells.jsonl").exists():
            raise ConfigError(
                f"{experiment} is a sweep of the command line, which has no sweep.yaml: its own "
                f"command with hydra.sweeper.dry_run=true plans it, `espalier status {experiment}` "
                "shows its cells"
            )
        known = sorted(p.parent.name for p in EXPERIMENTS.glob("*/sweep.yaml"))
        raise ConfigError(f"{folder}/sweep.yaml does not exist; there are: {', '.join(known)}")
    if not (folder / f"{grid}.yaml").exists():
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        raise ConfigError(f"{folder} has no grid {grid}; there are: {', '.join(known)}")
    return module_command("runner", "-m", "-cd", str(folder), "-cn", grid, *overrides)


def _folder_and_grid(name: str) -> tuple[Path, str]:
    given, grid = Path(name), "sweep"
    if given.name == "sweep.yaml":
        given = given.parent
    named = EXPERIMENTS / given
    first, _, last = given.name.rpartition("_")
    if not named.exists() and first and (EXPERIMENTS / first / f"{last}.yaml").exists():
        named, grid = EXPERIMENTS / first, last
    return (given.resolve(), "sweep") if (given / "sweep.yaml").exists() else (named, grid)
