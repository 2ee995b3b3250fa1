"""The cost of a run's records: metric lines, the upload to MLflow, a checkpoint per 5 minutes.

    python -m tests.bench.overhead

One run of 10M parameters through the trainer, whose recording is timed: lines every 10 steps, a
checkpoint of weights and optimiser, and the CPU time of the process that uploads to MLflow, the
latter two spread over five minutes of training.
"""

import os
import resource
import tempfile
import time

from hydra import compose, initialize_config_module

from runner.commands.composer import open_keys, to_plain
from runner.commands.hydra_plugin import register
from runner.launch.mlflow_process import finish_uploader, start_uploader
from runner.records import journal
from runner.records.cells import freeze_cell, join_sweep, make_cells

SETTING = [
    "model=gpt_10m",
    "data=stdlib",
    "train.steps=60",
    "train.sequence_length=256",
    "train.batch_size=8",
    "eval.every=1000000",
    "eval.tokens=2048",
    "eval.sample_tokens=0",
    "train.checkpoint.keep_best=false",
    "precision=bf16",
]
CHECKPOINT_EVERY_S = 300


def main() -> None:
    """Train once and print the shares of the training time."""
    register()
    with initialize_config_module("conf", version_base="1.3"):
        root = f"root={tempfile.mkdtemp()}"
        node = to_plain(compose("config", open_keys([*SETTING, root])))
    (cell,) = make_cells([("", node)])
    freeze_cell(cell)
    join_sweep(cell.config.name, [cell])
    from runner.learn.trainer import Trainer
    from runner.machine.ranks import Ranks

    attempt = journal.claim(cell.folder)
    assert attempt is not None
    uploader = start_uploader(cell.config)
    trainer = Trainer(cell, cell.inputs, journal.Journal(cell.folder, attempt), Ranks("cpu"))
    spent = {"_log": 0.0, "_save": 0.0}

    def timed(name: str) -> None:
        inner = getattr(trainer, name)

        def call(*arguments: object) -> None:
            start = time.perf_counter()
            inner(*arguments)
            spent[name] += time.perf_counter() - start

        setattr(trainer, name, call)

    timed("_log")
    timed("_save")
    start = time.perf_counter()
    trainer.fit(lambda: False)
    total = time.perf_counter() - start
    assert not finish_uploader(uploader)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    uploader_s = used.ru_utime + used.ru_stime
    training = total - sum(spent.values())
    cores = len(os.sched_getaffinity(0))
    rows = {
        "metric lines, every 10 steps": spent["_log"] / training,
        f"a checkpoint ({spent['_save']:.2f} s) per 5 min": spent["_save"] / CHECKPOINT_EVERY_S,
        f"MLflow uploader ({uploader_s:.1f} CPU s, {cores} cores) per 5 min": uploader_s
        / cores
        / CHECKPOINT_EVERY_S,
    }
    for name, share in rows.items():
        print(f"{name:55s} {share:7.3%}")
    print(f"{'all':55s} {sum(rows.values()):7.3%}")


if __name__ == "__main__":
    main()
