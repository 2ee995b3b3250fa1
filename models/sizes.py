"""Parameters and FLOPs of a model's config, by its own formulas or counted on the meta device."""

from typing import Any

from models.flops import training_flops

_TOLERANCE = 0.01  # of a formula's FLOPs: some leave out biases and other small terms


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


def num_trained_parameters(cfg: Any, vocab_size: int) -> int:
    """Return the number of parameters that are trained and saved. Default: all."""
    if hasattr(cfg, "num_trained_parameters"):
        return int(cfg.num_trained_parameters(vocab_size))
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
    model = _on_meta(cfg, vocab_size)
    try:
        counted = _counted_flops(model, seq)
    except Exception as error:
        raise ValueError(
            f"{type(cfg).__name__} has no forward_flops_per_sequence(vocab_size, seq), and its "
            f"FLOPs cannot be counted on the meta device ({type(error).__name__}: {error}); "
            "give it that method"
        ) from error
    return counted, counted


def training_flops_per_sequence(cfg: Any, vocab_size: int, seq: int) -> tuple[int, int]:
    """Return the FLOPs of training on one sequence: (all pairs, causal half of attention).

    Default: three times those of the forward pass, which is too many where weights are frozen.

    Raises:
        ValueError: see `forward_flops_per_sequence`.
    """
    if hasattr(cfg, "training_flops_per_sequence"):
        full, causal = cfg.training_flops_per_sequence(vocab_size, seq)
        return int(full), int(causal)
    full, causal = forward_flops_per_sequence(cfg, vocab_size, seq)
    return training_flops(full), training_flops(causal)


def check_parameters(cfg: Any, vocab_size: int, model: Any) -> None:
    """Check the number of parameters that `cfg` gives against `model`, which it has built.

    Raises:
        ValueError: they differ.
    """
    from models.contract import count_weights  # noqa: PLC0415

    if not hasattr(cfg, "num_parameters"):
        return
    said, there = num_parameters(cfg, vocab_size), count_weights(model)
    if said != there:
        raise ValueError(
            f"{type(cfg).__name__}.num_parameters({vocab_size}) gives {said:,}, the model that it "
            f"builds has {there:,}; mend the formula, or leave it out: they are counted then"
        )


def check_formulas(cfg: Any, vocab_size: int, seq: int) -> str | None:
    """Check the formulas of `cfg` on the meta device; what cannot be built or run there passes.

    Return a remark if the FLOPs are more than torch's counter sees, which is right only of a model
    with operations that it does not know.

    Raises:
        ValueError: the parameters differ, or the counter sees more FLOPs than the formula gives.
    """
    try:
        model = _on_meta(cfg, vocab_size)
    except Exception:  # it needs a device, or values
        return None
    check_parameters(cfg, vocab_size, model)
    try:
        counted = _counted_flops(model, seq)
    except Exception:
        return None
    said, _ = forward_flops_per_sequence(cfg, vocab_size, seq)
    formula = f"{type(cfg).__name__}.forward_flops_per_sequence({vocab_size}, {seq})"
    if said < counted * (1 - _TOLERANCE):
        raise ValueError(
            f"{formula} gives {said:,} for all pairs, torch's counter sees {counted:,}; mend the "
            "formula, or leave it out: they are counted then"
        )
    if said <= counted * (1 + _TOLERANCE):
        return None
    return (
        f"{formula} gives {said:,}, torch's counter sees {counted:,} in matrix products and "
        "convolutions; is the rest done by operations of the model's own?"
    )


def _counted_flops(model: Any, seq: int) -> int:
    """Return what torch's counter sees in a forward pass over `seq` tokens on the meta device."""
    import torch  # noqa: PLC0415
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.device("meta"):
        model(torch.zeros(1, seq, dtype=torch.long))
    return int(counter.get_total_flops())


def _on_meta(cfg: Any, vocab_size: int) -> Any:
    import torch  # noqa: PLC0415

    with torch.device("meta"):
        return cfg.build(vocab_size, 0)
