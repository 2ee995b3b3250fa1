"""Medusa: heads on the last hidden state of a frozen decoder that tell tokens further ahead.

Head k gives the token k after the next one: unembed(h + silu(W_k h)), with W_k = 0 at first (Cai et
al., arXiv 2401.10774, the frozen form). The paper gives each head an output matrix of its own;
here all have the trunk's, so that a head is dim^2 numbers. The model writes what its trunk writes;
the heads are a draft for it (`generate --draft heads`).

Shape legend: batch, seq, dim = width, vocab.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kernels.cross_entropy import Weights
from kernels.philox import NoiseKey
from models.cache import DecoderState, State
from models.language_model import Give, LanguageModel, TokenLoss
from models.medusa_config import MedusaConfig


class Medusa(LanguageModel):
    """See `MedusaConfig`.

    Attributes:
        hidden: the trunk's hidden states of the last pass with a state, [batch, dim] or, with
            `every`, [batch, seq, dim].
    """

    def __init__(self, cfg: MedusaConfig, vocab_size: int, seed: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.trunk = cfg.trunk.build(vocab_size, seed).requires_grad_(requires_grad=False)
        width = cfg.trunk.width
        self.ahead = nn.ModuleList(
            nn.Linear(width, width, bias=False) for _ in range(cfg.num_heads)
        )
        for head in self.ahead:
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]
        self.hidden: Tensor | None = None

    def forward(
        self,
        tokens: Int64[Tensor, "batch seq"],
        targets: Int64[Tensor, "batch seq"] | None = None,
        *,
        documents: Int64[Tensor, "batch seq"] | None = None,
        noise: NoiseKey | None = None,
        state: State | None = None,
        counts: Int64[Tensor, " batch"] | None = None,
        every: bool = False,
        weights: Weights | None = None,
        give: Give | None = None,
        ahead: bool = False,
    ) -> (
        Float[Tensor, "batch seq vocab"]
        | Float[Tensor, "batch vocab"]
        | Float[Tensor, "heads batch seq vocab"]
        | TokenLoss
    ):
        """See `LanguageModel.forward`: what the trunk returns, which has no dropout here.

        Args:
            ahead: return the logits of all heads instead, [heads, batch, seq, vocab].
        """
        if state is not None:
            self.hidden = self.trunk.read_hidden(tokens, state, counts, None, every=every)
            return self.trunk.head_logits(self.hidden)
        if ahead:
            with torch.no_grad():
                hidden = self.trunk(tokens, documents=documents, give="hidden")
            return self.logits_ahead(hidden)
        given = {"documents": documents, "weights": weights, "give": give}
        return self.trunk(tokens, targets, **given)  # type: ignore[no-any-return]

    def logits_ahead(
        self, hidden: Float[Tensor, "*rows dim"]
    ) -> Float[Tensor, "heads *rows vocab"]:
        """Return the logits of each head from normed last hidden states."""
        steps = [hidden + nn.functional.silu(head(hidden)) for head in self.ahead]
        return torch.stack([self.trunk.head_logits(step) for step in steps])

    def start(self, batch: int, capacity: int, *, static: bool = False) -> DecoderState:
        """See `LanguageModel.start`."""
        return self.trunk.start(batch, capacity, static=static)

    def for_inference(self, *, compiled: bool = False) -> "Medusa":
        """See `LanguageModel.for_inference`."""
        self.trunk.for_inference(compiled=compiled)
        return self

    def blocks(self) -> list[nn.Module]:
        """Return the layers of the trunk in order."""
        return self.trunk.blocks()
