"""The decoder: GPT-2, Llama, what lies between them, and any other stack of branches, by config.

Layers of pre-norm branches, x + attn(norm(x)), x + mlp(norm(x)), as `pattern` says; a final norm; a
linear head, tied or not. The branches come from the config (`models/branch_config.py`).

Shape legend: batch, seq, dim = width, vocab.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from kernels.at_least_fp32 import at_least_fp32
from kernels.attention import span_reach
from kernels.cross_entropy import Weights, linear_cross_entropy
from kernels.packed import can_pack
from kernels.philox import NoiseKey, dropout, random_words
from kernels.rotary import rotary_frequencies, rotary_tables
from models.adapter import merge
from models.attention_config import Stored
from models.block import Block, tokens_of
from models.branch import Context, Notes, Tables
from models.cache import DecoderState, State
from models.canvas import Canvas
from models.contract import Pass, lookups, scales_of_modules
from models.decoder_config import DecoderConfig
from models.language_model import Give, LanguageModel, TokenLoss, flat_weights
from models.layers import PackedLinear, make_norm, pack_linears
from models.rope import slowed

_NEFTUNE_LAYER = 1 << 20  # of the random words: no branch has this number


class Decoder(LanguageModel):
    """See `DecoderConfig`.

    `forward` also takes `canvas`, where `tokens` are a part of texts whose keys and values are
    kept, and `visible` [seq, seq]: visible[i, j] says whether token i sees token j.
    """

    cfg: DecoderConfig

    def __init__(self, cfg: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        self.embedding = nn.Embedding(vocab_size, cfg.width)
        learned = cfg.positions == "learned"
        self.positions = nn.Embedding(cfg.context_length, cfg.width) if learned else None
        self.streams = None if cfg.streams is None else cfg.streams.build_ends()
        self.layers = nn.ModuleList()
        number = 0
        for branches in cfg.branches():
            self.layers.append(Block(cfg, branches, number, vocab_size))
            number += len(branches)
        self.norm = make_norm(cfg.norm, cfg.width, cfg.bias, cfg.norm_eps)
        self.head = None if cfg.tied else nn.Linear(cfg.width, vocab_size, bias=False)
        self.packed_head: PackedLinear | None = None
        self.stored: Stored | None = None  # the format of keys and values in a state

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
        spans: Int64[Tensor, "batch seq"] | None = None,
        canvas: Canvas | None = None,
        visible: Bool[Tensor, "seq seq"] | None = None,
        divisor: Int64[Tensor, ""] | None = None,
    ) -> (
        Float[Tensor, "batch seq vocab"]
        | Float[Tensor, "batch vocab"]
        | Float[Tensor, "batch seq dim"]
        | TokenLoss
    ):
        """See `LanguageModel.forward`.

        Args:
            spans: ids of spans that the model has not generated, 0 elsewhere: tokens of one span
                see each other (prefix-LM). With `state`, each span is read in one pass.
            divisor: the batch's share of what the loss is divided by, which the losses of routers
                are multiplied with (None: the number of targets).
        """
        if state is not None:
            return self.head_logits(self.read_hidden(tokens, state, counts, spans, every=every))
        hidden, notes = self._hidden_states(tokens, documents, noise, spans, canvas, visible)
        if give == "hidden":
            return hidden
        if targets is None or give == "logits":
            return self.head_logits(hidden)
        scale = 1.0 / self.cfg.width_multiplier
        weight = self.embedding.weight if self.head is None else self.head.weight
        total, nll = linear_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            targets.flatten(),
            scale=scale,
            softcap=self.cfg.softcap,
            z_loss=self.cfg.z_loss,
            weights=flat_weights(weights),
        )
        share = (targets >= 0).sum() if divisor is None else divisor
        for name, value in notes.items():  # means over tokens; `total` is a sum that is divided
            if ".loss." in name:
                total = total + value * share
        statistics = {name: value.detach() for name, value in notes.items()}
        return TokenLoss(total=total, nll=nll.view(targets.shape), statistics=statistics)

    def head_logits(self, hidden: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocab"]:
        """Return the logits of normed last hidden states."""
        if self.packed_head is not None:
            product = self.packed_head(hidden)
        else:
            weight = self.embedding.weight if self.head is None else self.head.weight
            product = hidden @ weight.to(hidden.dtype).T
        logits = at_least_fp32(product) * (1.0 / self.cfg.width_multiplier)
        cap = self.cfg.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def unembed(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocab"]:
        """See `LanguageModel.unembed`."""
        return self.head_logits(self.norm(x))

    def for_inference(self, *, compiled: bool = False) -> "Decoder":
        """See `LanguageModel.for_inference`; adapters are merged, packed weights in full."""
        merge(self)
        head = self.embedding.weight if self.head is None else self.head.weight
        pack_linears(self.layers, head.dtype, compiled=compiled)
        self.packed_head = PackedLinear(head, None) if can_pack(head) else None
        return self

    def _hidden_states(
        self,
        tokens: Int64[Tensor, "batch seq"],
        documents: Int64[Tensor, "batch seq"] | None,
        noise: NoiseKey | None,
        spans: Int64[Tensor, "batch seq"] | None,
        canvas: Canvas | None,
        visible: Bool[Tensor, "seq seq"] | None,
    ) -> tuple[Float[Tensor, "batch seq dim"], Notes]:
        """Return (normed last hidden state, which the head reads; notes of the branches)."""
        first = 0 if canvas is None else canvas.begin
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[first : first + tokens.shape[1]]
        if self.cfg.neftune and noise is not None:
            x = x + _neftune_noise(x, self.cfg.neftune, noise)
        x = dropout(_autocast(x), self.cfg.dropout, noise, 0)
        context = Context(
            tokens,
            positions,
            documents=documents,
            reach=self._reach(spans),
            rotary=self._rotary(positions),
            rotary_at=self._rotary_at,
            noise=noise,
            canvas=canvas,
            visible=visible,
        )
        x, notes = self._through(x, context)
        return self.norm(x), notes

    def _reach(self, spans: Int64[Tensor, "batch seq"] | None) -> Tensor | None:
        if spans is None:
            return None
        self.cfg.check_spans()
        return span_reach(spans)

    def _through(
        self,
        x: Float[Tensor, "batch seq dim"],
        context: Context,
        wanted: Int64[Tensor, "batch wanted"] | None = None,
    ) -> tuple[Float[Tensor, "batch left dim"], Notes]:
        """Return (`x` after all layers, notes of the branches).

        Args:
            wanted: the indices of the tokens to return (None: all).
        """
        streams = self.streams
        notes: Notes = {}
        x = x if streams is None else streams.spread(x, context)
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1 and streams is None
            x, layer_notes = layer(x, context, wanted if is_last else None)
            notes |= {f"layers.{index}.{name}": value for name, value in layer_notes.items()}
        if streams is None:
            return x, notes
        x = streams.gather(x)
        return x if wanted is None else tokens_of(x, wanted), notes | streams.notes(context)

    def _rotary(self, positions: Int64[Tensor, "... seq"]) -> Tables | None:
        return self._rotary_at(positions) if self.cfg.positions == "rope" else None

    def _rotary_at(self, positions: Int64[Tensor, "... seq"]) -> Tables:
        cfg = self.cfg
        frequencies = rotary_frequencies(cfg.attention_dim, cfg.rope_base, positions.device)
        if cfg.rope_scaling is None:
            return rotary_tables(positions, frequencies)
        slow = slowed(cfg.rope_scaling, frequencies, cfg.rope_base)
        return rotary_tables(positions, slow, cfg.rope_scaling.attention_gain)

    def start(self, batch: int, capacity: int, *, static: bool = False) -> DecoderState:
        """See `LanguageModel.start`."""
        if not self.cfg.causal:
            raise NotImplementedError(
                "causal=false has no state: each token sees later ones; use causal=true to decode"
            )
        device = self.embedding.weight.device
        return DecoderState(
            batch, capacity=capacity, device=device, static=static, stored=self.stored
        )

    def read_hidden(
        self,
        tokens: Int64[Tensor, "batch seq"],
        state: State,
        counts: Int64[Tensor, " batch"] | None,
        spans: Int64[Tensor, "batch seq"] | None,
        *,
        every: bool,
    ) -> Float[Tensor, "batch *seq dim"]:
        """Read tokens into the state; return the normed hidden state of each row's last token.

        With `every`, of all of them.
        """
        assert isinstance(state, DecoderState)
        x, context = self._begin(tokens, state, counts, self._reach(spans))
        several = not every and tokens.shape[1] > 1
        last = (state.new_tokens() - 1).clamp(min=0)[:, None] if several else None
        x, _ = self._through(_autocast(x), context, last)
        state.finish()
        return self.norm(x if every else x[:, 0])  # type: ignore[no-any-return]

    def _begin(
        self,
        tokens: Int64[Tensor, "batch seq"],
        state: DecoderState,
        counts: Int64[Tensor, " batch"] | None,
        reach: Tensor | None,
    ) -> tuple[Float[Tensor, "batch seq dim"], Context]:
        """Return (what the layers read, their context) of tokens that continue a state."""
        positions = state.begin(tokens.shape[1], counts, reach)
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(positions)
        rotary = self._rotary(positions[:, None])  # the same for every head
        return x, Context(tokens, positions, rotary=rotary, rotary_at=self._rotary_at, state=state)

    @property
    def reads_side_by_side(self) -> bool:
        """See `models.contract.reads_side_by_side`."""
        known = all(
            getattr(part, "reads_side_by_side", False)
            for row in self.cfg.branches()
            for part in row
        )
        return known and self.cfg.streams is None

    def read_side_by_side(self, passes: Sequence[Pass]) -> list[Tensor]:
        """See `models.contract.read_side_by_side`."""
        xs, parts = [], []
        for tokens, state, counts in passes:
            assert isinstance(state, DecoderState)
            x, context = self._begin(tokens, state, counts, None)
            xs.append(x.flatten(0, 1))
            parts.append(context)
        joined = Context(
            torch.cat([part.tokens.flatten() for part in parts])[None],
            torch.cat([part.positions.flatten() for part in parts])[None],
            parts=tuple(parts),
        )
        last, before = [], 0
        for part in parts:
            assert part.state is not None
            rows, seq = part.tokens.shape
            begins = before + seq * torch.arange(rows, device=part.tokens.device)
            last.append(begins + (part.state.new_tokens() - 1).clamp(min=0))
            before += rows * seq
        x, _ = self._through(_autocast(torch.cat(xs)[None]), joined, torch.cat(last)[None])
        for part in parts:
            assert part.state is not None
            part.state.finish()
        logits = self.head_logits(self.norm(x[0]))
        return list(torch.split(logits, [len(rows) for rows in last]))

    def blocks(self) -> list[nn.Module]:
        """Return the layers in order."""
        return list(self.layers)

    def learning_rate_scales(self) -> dict[str, float]:
        """Return the learning-rate factors: those of branches, and muP's for Adam.

        muP divides the rate of hidden matrices by m = `width_multiplier` (Yang et al., table 8).
        """
        own = dict(scales_of_modules(self))
        if self.cfg.init != "mup":
            return own
        tables = lookups(self)
        names = (n for n, p in self.layers.named_parameters(prefix="layers") if p.ndim >= 2)
        matrices = {name: 1.0 / self.cfg.width_multiplier for name in names if name not in tables}
        return matrices | {name: factor * matrices.get(name, 1.0) for name, factor in own.items()}


def _neftune_noise(
    x: Float[Tensor, "batch seq dim"], alpha: float, noise: NoiseKey
) -> Float[Tensor, "batch seq dim"]:
    """Return uniform noise in alpha / sqrt(seq dim) x (-1, 1) (NEFTune, arXiv 2310.05914)."""
    words = random_words(noise, _NEFTUNE_LAYER, x[0].numel()).view(x.shape)
    uniform = words.to(x.dtype) * 2.0**-31 - 1.0
    return uniform * (alpha / math.sqrt(x.shape[1] * x.shape[2]))


def _autocast(x: Tensor) -> Tensor:
    """Return `x` in autocast's dtype if autocast is on."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
