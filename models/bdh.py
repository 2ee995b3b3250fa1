"""BDH, the Baby Dragon Hatchling: linear attention among many sparse, positive neurons.

(arXiv 2509.26507; github.com/pathwaycom/bdh.) All levels share one set of weights. A level of the
public code, x being [seq, dim] and normed, LN a norm without gains:

    x_n = relu(x W_x)                           neurons of each head, mostly 0
    a   = (rope(x_n) rope(x_n)^T).tril(-1) x    no softmax, no scale, the token itself left out
    y_n = relu(LN(a) W_y) * x_n
    x   = LN(x + LN(y_n W_out))

The paper's form has its residual among the neurons: x_n += relu(v W_x), v = LN(y_n W_out), and a
sums v instead of x.

Shape legend: batch, heads, seq, dim = width, n = neurons of a head.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from kernels.at_least_fp32 import at_least_fp32
from kernels.cross_entropy import Weights, linear_cross_entropy
from kernels.philox import NoiseKey, dropout
from models.bdh_config import DROPOUT_PARTS, BDHConfig
from models.branch import Context, Notes
from models.cache import DecoderState, Memory, State
from models.language_model import Give, LanguageModel, TokenLoss, flat_weights


class Level(nn.Module):
    """A level: the weights that all levels share, and the computation of one."""

    def __init__(self, cfg: BDHConfig) -> None:
        super().__init__()
        self.cfg = cfg
        wide = cfg.num_heads * cfg.neurons
        self.encoder = nn.Linear(cfg.width, wide, bias=False)
        self.encoder_v = nn.ModuleList(
            nn.Linear(cfg.width, cfg.neurons, bias=False) for _ in range(cfg.num_heads)
        )
        self.decoder = nn.Linear(wide, cfg.width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        neurons: Float[Tensor, "batch heads seq n"] | None,
        phases: Float[Tensor, "... seq n"],
        seen: Bool[Tensor, "... seq seq"],
        index: int,
        context: Context,
    ) -> tuple[Float[Tensor, "batch seq dim"], Float[Tensor, "batch heads seq n"] | None, Notes]:
        """Return (x, neurons, notes) after level `index`.

        Args:
            neurons: residual of the paper's form (None: form=repo, or before the first level).
            phases: rotary angles of the neurons, in turns.
            seen: True where a query (row) sees a key (column).
        """
        if self.cfg.chunks > 1 and context.state is None:
            return self._in_chunks(x, phases, seen, index, context.noise), None, {}
        added = F.relu(self._heads(self.encoder(x)))
        neurons = added if neurons is None else neurons + added
        turned = _turn(neurons, phases)
        scores = (turned @ turned.mT).masked_fill(~seen, 0.0)
        a = scores @ x[:, None]
        if context.state is not None:
            a = a + self._recall(context.state, index, turned, x)
        heads = zip(self.encoder_v, _norm(a).unbind(1), strict=True)
        gate = F.relu(torch.stack([linear(head) for linear, head in heads], dim=1))
        both = self._drop(gate * neurons, index, context.noise)
        y = _norm(self.decoder(both.transpose(1, 2).flatten(2)))
        notes = {
            "x_active": (neurons.detach() > 0).float().mean(),
            "y_active": (gate.detach() > 0).float().mean(),
        }
        if self.cfg.form == "repo":
            return _norm(x + y), None, notes
        return y, neurons, notes

    def _heads(self, wide: Float[Tensor, "batch seq wide"]) -> Float[Tensor, "batch heads seq n"]:
        return wide.view(*wide.shape[:2], self.cfg.num_heads, -1).transpose(1, 2)

    def _drop(self, both: Tensor, index: int, noise: NoiseKey | None, first: int = 0) -> Tensor:
        """Return `both` after dropout, which draws for each part of the neurons apart.

        `first` is the number of the first part in `both`.
        """
        if noise is None or not self.cfg.dropout:
            return both
        size = self.cfg.neurons // DROPOUT_PARTS
        parts = [
            dropout(part.contiguous(), self.cfg.dropout, noise, index * DROPOUT_PARTS + number)
            for number, part in enumerate(both.split(size, dim=-1), first)  # type: ignore[no-untyped-call]
        ]
        return torch.cat(parts, dim=-1)

    def _recall(self, state: DecoderState, index: int, turned: Tensor, x: Tensor) -> Tensor:
        """Return what earlier tokens add to the attention sum; add the new ones, S += k^T v.

        S is kept in fp32 (fp64 in an fp64 model).
        """
        batch, heads, _, n = turned.shape
        if index not in state.memories:
            zeros = at_least_fp32(x.new_zeros(batch, heads, n, x.shape[-1]))
            state.memories[index] = Memory(sums=zeros)
        memory = state.memories[index]
        with torch.autocast(x.device.type, enabled=False):
            wide = at_least_fp32(turned)
            recalled = wide @ memory["sums"]
            padding = state.padding()
            if padding is not None:
                wide = wide.masked_fill(padding[:, None, :, None], 0.0)
            memory["sums"] = memory["sums"] + wide.mT @ at_least_fp32(x)[:, None]
        return recalled.to(x.dtype)

    def _in_chunks(
        self,
        x: Float[Tensor, "batch seq dim"],
        phases: Tensor,
        seen: Tensor,
        index: int,
        noise: NoiseKey | None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Return x after the level, computed some neurons at a time.

        Scores and the output of the decoder are sums over neurons, so chunks add up.
        """
        if type(self.encoder) is not nn.Linear:
            raise ValueError(
                "model.chunks slices the weights, which a quantised layer does not allow; "
                "use chunks=1"
            )
        cfg = self.cfg
        size, parts = cfg.neurons // cfg.chunks, DROPOUT_PARTS // cfg.chunks
        w_x = self.encoder.weight.view(cfg.num_heads, cfg.neurons, cfg.width)
        w_y = torch.stack([w for v in self.encoder_v for w in v.parameters()])
        w_out = self.decoder.weight.view(cfg.width, cfg.num_heads, cfg.neurons)

        def score(x: Tensor, w_x: Tensor, phases: Tensor) -> Tensor:
            turned = _turn(F.relu(x[:, None] @ w_x.mT), phases)
            return turned @ turned.mT

        def out(
            x: Tensor, a: Tensor, w_x: Tensor, w_y: Tensor, w_out: Tensor, first: int
        ) -> Tensor:
            both = F.relu(a @ w_y.mT) * F.relu(x[:, None] @ w_x.mT)
            both = self._drop(both, index, noise, first)
            return both.transpose(1, 2).flatten(2) @ w_out.flatten(1).mT

        scores: Tensor | None = None
        for chunk in range(cfg.chunks):
            part = slice(chunk * size, (chunk + 1) * size)
            more = recompute(score, x, w_x[:, part], phases[..., part], use_reentrant=False)
            scores = more if scores is None else scores + more
        assert scores is not None
        a = _norm(scores.masked_fill(~seen, 0.0) @ x[:, None])
        y: Tensor | None = None
        for chunk in range(cfg.chunks):
            part = slice(chunk * size, (chunk + 1) * size)
            weights = w_x[:, part], w_y[:, part], w_out[..., part]
            more = recompute(out, x, a, *weights, chunk * parts, use_reentrant=False)
            y = more if y is None else y + more
        assert y is not None
        return _norm(x + _norm(y))


