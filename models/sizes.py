"""Parameters and FLOPs of a model's config, by its own formulas or counted on the meta device."""

from typing import Any


def num_parameters(cfg: Any, vocab_size: int) -> int:
    """Return the number of parameters. Default: those of the built model, each counted once."""
    if hasattr(cfg, "num_parameters"):
        return int(cfg.num_parameters(vocab_size))
    return sum(p.numel() for p in _on_meta(cfg, vocab_size).parameters())


def num_active_parameters(cfg: Any, vocab_size: int) -> int:
    """Return how many parameters one token is multiplied with. Default: all."""
    if hasattr(cfg, "num_active_parameters"):
        return int(cfg.num_active_parameters(vocab_size))
    return num_parameters(cfg, vocab_size)


def num_embedding_parameters(cfg: Any, vocab_size: int) -> int:
    """Return the number of embedding parameters not tied to a head.

    Default: the weights of nn.Embedding that no nn.Linear shares.
    """
    if hasattr(cfg, "num_embedding_parameters"):
        return int(cfg.num_embedding_parameters(vocab_size))
    from torch import nn  # noqa: PLC0415

    model = _on_meta(cfg, vocab_size)
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(weight.numel() for key, weight in tables.items() if key not in heads)


def forward_flops_per_sequence(cfg: Any, vocab_size: int, seq: int) -> tuple[int, int]:
    """Return the forward FLOPs of one sequence: (all pairs, causal half of attention).

    Default: for both the count of torch's FlopCounterMode, which knows matrix products and
    convolutions, but neither a model's own kernels nor which products are causal.

    Raises:
        ValueError: the config has no formula, and the model cannot run on the meta device.
    """
    if hasattr(cfg, "forward_flops_per_sequence"):
        full, causal = cfg.forward_flops_per_sequence(vocab_size, seq)
        return int(full), int(causal)
    import torch  # noqa: PLC0415
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    model = _on_meta(cfg, vocab_size)
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad(), torch.device("meta"):
            model(torch.zeros(1, seq, dtype=torch.long))
    except Exception as error:
        raise ValueError(
            f"{type(cfg).__name__} has no forward_flops_per_sequence(vocab_size, seq), and its "
            f"FLOPs cannot be counted on the meta device ({type(error).__name__}: {error}); "
            "give it that method"
        ) from error
    return counter.get_total_flops(), counter.get_total_flops()


def _on_meta(cfg: Any, vocab_size: int) -> Any:
    import torch  # noqa: PLC0415

    with torch.device("meta"):
        return cfg.build(vocab_size, 0)
