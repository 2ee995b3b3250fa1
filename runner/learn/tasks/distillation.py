"""Distillation: the divergence of a student's next tokens from those of a frozen teacher.

The logits of a micro-batch are held for both.

Shape legend: batch, seq, vocab; rows = batch * seq.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from kernels.divergence import divergence
from kernels.logit_rows import IGNORE
from kernels.philox import NoiseKey
from models.contract import batch_logits
from models.language_model import TokenLoss
from runner.learn.tasks.distillation_config import DistillationConfig
from runner.learn.tasks.frozen import frozen_model
from runner.records.contracts import Batch, Inputs, Measure


class Distillation:
    """Distillation; see `DistillationConfig`."""

    measure: Measure = ("val_divergence", "min")

    def __init__(self, cfg: DistillationConfig, model: Any, tokenizer: Any, inputs: Inputs) -> None:
        self.cfg = cfg
        self.teacher = frozen_model(model, "task.teacher", cfg.teacher, inputs, tokenizer)

    def loss(self, model: Any, batch: Batch, noise: NoiseKey | None) -> TokenLoss:
        """Return the summed divergence at the targets of a batch; the teacher has no dropout."""
        student = batch_logits(model, batch, noise=noise)
        total, rows = self._divergence(student, self._taught(batch), batch)
        with torch.set_grad_enabled(self.cfg.lm_weight > 0):
            nll = _nll(student, batch)
        total = total + self.cfg.lm_weight * nll.sum()
        nll = nll.detach().view(batch["targets"].shape)
        return TokenLoss(total=total, nll=nll, reported=rows.sum())

    def validate(self, model: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Return the divergence, the losses of student and teacher, and how often they agree."""
        student = batch_logits(model, batch)
        teacher = self._taught(batch)
        _, rows = self._divergence(student, teacher, batch)
        where = batch["targets"] != IGNORE
        agree = (student.argmax(-1) == teacher.argmax(-1)) & where
        count = int(where.sum())
        sums = {
            "val_divergence": rows.double().sum(),
            "val_loss": _nll(student, batch).double().sum(),
            "val_teacher_loss": _nll(teacher, batch).double().sum(),
            "val_agreement": agree.sum(),
        }
        return {name: (float(value), count) for name, value in sums.items()}

    def _taught(self, batch: Batch) -> Float[Tensor, "batch seq vocab"]:
        with torch.no_grad():
            return batch_logits(self.teacher, batch)

    def _divergence(
        self, student: Tensor, teacher: Tensor, batch: Batch
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " rows"]]:
        return divergence(
            student.flatten(0, 1),
            teacher.flatten(0, 1),
            (batch["targets"] != IGNORE).flatten(),
            kind=self.cfg.divergence,
            temperature=self.cfg.temperature,
            k=self.cfg.top_k,
        )


def _nll(scores: Float[Tensor, "batch seq vocab"], batch: Batch) -> Float[Tensor, " rows"]:
    return functional.cross_entropy(
        scores.float().flatten(0, 1),
        batch["targets"].flatten(),
        ignore_index=IGNORE,
        reduction="none",
    )
