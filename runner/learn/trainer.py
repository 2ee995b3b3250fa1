"""The training loop: one function for every model, task and precision.

A step is: micro-batches forward and backward, gradients normalised by the global count of target
tokens, clip, schedule, update. All randomness is addressed by (seed, step, sample), so a run that
is killed and resumed computes the same bits.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from kernels.philox import NoiseKey
from models.language_model import LanguageModel
from models.pretrained import load_weights
from runner.data.order import Corpus, training_loader
from runner.data.pretrained import folder_of
from runner.evaluate.internals import induction
from runner.evaluate.validation import sample_text, validate_details, validate_loss
from runner.learn.profiler import StepProfiler
from runner.machine.errors import CheckpointError, ConfigError, LeaseLost
from runner.machine.ranks import Ranks, whole
from runner.machine.storage import write_whole
from runner.records import checkpoint
from runner.records.budget import budget, flops_per_sequence
from runner.records.cells import Cell
from runner.records.journal import Journal
from runner.records.new_checkpoints import last_evaluated, new_checkpoints


@dataclass
class Progress:
    """All that a resume needs beside weights and optimiser; saved as JSON."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    best_median: float = math.inf
    best_val_loss: float = math.inf
    best_step: int | None = None
    wall_s: float = 0.0


class Trainer:
    """One run of one cell in one process (of possibly several)."""

    def __init__(self, cell: Cell, journal: Journal | None, ranks: Ranks) -> None:
        cfg = cell.config
        self.cfg, self.run, self.journal, self.ranks = cfg, cell.folder, journal, ranks
        hashes = [source["content"] for source in cell.science["data.sources"]]
        cache = Path(cfg.root) / "data_cache"
        self.corpus: Corpus = cfg.data.build(cfg.tokenizer, cache, hashes)
        vocab, seq = self.corpus.tokenizer.vocab_size, cfg.train.sequence_length
        self.device = ranks.device
        cfg.model.check(vocab, seq)
        self.model: LanguageModel = cfg.model.build(vocab, cfg.seed).to(self.device)
        self.model.read_vocabulary(self.corpus.tokenizer.texts)
        self.budget = budget(cfg, vocab)
        self.flops_per_sequence, self.flops_per_sequence_causal = flops_per_sequence(cfg, vocab)
        self.steps = self.budget.steps
        self.precision = cfg.precision.build(self.device)
        self.precision.prepare(self.model)
        cfg.train.check(ranks.world)
        share = cfg.train.batch_size // ranks.world
        self.micro_batch = min(share, cfg.train.micro_batch or share)  # samples of one forward pass
        if cfg.train.activation_checkpointing:
            recompute_blocks(self.model)
        if ranks.world > 1 and cfg.train.parallel == "fsdp":
            ranks.shard(self.model)
        self.optimizers = cfg.optim.build(self.model)
        self.average = cfg.train.average.build(self.model)
        self.wrapped = ranks.wrap(self.model)
        # Only training steps are compiled: evaluation and sampling have other shapes.
        self.forward_model = torch.compile(self.wrapped) if cfg.train.compile else self.wrapped
        self.profiler = StepProfiler(journal.attempt) if journal and cfg.train.profile else None
        self.progress, self._saved_step = Progress(), -1
        self._restore()

    def fit(self, stop: Callable[[], bool]) -> str:
        """Train to the budget; return finished, diverged or interrupted (`stop` came true)."""
        self._last_save = self._mark = time.monotonic()
        self._marked_step, self._wait_s, self._aside_s = self.progress.step, 0.0, 0.0
        self._marked_wall_s, self._compile_s = self.progress.wall_s, 0.0
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
            self._report(loss, norm)
        if self.profiler is not None:
            self.profiler.stop()
        if not self.steps:
            return self._only_evaluate(stop)
        self._save()
        return "finished"

    def _only_evaluate(self, stop: Callable[[], bool]) -> str:
        """Evaluate the upstream run or imported model, or with `follow` each checkpoint as it comes."""
        start, harness = self.cfg.upstream, self.cfg.eval.harness
        if start is None or not harness.follow:
            self._evaluate(0)
            self._ask_benchmarks(0)
            self._save()
            return "finished"
        for saved in new_checkpoints(self.run.parent / start.run, self.progress.step, stop):
            try:
                checkpoint.load_weights(saved, self.model, average=start.take == "average")
            except FileNotFoundError:
                continue  # a newer one has taken its place
            self.progress.step = int(saved.name)
            self._evaluate(self.progress.step)
            self._ask_benchmarks(self.progress.step)
        return "interrupted" if stop() else "finished"

    def _step(self, batches: Iterator[dict[str, Tensor]]) -> tuple[float, float]:
        cfg, step = self.cfg.train, self.progress.step
        waited = time.monotonic()
        micro = [
            next(batches) for _ in range(cfg.batch_size // self.ranks.world // self.micro_batch)
        ]
        self._wait_s += time.monotonic() - waited
        count = self.ranks.sum(sum(int((b["targets"] >= 0).sum()) for b in micro))
        factor = self.cfg.schedule.factor(step, self.steps)
        self.precision.begin(step, self.steps)
        total = torch.zeros((), device=self.device)
        self._statistics: dict[str, Tensor] = {}
        for index, batch in enumerate(micro):
            batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
            noise = NoiseKey(seed=self.cfg.seed, step=step, samples=batch["index"])
            with self.ranks.sync_if(self.wrapped, index == len(micro) - 1):
                with self.precision.autocast(noise):
                    out = self.cfg.task.loss(
                        # A look at operands cannot be compiled.
                        self.wrapped if self.precision.probing else self.forward_model, batch,
                        mask_documents=self.cfg.data.mask_documents, noise=noise,
                    )  # fmt: skip
                # DDP averages over ranks; times world makes it the sum that `count` divides.
                (out.total * (self.ranks.world / count)).backward()
            total += out.nll.sum().detach()
            for name, value in out.statistics.items():
                share = value.detach() / len(micro)
                self._statistics[name] = self._statistics.get(name, 0.0) + share
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip or math.inf))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self.ranks.sum(float(total)) / count, float(norm)

    def _report(self, loss: float, norm: float) -> None:
        cfg, step = self.cfg, self.progress.step
        last = step == self.steps
        readings = self.precision.readings()
        if readings:
            self._log(step, readings)
        if step % cfg.train.log_every == 0 or last:
            statistics = self.ranks.mean(self._statistics)
            self._log(step, {"loss": loss, "grad_norm": norm} | statistics | self._rates())
        if step % cfg.eval.every == 0 or last:
            self._evaluate(step)
        harness = cfg.eval.harness
        if last or (harness.every and step % harness.every == 0):
            self._ask_benchmarks(step)
        saving = cfg.train.checkpoint
        due = time.monotonic() - self._last_save >= saving.every_s
        if (saving.every_steps and step % saving.every_steps == 0) or self.ranks.any(due):
            started = time.monotonic()
            self._save()
            self._aside_s += time.monotonic() - started

    def _rates(self) -> dict[str, float]:
        """Totals so far, and speeds since the last call: compiling, evaluating and saving left out."""
        step, now = self.progress.step, time.monotonic()
        elapsed, taken = max(1e-9, now - self._mark), step - self._marked_step
        sequences = step * self.cfg.train.batch_size
        self._marked_wall_s += elapsed
        self.progress.wall_s = self._marked_wall_s
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
            self._aside_s += compiled_s - self._compile_s
            self._compile_s = rates["compile_s"] = compiled_s
        busy = max(1e-9, elapsed - self._aside_s)
        if taken:
            per_s = taken * self.cfg.train.batch_size / busy
            rates["data_wait_fraction"] = self._wait_s / busy
            rates["tokens_per_s"] = per_s * self.cfg.train.sequence_length
            rates["flops_per_s"] = per_s * self.flops_per_sequence
            peak = self.ranks.peak_flops(self.cfg.precision.compute)
            if peak:
                rates["mfu"] = rates["flops_per_s"] / peak
        self._mark, self._marked_step, self._wait_s, self._aside_s = now, step, 0.0, 0.0
        return rates

    def _evaluate(self, step: int) -> None:
        started = time.monotonic()
        values = self._validate()
        if self.average is not None and self.average.copies:
            with self.average.in_place():
                values |= {
                    f"{k}_average": v for k, v in self._validate().items() if k != "val_tokens"
                }
        if values["val_loss"] < self.progress.best_val_loss:
            self.progress.best_val_loss, self.progress.best_step = values["val_loss"], step
            if self.cfg.train.checkpoint.keep_best:
                self._save()
        if self.cfg.eval.details and step >= self.steps:
            more, positions = validate_details(self.model, self.corpus, self.cfg, self.precision, self.device)  # fmt: skip
            values |= more
            if self.journal is not None:
                write_whole(self.run / "positions.json", json.dumps(positions))
        if self.cfg.eval.induction:
            values |= induction(
                self.model, self.corpus.tokenizer.vocab_size, self.cfg.train.sequence_length // 2
            )
        if self.cfg.eval.sample_tokens:
            text, repeated = sample_text(self.model, self.corpus.tokenizer, self.cfg, self.device)
            if self.journal is not None:
                with open(self.run / "samples.txt", "a", encoding="utf-8") as stream:
                    stream.write(f"--- step {step}\n{text}\n")
            if math.isfinite(repeated):
                values["sample_repetition"] = repeated
        eval_s = time.monotonic() - started
        self._aside_s += eval_s
        self._log(step, values | {"eval_s": eval_s})

    def _ask_benchmarks(self, step: int) -> None:
        """Log the scores of `eval.harness.tasks`; evals/ of this run and of the one evaluated get them whole."""
        harness, start = self.cfg.eval.harness, self.cfg.upstream
        if not harness.tasks:
            return
        from runner.evaluate.harness import HarnessModel, evaluate  # noqa: PLC0415

        started = time.monotonic()
        asked = HarnessModel(
            self.model, self.corpus.tokenizer, context=self.cfg.train.sequence_length,
            batch_size=harness.batch_size, autocast=self.precision.autocast,
        )  # fmt: skip
        averaged = start is not None and start.take == "average" and not self.steps
        report = evaluate(asked, harness, suffix="_average" if averaged else "")
        if self.journal is not None:
            report.write(self.run, step)
            if start is not None and not self.steps:
                report.write(self.run.parent / start.run, step or self._upstream_step)
        self._aside_s += time.monotonic() - started
        self._log(step, report.values)

    def _validate(self) -> dict[str, float]:
        return validate_loss(self.model, self.corpus, self.cfg, self.precision, self.ranks)

    def _diverged(self) -> bool:
        cfg, seen = self.cfg.train, self.progress.losses
        if not math.isfinite(seen[-1]):
            self._log(self.progress.step, {"loss": seen[-1]})
            return True
        del seen[: -cfg.diverged_window]
        if len(seen) < cfg.diverged_window:
            return False
        median = statistics.median(seen)
        self.progress.best_median = min(self.progress.best_median, median)
        return bool(median > self.progress.best_median + cfg.diverged_nats)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        cfg = self.cfg
        samples = self.corpus.samples(cfg.train.sequence_length, cfg.seed)
        return iter(
            training_loader(
                samples, first_step=self.progress.step, steps=self.steps,
                batch=cfg.train.batch_size, micro=self.micro_batch, rank=self.ranks.rank,
                world=self.ranks.world, num_workers=cfg.data.num_workers,
            )
        )  # fmt: skip

    def _restore(self) -> None:
        newest = checkpoint.newest(self.run / "checkpoints")
        if newest is not None:
            self._continue_from(newest)
            self._saved_step = self.progress.step
        elif self.cfg.eval.harness.follow and not self.steps:
            self.progress.step = last_evaluated(self.run)
        elif self.cfg.upstream is not None:
            self._start_from(self.run.parent / self.cfg.upstream.run, self.cfg.upstream.take)
        elif self.cfg.init is not None:
            load_weights(folder_of(self.cfg.init), self.model, put=checkpoint.like)
        if self.journal is not None and self.journal.number > 1:
            self.journal.restored(self.progress.step)

    def _continue_from(self, saved: Path) -> None:
        self.progress = Progress(**checkpoint.load(saved, self.model, self.optimizers))
        self.precision.load(checkpoint.load_tensors(saved, "precision"))
        if self.average is not None:
            self.average.load(checkpoint.load_average(saved, self.model))

    def _start_from(self, upstream: Path, take: str) -> None:
        saved = checkpoint.newest(upstream / "checkpoints")
        if saved is None:
            raise CheckpointError(f"upstream.run={upstream.name} has no checkpoint in {upstream}; run it first")  # fmt: skip
        self._upstream_step = int(saved.name)
        if take != "everything":
            checkpoint.load_weights(saved, self.model, average=take == "average")
            return
        self._continue_from(saved)
        if self.progress.step >= self.steps:
            raise ConfigError(
                f"train.steps={self.steps} must exceed the {self.progress.step} steps that "
                f"upstream.run={upstream.name} has behind it"
            )

    def _save(self) -> None:
        only_evaluated = not self.steps and self.cfg.init is None
        if self._saved_step == self.progress.step or only_evaluated:
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
        checkpoint.prune(
            folder, keep_last=keep.keep_last, keep_every=keep.keep_every,
            best=self.progress.best_step if keep.keep_best else None,
        )  # fmt: skip
        kinds = sorted({str(t.dtype).removeprefix("torch.") for t in files["model"].values()})
        self.journal.event("checkpointed", step=self.progress.step, model=", ".join(kinds))

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if self.journal is not None:
            self.journal.metrics(step, values)


def recompute_blocks(model: LanguageModel) -> None:
    """Make every block drop its activations and compute them again in the backward pass."""
    for block in model.blocks():
        inner = block.forward
        block.forward = lambda *args, inner=inner: recompute(inner, *args, use_reentrant=False)  # type: ignore[assignment, method-assign]
