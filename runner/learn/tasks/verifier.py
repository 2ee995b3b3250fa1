"""A verifier: how likely an answer is right, at its end, at every token or at every step.

Shape legend: batch, seq; vocab.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from kernels.logit_rows import IGNORE
from kernels.philox import NoiseKey
from models.contract import logits
from models.language_model import TokenLoss
from runner.data.corpus import token_id
from runner.learn.tasks.verifier_config import SCORE, VerifierConfig
from runner.records.contracts import Batch, Measure


class Verifier:
    """A verifier; see `VerifierConfig`."""

    measure: Measure = ("val_verifier_loss", "min")

    def __init__(self, cfg: VerifierConfig, tokenizer: Any) -> None:
        self.cfg, self.token = cfg, score_id(tokenizer)

    def count(self, batch: Batch) -> Tensor:
        """Return the number of answers."""
        return torch.tensor(len(batch["tokens"]), device=batch["tokens"].device)

    def loss(self, model: Any, batch: Batch, noise: NoiseKey | None) -> TokenLoss:
        """Return the summed loss of the answers in a batch."""
        judged, nll = self._losses(*self._scores(model, batch, noise), batch)
        scored, targets = self.where(batch), batch["targets"] != IGNORE
        of_scores, of_text = _means(judged, scored), _means(nll, targets)
        total = (of_scores + self.cfg.lm_weight * of_text).sum()
        measures = {"verifier_loss": of_scores.detach().mean(), "lm_loss": of_text.detach().mean()}
        return TokenLoss(
            total=total, nll=nll.detach(), reported=total.detach(), statistics=measures
        )

    def validate(self, model: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Return the loss of the scores and of the text, and how the last scores order answers.

        `val_auc` is the share of pairs in a validation batch, one right and one wrong answer, in
        which the right one has the higher score.
        """
        scores, every = self._scores(model, batch, None)
        judged, nll = self._losses(scores, every, batch)
        of_scores = _means(judged, self.where(batch))
        last = _last(batch["step_ends"])
        rows = torch.arange(len(last), device=last.device)
        final, right = scores[rows, last], batch["labels"][rows, last] > 0.5
        order = final[right][:, None] - final[~right]
        ordered = (order > 0).double() + 0.5 * (order == 0).double()
        same = (final > 0) == right
        return {
            "val_verifier_loss": (float(of_scores.double().sum()), len(of_scores)),
            "val_accuracy": (float(same.sum()), len(same)),
            "val_auc": (float(ordered.sum()), ordered.numel()),
            "val_lm_loss": (float(nll.double().sum()), int((batch["targets"] >= 0).sum())),
        }

    def where(self, batch: Batch) -> Bool[Tensor, "batch seq"]:
        """Return which tokens are scored."""
        if self.cfg.score == "token":
            return batch["labels"] >= 0
        if self.cfg.score == "step":
            return batch["step_ends"]
        places = torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device)
        return places == _last(batch["step_ends"])[:, None]

    def _scores(
        self, model: Any, batch: Batch, noise: NoiseKey | None
    ) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq vocab"]]:
        """Return the logit of the score at each token, and all logits."""
        scores = logits(model, batch["tokens"], noise=noise).float()
        return scores[..., self.token], scores

    def _losses(
        self,
        scores: Float[Tensor, "batch seq"],
        every: Float[Tensor, "batch seq vocab"],
        batch: Batch,
    ) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"]]:
        """Return the loss of the score at each token, and of the next token."""
        labels = batch["labels"] if self.cfg.score != "token" else _outcome(batch)
        judged = functional.binary_cross_entropy_with_logits(
            scores, labels.clamp(min=0.0), reduction="none"
        )
        nll = functional.cross_entropy(
            every.flatten(0, 1),
            batch["targets"].flatten(),
            ignore_index=IGNORE,
            reduction="none",
        )
        return judged, nll.view(scores.shape)


@dataclass(frozen=True)
class Scorer:
    """A trained verifier's scores.

    Args:
        by_step: whether a score is of the step that ends, not of the answer so far.
    """

    model: Any
    tokenizer: Any
    by_step: bool

    @torch.no_grad()
    def scores(self, tokens: Int64[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
        """Return the probability of being right at each token."""
        found = logits(self.model, tokens)[..., score_id(self.tokenizer)]
        return found.float().sigmoid()


def score_id(tokenizer: Any) -> int:
    """Return the id whose logit is the score."""
    found = token_id(tokenizer, SCORE)
    assert found is not None, "the run adds the tokens that the config names"
    return found


def _means(values: Tensor, where: Tensor) -> Float[Tensor, " batch"]:
    """Return the mean of each row over `where`, 0 where there is none."""
    return (values * where).sum(-1) / where.sum(-1).clamp(min=1)


def _last(ends: Bool[Tensor, "batch seq"]) -> Int64[Tensor, " batch"]:
    """Return the last place of each row that is True."""
    places = torch.arange(ends.shape[1], device=ends.device)
    return (places * ends).amax(-1)


def _outcome(batch: Batch) -> Float[Tensor, "batch seq"]:
    """Return the label of each answer's last step at all places."""
    return batch["labels"].gather(1, _last(batch["step_ends"])[:, None]).expand_as(batch["labels"])