class BDH(LanguageModel):
    """The model of a `BDHConfig`."""

    cfg: BDHConfig

    def __init__(self, cfg: BDHConfig, vocab_size: int) -> None:
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        self.embedding = nn.Embedding(vocab_size, cfg.width)
        self.level = Level(cfg)
        self.head = nn.Linear(cfg.width, vocab_size, bias=False)

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
    ) -> (
        Float[Tensor, "batch seq vocab"]
        | Float[Tensor, "batch vocab"]
        | Float[Tensor, "batch seq dim"]
        | TokenLoss
    ):
        batch, seq = tokens.shape
        assert state is None or isinstance(state, DecoderState)
        if state is None:
            positions = torch.arange(seq, device=tokens.device)
        else:
            positions = state.begin(seq, counts)
        context = Context(tokens, positions, documents=documents, noise=noise, state=state)
        hidden, notes = self._through(context)
        if state is not None:
            added = state.finish()
            if not every:
                hidden = hidden[torch.arange(batch, device=tokens.device), added - 1]
        if give == "hidden":
            return hidden
        if targets is None or give == "logits":
            return self.unembed(hidden)
        total, nll = linear_cross_entropy(
            hidden.flatten(0, 1), self.head.weight, targets.flatten(), weights=flat_weights(weights)
        )
        return TokenLoss(total=total, nll=nll.view(targets.shape), statistics=notes)

    def _through(self, context: Context) -> tuple[Float[Tensor, "batch seq dim"], Notes]:
        seq, cfg = context.tokens.shape[1], self.cfg
        x = _norm(self.embedding(context.tokens))
        if torch.is_autocast_enabled(x.device.type) and not x.is_meta:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        phases = _phases(context.positions, cfg.neurons, cfg.rope_base)
        seen = torch.ones(seq, seq, dtype=torch.bool, device=x.device).tril(-1)
        if context.documents is not None:
            seen = seen & (
                context.documents[:, None, :, None] == context.documents[:, None, None, :]
            )
        if phases.ndim == 3:
            phases = phases[:, None]  # a row of the batch has its own positions; heads share them
        neurons: Tensor | None = None
        notes: Notes = {}
        for index in range(cfg.depth):
            x, neurons, level_notes = self.level(x, neurons, phases, seen, index, context)
            notes |= {f"levels.{index}.{name}": value for name, value in level_notes.items()}
        return x, notes

    def start(self, batch: int, capacity: int, *, static: bool = False) -> DecoderState:
        """See `LanguageModel.start`.

        The state is a sum of [heads, n, dim] for each level, whatever the length of the text.
        """
        return DecoderState(
            batch, capacity=capacity, device=self.embedding.weight.device, static=static
        )

    def unembed(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocab"]:
        """See `LanguageModel.unembed`."""
        return at_least_fp32(x @ self.head.weight.to(x.dtype).T)

    def blocks(self) -> list[nn.Module]:
        """Return the one level, whose weights all levels share."""
        return [self.level]


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]).to(x.dtype)  # autocast of a GPU norms in fp32


def _phases(
    positions: Int64[Tensor, "*batch seq"], n: int, base: float
) -> Float[Tensor, "*batch seq n"]:
    """Return the angle of each neuron at each position, in turns; a pair shares a frequency."""
    pairs = (torch.arange(n, device=positions.device, dtype=torch.float32) / 2).floor() * 2
    frequencies = 1.0 / (base ** (pairs / n)) / (2 * math.pi)
    return positions.to(torch.float32)[..., None] * frequencies


def _turn(x: Tensor, phases: Tensor) -> Tensor:
    """Return `x` with each pair of neighbouring neurons rotated by its phase."""
    angles = (phases % 1) * (2 * math.pi)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + other * sin
