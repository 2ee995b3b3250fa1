"""The training loop, the same for every model, task and precision.

A step is: micro-batches forward and backward, gradients divided by the task's count over all of
them, clip, schedule, update. All randomness is addressed by (seed, step, sample), so a run that is
killed and resumed computes the same bits.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.philox import NoiseKey
from models.adapter import adapter_names
from models.pretrained import load_weights
from runner.data.order import training_loader
from runner.data.pretrained import pretrained_folder
from runner.evaluate.evaluations import Evaluations
from runner.evaluate.validation import to_device
from runner.exchange.peft import read_adapter
from runner.learn.optim.build import build_optimizers
from runner.learn.profiler import StepProfiler
from runner.learn.setup import Setup, set_up
from runner.machine.errors import CheckpointError, ConfigError, LeaseLost
from runner.machine.ranks import Ranks, gather_full
from runner.records import checkpoint, checkpoint_folder, contracts, metrics
from runner.records.budget import budget, check_steps, flops_per_sequence, sequences_per_step
from runner.records.cells import Cell, load_cell
from runner.records.contracts import Batch, Inputs, Outcome
from runner.records.journal import Journal
from runner.records.trained_model import load_base, refuse_other_adapter


@dataclass
class Progress:
    """The state of a run beside weights and optimiser, saved as JSON.

    Args:
        step: steps taken.
        losses: of the last `diverged_window` steps, in nats.
        best_median: the lowest median of such a window.
        best, best_step: the best value of the task's measure, and its step.
        wall_s: seconds of training.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    best_median: float = math.inf
    best: float | None = None
    best_step: int | None = None
    wall_s: float = 0.0


def read_progress(state: dict[str, Any]) -> Progress:
    """Return the progress from a checkpoint's state.json of any release."""
    fields = dict(state)
    best_val_loss = fields.pop("best_val_loss", math.inf)  # the former name of `best`
    if math.isfinite(best_val_loss):
        fields["best"] = best_val_loss
    return Progress(**fields)


