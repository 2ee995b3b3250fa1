"""Whole sweeps, ours against Hydra's launchers: local, SLURM, and submitting 1,000 cells.

    pip install --no-deps --target PEERS hydra-submitit-launcher hydra-joblib-launcher
    make slurm-up; python -m tests.bench.sweep PEERS [50 200]

Every command is timed from its start to its end, interpreter included. A peer's job imports torch
and adds two numbers; ours trains and saves a model of one step and keeps its records, without
MLflow. Two cells run at a time everywhere (submitit_local has no limit). Submitting: until squeue
shows all tasks.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.launch import TINY
from tests.slurm import cluster

_APP = """\
import hydra
from omegaconf import DictConfig

@hydra.main(version_base="1.3", config_path=None)
def main(cfg: DictConfig) -> None:
    import torch
    torch.ones(2).sum()

if __name__ == "__main__":
    main()
"""
_MAP = """\
import sys, submitit

def job(seed):
    import torch
    return float(torch.ones(2).sum())

if __name__ == "__main__":
    executor = submitit.SlurmExecutor(folder=sys.argv[2])
    executor.update_parameters(time=10, array_parallelism=2)
    for handle in executor.map_array(job, range(int(sys.argv[1]))):
        handle.result()
"""


def main(peers: Path, counts: list[int]) -> None:
    """Run everything once and print the tables."""
    folder = Path(tempfile.mkdtemp())
    (folder / "app.py").write_text(_APP)
    (folder / "map.py").write_text(_MAP)
    (folder / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(500)))
    os.environ |= {"OMP_NUM_THREADS": "1", "SLURM_CONF": str(cluster.HOME / "slurm.conf")}
    cluster.up()
    for count in counts:
        commands = _commands(folder, count)
        base = {
            where: _seconds(commands[f"ours, {where}"], peers, folder)
            for where in ("local", "slurm")
        }
        print(f"{count} cells{'':23s} {'s':>8s} {'ms/cell':>8s} {'relative':>9s}")
        for name, command in commands.items():
            where = "slurm" if "slurm" in name else "local"
            wall = base[where] if "ours" in name else _seconds(command, peers, folder)
            print(
                f"{name:32s} {wall:8.1f} {wall / count * 1000:8.0f} {wall / base[where]:8.1f}x",
                flush=True,
            )
    print(f"\nsubmitting 1000 cells{'':11s} {'s':>8s}")
    for name, command in _submissions(folder, 1000).items():
        print(f"{name:32s} {_until_queued(command, peers, folder, 1000):8.1f}", flush=True)


def _ours(folder: Path, name: str) -> list[str]:
    base = [sys.executable, "-m", "runner", "-m", *TINY, f"data.sources.0.path={folder}/text.txt"]
    return [*base, f"root={folder}/{name}", f"name={name}", "train.threads=1"]


def _hydra(folder: Path, count: int, launcher: str, *more: str) -> list[str]:
    app = [sys.executable, str(folder / "app.py"), "-m", f"hydra/launcher={launcher}", *more]
    return [*app, f"+seed=range({count})", f"hydra.sweep.dir={folder}/{launcher}{count}"]


def _commands(folder: Path, count: int) -> dict[str, list[str]]:
    ours, seeds = _ours(folder, f"n{count}"), f"seed=range({count})"
    slurm = [
        "hydra/launcher=slurm",
        "hydra.launcher.max_running=2",
        f"hydra.launcher.cells_per_job={count // 2}",
    ]
    array = ["hydra.launcher.array_parallelism=2", "hydra.launcher.timeout_min=10"]
    return {
        "ours, local": [*ours, seeds, "hydra.launcher.jobs=2"],
        "hydra basic, local": _hydra(folder, count, "basic"),
        "hydra joblib, local": _hydra(folder, count, "joblib", "hydra.launcher.n_jobs=2"),
        "hydra submitit_local": _hydra(folder, count, "submitit_local"),
        "ours, slurm": [*_ours(folder, f"s{count}"), seeds, *slurm],
        "hydra submitit_slurm": _hydra(folder, count, "submitit_slurm", *array),
        "submitit map_array, slurm": [
            sys.executable,
            str(folder / "map.py"),
            str(count),
            str(folder / f"map{count}"),
        ],
    }


def _submissions(folder: Path, count: int) -> dict[str, list[str]]:
    ours = [*_ours(folder, "later"), f"seed=range({count})", "hydra/launcher=slurm"]
    begin = "++hydra.launcher.{}.begin=now+1hour"
    return {
        "ours": [*ours, begin.format("sbatch"), "hydra.launcher.wait=false"],
        "hydra submitit_slurm": _hydra(
            folder, count, "submitit_slurm", begin.format("additional_parameters")
        ),
    }


def _environment(peers: Path) -> dict[str, str]:
    clone = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": f"{clone}:{peers}"}


def _seconds(command: list[str], peers: Path, folder: Path) -> float:
    start = time.perf_counter()
    with open(folder / "out.txt", "w") as out:
        subprocess.run(
            command, cwd=folder, env=_environment(peers), stdout=out, stderr=out, check=True
        )
    return time.perf_counter() - start


def _until_queued(command: list[str], peers: Path, folder: Path, count: int) -> float:
    start = time.perf_counter()
    with open(folder / "out.txt", "w") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=_environment(peers), stdout=out, stderr=out
        )
    while True:
        queue = ["squeue", "-h", "-r", "-o", "%i"]
        if (
            len(subprocess.run(queue, capture_output=True, text=True, check=True).stdout.split())
            >= count
        ):
            break
        if process.poll() not in (None, 0):
            raise RuntimeError((folder / "out.txt").read_text())
        time.sleep(0.05)
    wall = time.perf_counter() - start
    process.kill()
    process.wait()
    subprocess.run(["scancel", "--user=root"], check=True)
    time.sleep(5)
    return wall


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), [int(n) for n in sys.argv[2:]] or [50, 200])
