"""The script of a job array: setup lines, the pool of its task, what follows its end."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runner.launch.slurm_limit import Array
from runner.records.slurm_queue import SETUP_FAILED

if TYPE_CHECKING:
    from runner.grid.resources import ResourcesConfig  # torch: seconds
    from runner.launch.slurm import SlurmConfig

# The first line that fails ends the job; a trap of the user's own takes the place of this one.
_SETUP = f"""\
trap 'code=$?; [ "$SET_UP" ] || echo "{SETUP_FAILED} with exit code $code: $BASH_COMMAND" >&2' EXIT
set -e"""
# If a signal ended the step (KILL, or TERM or USR2 before Python could handle it), its own process
# cannot requeue the task: the shell does. A cancelled job is no longer RUNNING and is not requeued.
_TEARDOWN = """\
code=$?
case $code in 137|140|143)
  [ "$(squeue -h -j "$TASK" -o %T)" = RUNNING ] && scontrol requeue "$TASK" && sleep 300 ;;
esac
exit $code"""

# What a caller inside a job has of its own would be taken for this job's: its memory beside ours is
# "mutually exclusive" to srun, its ranks become the worker's.
_OF_ANOTHER_JOB = ("SLURM_", "SBATCH_", "SRUN_", "PMI_", "PMIX_")
_OF_ANOTHER_RUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ESPALIER_LAUNCHED")


def submission_environment() -> dict[str, str]:
    """Return the environment for sbatch, and so for the job: without that of the caller's own job.

    SLURM_CONF stays: it says which cluster.
    """
    return {
        key: value
        for key, value in os.environ.items()
        if key.startswith("SLURM_CONF")
        or not (key.startswith(_OF_ANOTHER_JOB) or key in _OF_ANOTHER_RUN)
    }


def sbatch_script(
    listing: Path,
    code: Path,
    need: "ResourcesConfig",
    cfg: "SlurmConfig",
    name: str,
    array: Array,
) -> str:
    """Return the text of one array's script.

    Args:
        listing: the file with a line for each task.
        code: the snapshot that the tasks run.
    """
    # submitit has no public name for this.
    from submitit.slurm.slurm import _make_sbatch_string  # noqa: PLC0415

    cores, mem_gb = need.cpus * cfg.at_once, need.mem_gb
    setup = [
        *_SETUP.splitlines(),
        *cfg.setup,
        'TASK="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
        f'export PYTHONPATH="{code}${{PYTHONPATH:+:$PYTHONPATH}}"',
        f'cd "{code}"',
        "SET_UP=1",
        "set +e",
        "trap '' TERM  # the pool hears it; this shell waits for its exit code",
    ]
    srun = ["srun", "--nodes=1", "--ntasks=1", f"--cpus-per-task={cores}", "--unbuffered"]
    pool = [sys.executable, "-m", "runner.launch.slurm_job"]
    pool += [f'"{listing}"', f"--at-once={cfg.at_once}"]
    options: dict[str, str | None] = {"mail-user": cfg.mail_user, "mail-type": cfg.mail_type}
    if array.after:  # afterany: a task reads the outcome of its inputs from their journals
        options["dependency"] = f"afterany:{':'.join(array.after)}"
    further = {key: value for key, value in options.items() if value} | (cfg.sbatch or {})
    text: str = _make_sbatch_string(
        command=" ".join([*srun, *cfg.srun, *pool]),
        folder=listing.parent,
        job_name=name,
        time=need.timeout_min,
        nodes=need.nodes,
        ntasks_per_node=need.per_node if need.num_processes > 1 else None,
        cpus_per_task=max(1, cores // need.per_node),
        mem=None if mem_gb is None else f"{round(mem_gb * cfg.at_once * 1024)}M",
        gpus_per_node=need.gpus or None,
        gres=cfg.gres,
        partition=cfg.partition,
        account=cfg.account,
        qos=cfg.qos,
        constraint=cfg.constraint,
        exclude=cfg.exclude,
        signal_delay_s=cfg.warning_s,
        map_count=array.tasks,
        array_parallelism=array.at_once,
        stderr_to_stdout=True,
        use_srun=False,
        setup=setup,
        teardown=_TEARDOWN.splitlines(),
        additional_parameters=further or None,
        wckey="",
    )
    # submitit writes no flags without a value, and always writes wckey.
    return text.replace("#SBATCH --wckey=''", "#SBATCH --requeue")
