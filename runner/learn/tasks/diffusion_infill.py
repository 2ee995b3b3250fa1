"""Masked diffusion of middles of any length: `<expand>` and `<delete>` as answers of masks.

Shape legend: batch, seq.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kernels.logit_rows import IGNORE
from kernels.philox import NoiseKey
from models.contract import token_loss
from models.language_model import TokenLoss
from runner.data.corpus import token_id, token_texts
from runner.data.tokenizer_folder import DELETE, EXPAND, MASK
from runner.learn.tasks.diffusion import maskable, sample_number, shifted, uniform
from runner.learn.tasks.diffusion_infill_config import DiffusionInfillConfig
from runner.records.contracts import Batch, Measure

_STREAM, _CHOICES = 0x696E6669, 5  # of Philox; numbers of a sample beside those of its tokens


class DiffusionInfill:
    """See `DiffusionInfillConfig`."""

    measure: Measure = ("val_infill_loss", "min")

    def __init__(self, cfg: DiffusionInfillConfig, tokenizer: Any) -> None:
        ids = [token_id(tokenizer, name) for name in (MASK, EXPAND, DELETE)]
        assert None not in ids, "the run adds the tokens that the config names"
        self.cfg, self.end = cfg, tokenizer.eos
        self.mask, self.expand, self.delete = (int(index or 0) for index in ids)
        self.ends_line = torch.tensor(["\n" in text for text in token_texts(tokenizer)])

    def draw(self, model: Any, batches: Sequence[Batch], noise: NoiseKey) -> list[Batch]:
        """Return the batches with their middles hidden: a batch of `hide`, and its `index`."""
        hidden = []
        for batch in batches:
            own = NoiseKey(seed=noise.seed, step=noise.step, samples=batch["index"])
            hidden.append(self.hide(batch, own) | {"index": batch["index"]})
        return hidden

    def planned(self, batch: Batch) -> Batch:
        """Return a batch of the shapes of `draw`: what it hides depends on values."""
        tokens = batch["tokens"]
        return {
            "tokens": tokens,
            "targets": tokens,
            "weights": torch.ones(tokens.shape, device=tokens.device),
            "documents": torch.zeros_like(tokens),
            "counted": torch.ones_like(batch["index"]),
            "index": batch["index"],
        }

    def count(self, batch: Batch) -> Tensor:
        """Return the number of tokens that weigh in the loss."""
        return batch["counted"].sum()

    def loss(self, model: Any, batch: Batch, noise: NoiseKey | None) -> TokenLoss:
        """Return the weighted loss of the masks of a batch that `draw` has hidden."""
        out = token_loss(
            model,
            batch["tokens"],
            batch["targets"],
            documents=batch["documents"],
            noise=noise,
            weights=batch["weights"],
        )
        return TokenLoss(
            total=out.total,
            nll=out.nll,
            reported=(batch["weights"] * out.nll).sum(),
            statistics=out.statistics,
        )

    def validate(self, model: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Return `val_infill_loss`: what is hidden of a sample hangs on its tokens alone."""
        key = NoiseKey(seed=0, step=0, samples=sample_number(batch["tokens"]))
        hidden = self.hide(batch, key)
        nats = (hidden["weights"] * self.loss(model, hidden, None).nll).double().sum()
        return {"val_infill_loss": (float(nats), float(hidden["counted"].sum()))}

    def hide(self, batch: Batch, noise: NoiseKey) -> Batch:
        """Return tokens, targets, weights, documents [batch, seq] and `counted` [batch]."""
        tokens = batch["tokens"]
        number = _CHOICES + 2 * tokens.shape[1]
        dice, can_hide = uniform(noise, _STREAM, number).cpu(), maskable(batch).cpu()
        documents = batch.get("documents", torch.zeros_like(tokens)).cpu()
        rows = [
            self._hide_one(ids, can, of, own)
            for ids, can, of, own in zip(tokens.cpu(), can_hide, documents, dice, strict=True)
        ]
        made = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if self.cfg.shift:
            made["targets"] = shifted(made["targets"], IGNORE)
            made["weights"] = shifted(made["weights"], 0.0)
        return {name: value.to(tokens.device) for name, value in made.items()}

    def _hide_one(
        self,
        tokens: Int64[Tensor, " seq"],
        can_hide: Bool[Tensor, " seq"],
        documents: Int64[Tensor, " seq"],
        dice: Float[Tensor, " numbers"],
    ) -> dict[str, Tensor]:
        """Return a sample with its middle hidden; what has no room left at its end is cut off."""
        seq, (for_hiding, for_merging) = len(tokens), dice[_CHOICES:].chunk(2)
        begin, end = self._middle(tokens, can_hide, dice)
        time = float(dice[2])
        room = min(self.cfg.max_deletes, (seq - end) // 2)
        deletes = int(float(dice[3]) * (room + 1))
        masked = can_hide & (for_hiding < time)
        masked[:begin] = masked[end:] = False
        merge = self.cfg.merge
        if float(dice[4]) < 0.5:
            merge *= 1.0 - float(masked.sum()) / (end - begin)
        taken = torch.zeros(seq, dtype=torch.bool)  # by the mask before
        taken[1:] = masked[:-1] & masked[1:] & (for_merging[:-1] < merge)
        expands = torch.zeros(seq, dtype=torch.bool)
        expands[:-1] = taken[1:]
        target = torch.where(masked, torch.where(expands, self.expand, tokens), IGNORE)
        weight = masked * (1.0 - time)
        shown = torch.where(masked, self.mask, tokens)
        keep = (~taken).nonzero()[:, 0]
        before, after = keep[keep < end], keep[keep >= end]
        asked = torch.full((deletes,), self.mask)

        def joined(values: Tensor, between: Tensor, fill: float) -> Tensor:
            whole = torch.cat((values[before], between.to(values.dtype), values[after]))[:seq]
            padding = torch.full((seq - len(whole),), fill, dtype=values.dtype)
            return torch.cat((whole, padding))

        share = torch.full((deletes,), (1.0 - time) / max(1, deletes))
        return {
            "tokens": joined(shown, asked, self.end),
            "targets": joined(target, torch.full((deletes,), self.delete), IGNORE),
            "weights": joined(weight.float(), share, 0.0),
            "documents": joined(documents, documents[end - 1].expand(deletes), -1),
            "counted": (masked & ~taken).sum() + int(deletes > 0),
        }

    def _middle(
        self,
        tokens: Int64[Tensor, " seq"],
        can_hide: Bool[Tensor, " seq"],
        dice: Float[Tensor, " numbers"],
    ) -> tuple[int, int]:
        """Return (begin, end) of the middle."""
        seq = len(tokens)
        if self.cfg.middle == "line":
            ends = self.ends_line[tokens]
            begins = (ends[:-1] & can_hide[1:]).nonzero()[:, 0] + 1
            if len(begins):
                begin = int(begins[int(float(dice[0]) * len(begins))])
                rest = ends[begin:].nonzero()[:, 0]
                return begin, begin + int(rest[0]) + 1 if len(rest) else seq
        begin = 1 + int(float(dice[0]) * (seq - 1))
        longest = min(self.cfg.max_middle, seq - begin)
        return begin, begin + 1 + int(float(dice[1]) * longest)
