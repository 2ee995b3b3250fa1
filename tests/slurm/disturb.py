"""Disturb the test cluster: every few seconds preempt, requeue, kill or restart something.

    make slurm-up; python tests/slurm/disturb.py --seconds 600 --seed 0 --log disturbances.csv

The log has a line for each disturbance: seconds since the start, its kind, its victim. The program
ends when the queue is empty.
"""

import argparse
import csv
import os
import random
import subprocess
import time
from pathlib import Path

import cluster

KINDS = ("preempted", "preempted", "requeued", "step killed", "slurmd restarted")


def main() -> None:
    """Disturb until the time is up or no job is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--every", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, required=True)
    given = parser.parse_args()
    os.environ["SLURM_CONF"] = str(cluster.HOME / "slurm.conf")
    draw, start = random.Random(given.seed), time.monotonic()
    with open(given.log, "w", newline="") as stream:
        log = csv.writer(stream)
        log.writerow(["seconds", "disturbance", "victim"])
        while time.monotonic() - start < given.seconds:
            time.sleep(draw.uniform(0.5, 1.5) * given.every)
            tasks = _ask("squeue", "-h", "-r", "-t", "R", "-o", "%i %N").split("\n")
            running = [line.split() for line in tasks if "_" in line]
            if not running and not _ask("squeue", "-h"):
                return
            if not running:
                continue
            task, node = draw.choice(running)
            kind = draw.choice(KINDS)
            _disturb(kind, task, node)
            victim = node if kind in ("preempted", "slurmd restarted") else task
            log.writerow([round(time.monotonic() - start), kind, victim])
            stream.flush()


def _disturb(kind: str, task: str, node: str) -> None:
    if kind == "preempted":  # by a job of higher priority that needs the whole node
        job = ["--partition=high", f"--nodelist={node}", "--cpus-per-task=8", "--time=1"]
        _ask("sbatch", *job, "--output=/dev/null", "--wrap=sleep 2")
    elif kind == "requeued":
        _ask("scontrol", "requeue", task)
    elif kind == "step killed":
        _ask("scancel", "-s", "KILL", f"{task}.0")
    else:
        cluster.stop(f"slurmd-{node}")
        time.sleep(3)
        cluster.restart(f"slurmd-{node}")


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
