"""An encoder-decoder of transformers as a model of `source </s> target </s>`.

Logits and losses stand at the places of the text, as those of a decoder do: the last token of the
source predicts the first of the target. Before that there are none.

Shape legend: batch, seq, vocab, dim.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from kernels.at_least_fp32 import at_least_fp32
from kernels.cross_entropy import Weights, linear_cross_entropy
from kernels.logit_rows import IGNORE
from models.adapter import adapt, merge
from models.encoder_decoder_config import EncoderDecoderConfig
from models.initialise import generator_of
from models.language_model import Give, LanguageModel, TokenLoss, flat_weights


class EncoderDecoder(LanguageModel):
    """See `EncoderDecoderConfig`; parameters have the names of T5ForConditionalGeneration."""

    def __init__(self, cfg: EncoderDecoderConfig, vocab_size: int, seed: int) -> None:
        super().__init__()
        self.cfg: Any = cfg
        self.vocab_size = vocab_size
        self.shared = nn.Embedding(vocab_size, cfg.dim)
        self.encoder = _stack(cfg, vocab_size, decoder=False)
        self.decoder = _stack(cfg, vocab_size, decoder=True)
        self.lm_head = None if cfg.tied else nn.Linear(cfg.dim, vocab_size, bias=False)
        _initialise(self, cfg, seed)
        if cfg.adapter is not None:
            adapt(self, cfg.adapter, seed, lambda name, weight: None)

    # What is not here, `models.contract` does not pass: no noise, no documents, no state.
    def forward(  # type: ignore[override]
        self,
        tokens: Int64[Tensor, "batch seq"],
        targets: Int64[Tensor, "batch seq"] | None = None,
        *,
        weights: Weights | None = None,
        give: Give | None = None,
    ) -> Float[Tensor, "batch seq vocab"] | Float[Tensor, "batch seq dim"] | TokenLoss:
        """See `LanguageModel.forward`.

        Raises:
            ValueError: a text has no end token, or a target before the first one: then what should
                be predicted would be read.
        """
        ends = tokens == self.cfg.end_id
        if type(tokens) is Tensor and not tokens.is_meta:
            self._refuse_no_source(tokens, targets, ends)
        hidden = self._hidden_states(tokens, ends)
        if give == "hidden":
            return hidden
        head = self.shared.weight if self.lm_head is None else self.lm_head.weight
        scale = self.cfg.dim**-0.5 if self.cfg.scaled_head else 1.0
        if targets is None or give == "logits":
            return at_least_fp32((hidden * scale) @ head.to(hidden.dtype).T)
        total, nll = linear_cross_entropy(
            hidden.flatten(0, 1),
            head,
            targets.flatten(),
            scale=scale,
            weights=flat_weights(weights),
        )
        return TokenLoss(total=total, nll=nll.view(targets.shape))

    def _refuse_no_source(self, tokens: Tensor, targets: Tensor | None, ends: Tensor) -> None:
        within = ends.cumsum(1) == 0  # places of the source before its end
        empty = tokens[:, 0] == self.cfg.start_id  # a row that nothing was read of
        early = torch.zeros_like(within) if targets is None else (targets != IGNORE) & within
        if bool((within.all(1) & ~empty).any() | early.any()):
            raise ValueError(
                f"a source does not end with the token {self.cfg.end_id}, so the encoder would "
                "read what the decoder should write; end the form of the data with it, as in "
                "data.sources.0.form='summarize: {}</s>'"
            )

    def _hidden_states(
        self, tokens: Int64[Tensor, "batch seq"], ends: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq dim"]:
        """Return the decoder's last hidden states at the places of the text that they read."""
        seq = tokens.shape[1]
        places = torch.arange(seq, device=tokens.device)
        last = torch.where(ends.any(1), ends.int().argmax(1), seq - 1)[:, None]  # of the source
        reads = (places <= last).long()
        source = self.encoder(inputs_embeds=self.shared(tokens), attention_mask=reads)[0]
        target = tokens.gather(1, (places + last).clamp(max=seq - 1))
        begun = torch.where(places == 0, torch.full_like(target, self.cfg.start_id), target)
        hidden = self.decoder(
            inputs_embeds=self.shared(begun),
            encoder_hidden_states=source,
            encoder_attention_mask=reads,
        )[0]
        back = (places - last).clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
        result: Tensor = hidden.gather(1, back)
        return result

    def for_inference(self, *, compiled: bool = False) -> "EncoderDecoder":
        """See `LanguageModel.for_inference`; adapters are merged, packed weights in full."""
        merge(self)
        return self

    def start(self, batch: int, capacity: int, *, static: bool = False) -> Any:
        """See `LanguageModel.start`."""
        raise NotImplementedError("each token takes a pass over source and target")

    def blocks(self) -> list[nn.Module]:
        """Return the layers of the encoder, then those of the decoder."""
        return [*self.encoder.block, *self.decoder.block]


def _stack(cfg: EncoderDecoderConfig, vocab_size: int, *, decoder: bool) -> Any:
    """Return half of the model, without an embedding of its own."""
    try:
        from transformers import T5Config  # noqa: PLC0415
        from transformers.models.t5.modeling_t5 import T5Stack  # noqa: PLC0415
    except ImportError:
        raise ImportError("T5 is computed by transformers: pip install -e '.[t5]'") from None
    keys = cfg.for_transformers(vocab_size) | {"is_decoder": decoder}
    if decoder:
        keys["num_layers"] = cfg.decoder_layers
    theirs = T5Config(**keys)
    theirs._attn_implementation = "eager"  # the counter of FLOPs sees no other on CPUs
    with torch.random.fork_rng(devices=[]):
        stack: Any = T5Stack(theirs)
    stack.embed_tokens = None
    for module in stack.modules():
        if hasattr(module, "wo"):  # theirs looks at the weight's type, which packed layers lack
            module.forward = _feed_forward(module)
    return stack


def _feed_forward(module: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        if hasattr(module, "wi"):
            inner = module.act(module.wi(x))
        else:
            inner = module.act(module.wi_0(x)) * module.wi_1(x)
        result: Tensor = module.wo(inner)
        return result

    return forward


@torch.no_grad()
def _initialise(model: EncoderDecoder, cfg: EncoderDecoderConfig, seed: int) -> None:
    """Fill all matrices by the spreads of T5; a function of (seed, name)."""
    spreads = {
        "q": (cfg.dim * cfg.head_dim) ** -0.5,
        "o": (cfg.num_heads * cfg.head_dim) ** -0.5,
        "wo": cfg.hidden**-0.5,
        "shared": 1.0,
        "lm_head": 1.0,
    }
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and not parameter.is_meta:
            module = name.removesuffix(".weight").rpartition(".")[2]
            spread = spreads.get(module, cfg.dim**-0.5)
            parameter.normal_(0.0, spread, generator=generator_of(seed, name))
