"""The config of an encoder-decoder of transformers, T5 or FLAN-T5; needs no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from models.adapter_config import AdapterConfig
from models.config import any_config, config
from models.flops import linear_flops, training_flops

if TYPE_CHECKING:
    from models.encoder_decoder import EncoderDecoder

_NAMES = {
    "dim": "d_model",
    "head_dim": "d_kv",
    "hidden": "d_ff",
    "encoder_layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "num_heads": "num_heads",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "feed_forward": "feed_forward_proj",
    "norm_eps": "layer_norm_epsilon",
    "start_id": "decoder_start_token_id",
    "end_id": "eos_token_id",
}


@config
class EncoderDecoderConfig:
    """T5 (Raffel et al., arXiv 1910.10683), computed by transformers, without dropout.

    It reads `source </s> target </s>`: the encoder what ends with the first `end_id`, the decoder
    what follows, from `start_id` on.

    Args:
        dim, head_dim, hidden, num_heads: widths; heads need not add up to `dim`.
        encoder_layers, decoder_layers: of each half.
        buckets, max_distance: of the relative positions.
        feed_forward: relu (T5) or gated-gelu (T5 1.1, FLAN-T5).
        norm_eps: of the norms.
        tied: the head is the embedding.
        scaled_head: what the head reads is divided by sqrt(dim) (T5, not FLAN-T5).
        start_id, end_id: tokens.
        adapter: low-rank adapters, see `AdapterConfig`.
    """

    dim: int = 512
    head_dim: int = 64
    hidden: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_heads: int = 8
    buckets: int = 32
    max_distance: int = 128
    feed_forward: Literal["relu", "gated-gelu"] = "relu"
    norm_eps: float = 1e-6
    tied: bool = True
    scaled_head: bool = True
    start_id: int = 0
    end_id: int = 1
    adapter: Any = any_config()

    def __post_init__(self) -> None:
        for name in ("dim", "head_dim", "hidden", "encoder_layers", "decoder_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.adapter is not None and not isinstance(self.adapter, AdapterConfig):
            raise ValueError(
                f"adapter={self.adapter!r} must be a config with its _target_; see "
                "conf/model/adapter"
            )

    @classmethod
    def from_transformers(
        cls, keys: Mapping[str, Any], *, own_head: bool
    ) -> "EncoderDecoderConfig":
        """Return the config of a config.json of model_type t5.

        Args:
            own_head: the weights have a head beside the embedding.

        Raises:
            ValueError: a key has a value that is not known here.
        """
        given = {ours: keys[theirs] for ours, theirs in _NAMES.items() if theirs in keys}
        if given.get("decoder_layers") is None:
            given["decoder_layers"] = given.get("encoder_layers", cls.encoder_layers)
        if given.get("feed_forward", "relu") not in ("relu", "gated-gelu"):
            raise ValueError(
                f"feed_forward_proj={given['feed_forward']!r} is not read; read are relu and "
                "gated-gelu"
            )
        scaled = keys.get("scale_decoder_outputs", keys.get("tie_word_embeddings") is not False)
        return cls(**given, tied=not own_head, scaled_head=scaled)

    def for_transformers(self, vocab_size: int) -> dict[str, Any]:
        """Return the keys of config.json."""
        keys = {theirs: getattr(self, ours) for ours, theirs in _NAMES.items()}
        scale = {"tie_word_embeddings": self.scaled_head}
        return keys | scale | {"vocab_size": vocab_size, "dropout_rate": 0.0, "use_cache": False}

    def build(self, vocab_size: int, seed: int) -> "EncoderDecoder":
        """Return the initialised model; the same seed gives the same weights.

        Raises:
            ImportError: transformers is not installed.
        """
        from models.encoder_decoder import EncoderDecoder  # noqa: PLC0415

        return EncoderDecoder(self, vocab_size, seed)

    def num_trained_parameters(self, vocab_size: int) -> int:
        """Return the number of parameters that are trained and saved."""
        from models.adapter import adapter_sizes  # noqa: PLC0415
        from models.sizes import num_parameters  # noqa: PLC0415

        if self.adapter is None:
            return num_parameters(self, vocab_size)
        return adapter_sizes(self, vocab_size).parameters

    def forward_flops_per_sequence(self, vocab_size: int, seq: int) -> tuple[int, int]:
        """Return (full attention, causal half in the decoder) for `seq` tokens in each half.

        That is what is computed, however long source and target are.
        """
        encoder, decoder, attention = self._layer_flops(seq)
        full = self.encoder_layers * encoder + self.decoder_layers * decoder
        full += linear_flops(seq, self.dim, vocab_size)
        if self.adapter is not None:
            from models.adapter import adapter_sizes  # noqa: PLC0415

            sizes = adapter_sizes(self, vocab_size)
            full += seq * sizes.for_token + sizes.for_pass
        return full, full - self.decoder_layers * attention // 2

    def training_flops_per_sequence(self, vocab_size: int, seq: int) -> tuple[int, int]:
        """Return the same of training; see `DecoderConfig`. The encoder's layers come first."""
        full, causal = self.forward_flops_per_sequence(vocab_size, seq)
        if self.adapter is None:
            return training_flops(full), training_flops(causal)
        from models.adapter import adapter_sizes  # noqa: PLC0415

        sizes = adapter_sizes(self, vocab_size)
        frozen = seq * sizes.frozen
        frozen += linear_flops(seq, self.dim, vocab_size) if self.tied else 0
        encoder, decoder, attention = self._layer_flops(seq)
        layers = max(0, sizes.lowest - self.encoder_layers)
        below = sizes.for_pass + min(sizes.lowest, self.encoder_layers) * encoder + layers * decoder
        return (
            training_flops(full, frozen=frozen, apart=below),
            training_flops(causal, frozen=frozen, apart=below - layers * attention // 2),
        )

    def _layer_flops(self, seq: int) -> tuple[int, int, int]:
        """Return the forward FLOPs of a layer of the encoder, of the decoder, of its attention."""
        inner, matrices = self.num_heads * self.head_dim, 3 if "gated" in self.feed_forward else 2
        feed_forward = 2 * matrices * self.dim * self.hidden * seq
        products, attention = 8 * self.dim * inner * seq, 4 * inner * seq * seq
        one = products + attention
        return feed_forward + one, feed_forward + 2 * one, attention
