"""Texts judged by their likelihood under a model of next tokens that another run has trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.logit_rows import IGNORE
from models.contract import token_loss
from runner.generate.generate import Completion
from runner.machine.errors import ConfigError
from runner.records.cells import load_cell
from runner.records.contracts import strategy
from runner.records.trained_model import load_model


class NextTokenJudge:
    """The model of a run folder, which reads texts of the same ids.

    Raises:
        ConfigError: it predicts no next tokens.
        CheckpointError: the run has no checkpoint yet.
    """

    def __init__(self, folder: Path, device: torch.device, *, average: bool = False) -> None:
        cfg = load_cell(folder).config
        model, self.tokenizer, self.context = load_model(folder, average=average)
        if strategy(cfg.task, model, self.tokenizer, self.context) is not None:
            raise ConfigError(
                f"the judge {folder} does not predict next tokens, its task is "
                f"{type(cfg.task).__name__}; name a run of task=language_modelling"
            )
        self.folder, self.device = folder, device
        self.model = model.to(device).eval()

    @torch.no_grad()
    def nats(self, texts: Sequence[Completion], tokenizer: Any) -> list[float]:
        """Return -log p per new token of each text, given its prompt.

        Args:
            tokenizer: of the texts; it may have further special tokens.

        Raises:
            ConfigError: its ids are not those of the judge, or a text is longer than the judge
                reads.
        """
        nats = []
        for text in texts:
            ids = [*text.prompt, *text.ids]
            self._refuse_others(ids, tokenizer)
            tokens = torch.tensor([ids], device=self.device)
            targets = tokens[:, 1:].clone()
            targets[:, : len(text.prompt) - 1] = IGNORE
            nll = token_loss(self.model, tokens[:, :-1], targets).nll
            nats.append(float(nll.double().sum()) / len(text.ids))
        return nats

    def _refuse_others(self, ids: Sequence[int], tokenizer: Any) -> None:
        if len(ids) > self.context + 1:
            raise ConfigError(
                f"a text and its prompt are {len(ids)} tokens, the judge {self.folder} reads "
                f"{self.context + 1}; write fewer tokens"
            )
        known = max(ids) < self.model.vocab_size
        if not known or self.tokenizer.decode(ids) != tokenizer.decode(ids):
            raise ConfigError(
                f"the judge {self.folder} has another tokenizer than the texts; train both on the "
                "same data"
            )