class Trainer:
    """The training of one cell in one of its processes.

    Raises:
        ConfigError, DataError, CheckpointError: the config, the data or a checkpoint cannot be
            used; see `set_up` and `newest_checkpoint`.
    """

    def __init__(self, cell: Cell, inputs: Inputs, journal: Journal | None, ranks: Ranks) -> None:
        cfg, self.cell = cell.config, cell
        self.cfg, self.run, self.inputs = cfg, cell.folder, inputs
        self.journal, self.ranks, self.device = journal, ranks, ranks.device
        self.setup: Setup = set_up(cell, inputs, ranks, journal)
        self.corpus, self.model, self.task = self.setup.corpus, self.setup.model, self.setup.task
        self.precision = self.setup.precision
        vocab = self.corpus.tokenizer.vocab_size
        self.budget = budget(cfg, vocab)
        self.flops_per_sequence, self.flops_per_sequence_causal = flops_per_sequence(cfg, vocab)
        self.steps, self.sequences_per_step = self.budget.steps, sequences_per_step(cfg)
        check_steps(cfg, self.steps)
        self.micro_batch = cfg.train.forward_samples(ranks.world)
        self.optimizers = build_optimizers(cfg.optim, self.model)
        self.average = cfg.train.average.build(self.model)
        self.wrapped = ranks.wrap(self.model)
        # Only training steps are compiled: evaluation and sampling have other shapes.
        self.forward_model = torch.compile(self.wrapped) if cfg.train.compile else self.wrapped
        self.profiler = StepProfiler(journal.attempt) if journal and cfg.train.profile else None
        self.evaluations = Evaluations(cfg.eval)
        self.progress, self._saved_step = Progress(), -1
        self._restore()

    def fit(self, stop: Callable[[], bool]) -> Outcome:
        """Train to the budget; return "finished", "diverged" or "interrupted" (by `stop`)."""
        self._last_save = self._interval_start = time.monotonic()
        self._interval_step, self._wait_s, self._excluded_s = self.progress.step, 0.0, 0.0
        self._logged_wall_s, self._compile_s = self.progress.wall_s, 0.0
        self._evaluate_if_missing()
        batches = self._batches()
        while self.progress.step < self.steps:
            if self.ranks.any(stop()):
                self._save()
                return "interrupted"
            loss, norm = self._step(batches)
            self.progress.step += 1
            self.progress.losses.append(loss)
            if self.average is not None:
                self.average.update(self.progress.step)
            if self.profiler is not None:
                self.profiler.step()
            if self._diverged():
                return "diverged"
            self._after_step(loss, norm)
        if self.profiler is not None:
            self.profiler.stop()
        self._save()
        return "finished"

    def _step(self, batches: Iterator[Batch]) -> tuple[float, float]:
        step = self.progress.step
        micro = self._micro_batches(batches)
        counts = [contracts.count(self.task, batch).double() for batch in micro]
        count = self.ranks.add(reduce(torch.add, counts))
        factor = self.cfg.schedule.factor(step, self.steps)
        self.precision.begin(step, self.steps, seed=self.cfg.seed)
        total = torch.zeros((), device=self.device)
        self._statistics: dict[str, Tensor] = {}
        with self.precision.same_weights(len(micro) > 1):
            for index, batch in enumerate(micro):
                noise = NoiseKey(seed=self.cfg.seed, step=step, samples=batch["index"])
                with self.ranks.sync_if(self.wrapped, index == len(micro) - 1):
                    with self.precision.autocast(noise):
                        # Probing of operands cannot be compiled.
                        model = self.wrapped if self.precision.probing else self.forward_model
                        out = self.task.loss(model, batch, noise)
                    # DDP averages over the ranks; times world is the sum that `count` divides.
                    torch.autograd.backward(
                        out.total * (self.ranks.world / count).to(out.total.dtype)
                    )
                total += (out.nll.sum() if out.reported is None else out.reported).detach()
                for name, value in out.statistics.items():
                    share = value.detach() / len(micro)
                    self._statistics[name] = self._statistics.get(name, 0.0) + share
        norm = gather_full(
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.train.clip or math.inf)
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.precision.after_update()
        # The host waits for the device here, once a step.
        sums = torch.stack((self.ranks.add(total), count, norm.double()))
        nats, targets, grad_norm = sums.tolist()
        return nats / targets, grad_norm

    def _micro_batches(self, batches: Iterator[Batch]) -> Sequence[Batch]:
        """Return the micro-batches of a step on the device, as returned by the task's `draw`."""
        cfg, waited = self.cfg, time.monotonic()
        number = cfg.train.batch_size // self.ranks.world // self.micro_batch
        micro = [next(batches) for _ in range(number)]
        self._wait_s += time.monotonic() - waited
        masked = getattr(cfg.data, "mask_documents", False)
        micro = [to_device(batch, self.device, masked=masked) for batch in micro]
        if not hasattr(self.task, "draw"):
            return micro
        samples = torch.cat([batch["index"] for batch in micro])
        noise = NoiseKey(seed=cfg.seed, step=self.progress.step, samples=samples)
        with torch.no_grad(), self.precision.autocast():
            return contracts.draw(self.task, self.model, micro, noise)

    def _after_step(self, loss: float, norm: float) -> None:
        cfg, step = self.cfg, self.progress.step
        last = step == self.steps
        readings = self.precision.readings()
        if readings:
            self._log(step, readings)
        if step % cfg.train.log_every == 0 or last:
            statistics = self.ranks.mean(self._statistics)
            self._log(step, {"loss": loss, "grad_norm": norm} | statistics | self._rates())
        if self.evaluations.due(step, last=last):
            self._evaluate(step, last=last)
        saving = cfg.train.checkpoint
        due = time.monotonic() - self._last_save >= saving.every_s
        if (saving.every_steps and step % saving.every_steps == 0) or self.ranks.any(due):
            started = time.monotonic()
            self._save()
            self._excluded_s += time.monotonic() - started

    def _rates(self) -> dict[str, float]:
        """Return totals so far, and speeds since the last call.

        The speeds exclude the time of compiling, evaluating and saving.
        """
        step, now = self.progress.step, time.monotonic()
        elapsed = max(1e-9, now - self._interval_start)
        interval_steps = step - self._interval_step
        sequences = step * self.sequences_per_step
        self._logged_wall_s += elapsed
        self.progress.wall_s = self._logged_wall_s
        rates = {
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "tokens": sequences * self.cfg.train.sequence_length,
            "flops": float(sequences * self.flops_per_sequence),
            "flops_causal": float(sequences * self.flops_per_sequence_causal),
            "wall_s": self.progress.wall_s,
            "peak_memory_bytes": self.ranks.peak_memory(),
        }
        if self.cfg.train.compile:
            compiled_s = torch._dynamo.utils.calculate_time_spent()["total_wall_time"]
            self._excluded_s += compiled_s - self._compile_s
            self._compile_s = rates["compile_s"] = compiled_s
        busy = max(1e-9, elapsed - self._excluded_s)
        if interval_steps:
            sequences_per_s = interval_steps * self.sequences_per_step / busy
            rates["data_wait_fraction"] = self._wait_s / busy
            rates["tokens_per_s"] = sequences_per_s * self.cfg.train.sequence_length
            rates["flops_per_s"] = sequences_per_s * self.flops_per_sequence
            peak = self.ranks.peak_flops(self.cfg.precision.compute)
            if peak:
                rates["mfu"] = rates["flops_per_s"] / peak
        self._interval_start, self._interval_step, self._wait_s, self._excluded_s = (
            now,
            step,
            0.0,
            0.0,
        )
        return rates

    def _evaluate(self, step: int, *, last: bool) -> None:
        with nullcontext() if self.journal is None else self.journal.evaluating():
            self._evaluate_now(step, last=last)

    def _evaluate_now(self, step: int, *, last: bool) -> None:
        started = time.monotonic()
        folder = self.run if self.journal is not None else None
        trained = self.setup.trained(step, folder, last=last)
        validates = self.evaluations.validates(step, last=last)
        values = self.evaluations.validate(trained) if validates else {}
        if validates and self.average is not None and self.average.copies:
            with self.average.in_place():
                averaged = self.evaluations.validate(trained)
            values |= {f"{k}_average": v for k, v in averaged.items() if k != "val_tokens"}
        self._note_best(step, values)
        values |= self.evaluations.further(trained)
        eval_s = time.monotonic() - started
        self._excluded_s += eval_s
        self._log(step, values | {"eval_s": eval_s})

    def _evaluate_if_missing(self) -> None:
        """Make the evaluation that an earlier attempt ended in: it had saved its best weights."""
        step = self.progress.step
        last = step == self.steps
        if not step or self._saved_step < 0 or not self.evaluations.due(step, last=last):
            return
        rows = [] if self.journal is None else metrics.read(self.run)
        done = any(row["step"] == step and "eval_s" in row for row in rows)
        if self.ranks.any(self.journal is not None and not done):
            self._evaluate(step, last=last)

    def _note_best(self, step: int, values: dict[str, float]) -> None:
        """Save a checkpoint if the task's measure is the best so far."""
        name, way = contracts.measure(self.task)
        value, best = values.get(name), self.progress.best
        if value is None or not math.isfinite(value):
            return
        if best is None or (value < best if way == "min" else value > best):
            self.progress.best, self.progress.best_step = value, step
            if self.cfg.train.checkpoint.keep_best:
                self._save()

    def _diverged(self) -> bool:
        cfg, losses = self.cfg.train, self.progress.losses
        if not math.isfinite(losses[-1]):
            self._log(self.progress.step, {"loss": losses[-1]})
            return True
        del losses[: -cfg.diverged_window]
        if len(losses) < cfg.diverged_window:
            return False
        median = statistics.median(losses)
        self.progress.best_median = min(self.progress.best_median, median)
        return bool(median > self.progress.best_median + cfg.diverged_nats)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        cfg = self.cfg
        samples = self.corpus.samples(cfg.train.sequence_length, cfg.seed)
        return iter(
            training_loader(
                samples,
                first_step=self.progress.step,
                steps=self.steps,
                batch=cfg.train.batch_size,
                micro=self.micro_batch,
                rank=self.ranks.rank,
                world=self.ranks.world,
                num_workers=getattr(cfg.data, "num_workers", 0),
            )
        )

    def _restore(self) -> None:
        if self.journal is not None:
            checkpoint_folder.delete_unfinished(self.run / "checkpoints")
        newest = checkpoint_folder.newest(self.run / "checkpoints")
        start = self.cfg.inputs.get("init")
        adapted = bool(adapter_names(self.model))
        if adapted:
            self._load_base()
        if newest is not None:
            self._continue_from(newest)
            self._saved_step = self.progress.step
        elif start is not None:
            self._start_from(self.inputs["init"][0], start.take)
        elif self.cfg.init is not None and not adapted:
            load_weights(pretrained_folder(self.cfg.init), self.model, put=checkpoint.like)
        if self.journal is not None and self.journal.number > 1:
            self.journal.restored(self.progress.step)

    def _load_base(self) -> None:
        """Load what is below the adapters, and the adapter of a folder that they start from."""
        adapter, start = self.cfg.model.adapter, self.cfg.inputs.get("init")
        if start is not None:
            refuse_other_adapter(self.cell, load_cell(self.inputs["init"][0]))
        load_base(self.cell, self.model)
        if adapter.start is not None:
            base = str(self.cell.science.get("init", ""))
            read_adapter(Path(adapter.start), self.model, adapter, base)

    def _continue_from(self, saved: Path) -> None:
        self.progress = read_progress(checkpoint.load(saved, self.model, self.optimizers))
        self.precision.load(checkpoint.load_tensors(saved, "precision"))
        if self.average is not None:
            self.average.load(checkpoint.load_average(saved, self.model))

    def _start_from(self, run: Path, take: str) -> None:
        saved = newest_checkpoint(run)
        if take != "everything":
            checkpoint.load_weights(saved, self.model, average=take == "average")
            return
        self._continue_from(saved)
        if self.progress.step >= self.steps:
            raise ConfigError(
                f"train.steps={self.steps} must exceed the {self.progress.step} steps that "
                f"inputs.init.runs=[{run.name}] has behind it"
            )

    def _save(self) -> None:
        if self._saved_step == self.progress.step:
            return
        self._saved_step = self.progress.step
        self._last_save = time.monotonic()
        average = self.average.tensors() if self.average is not None else {}
        more = {"average": average, "precision": self.precision.state()}
        files = checkpoint.gather(self.model, self.optimizers, more, keep=self.journal is not None)
        if self.journal is None:
            return
        if self.journal.superseded():
            raise LeaseLost(f"{self.run} was taken over by another worker; nothing is written")
        folder, keep = self.run / "checkpoints", self.cfg.train.checkpoint
        checkpoint.save(folder, files, asdict(self.progress))
        checkpoint_folder.prune(
            folder,
            keep_last=keep.keep_last,
            keep_every=keep.keep_every,
            best=self.progress.best_step if keep.keep_best else None,
        )
        kinds = sorted({str(t.dtype).removeprefix("torch.") for t in files["model"].values()})
        self.journal.event("checkpointed", step=self.progress.step, model=", ".join(kinds))

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if self.journal is not None:
            self.journal.metrics(step, values)


def newest_checkpoint(run: Path) -> Path:
    """Return the newest checkpoint of a run that is the input named init.

    Raises:
        CheckpointError: the run has no checkpoint.
    """
    saved = checkpoint_folder.newest(run / "checkpoints")
    if saved is None:
        raise CheckpointError(
            f"inputs.init.runs=[{run.name}] has no checkpoint in {run}; run it first"
        )
    return saved
