"""What it costs to keep keys and values in few bits, on held-out text of the training length.

    kv_loss/FORMAT        nats a token, read through a state as a text that is written is
    kv_loss_delta/FORMAT  that, less the loss with keys and values as computed
    kv_kl/FORMAT          KL from the distribution with keys and values as computed, nats a token
    kv_bits/FORMAT        of a key's or a value's number, scales included, the newest tokens not
    kv_bytes/FORMAT       of the state of one text of that length, all told

and `kv_loss/full`, `kv_bytes/full`. Documents that share a window see each other.
"""

from typing import Any

import torch
from torch import Tensor

from models.contract import read, start
from runner.evaluate.kv_cache_config import KvCacheConfig
from runner.evaluate.validation import to_device
from runner.generate.kv_cache import store_keys_and_values
from runner.records.contracts import Batch, Trained


@torch.no_grad()
def measure_kv_cache(cfg: KvCacheConfig, trained: Trained) -> dict[str, float]:
    """Return the values of the file's head; every rank computes all.

    Raises:
        ConfigError: the model keeps no keys and values of all tokens.
    """
    model, run = trained.model, trained.cfg
    losses, divergences = dict.fromkeys(cfg.formats, 0.0), dict.fromkeys(cfg.formats, 0.0)
    full, tokens = 0.0, 0
    for batch in trained.corpus.held_out(
        run.train.sequence_length, run.eval.batch_size, run.eval.tokens
    ):
        batch = to_device(batch, trained.ranks.device, masked=False)
        targets = batch["targets"]
        counted = targets >= 0
        exact = _log_probabilities(trained, batch, None)[counted]
        full += _nats(exact, targets[counted])
        tokens += len(exact)
        for name in cfg.formats:
            rounded = _log_probabilities(trained, batch, name)[counted]
            losses[name] += _nats(rounded, targets[counted])
            divergences[name] += float((exact.exp() * (exact - rounded)).sum())
    tokens = max(1, tokens)
    values = {"kv_loss/full": full / tokens}
    numbers, values["kv_bytes/full"] = _bytes(trained, None)
    size = next(model.parameters()).element_size()
    for name in cfg.formats:
        values[f"kv_loss/{name}"] = losses[name] / tokens
        values[f"kv_loss_delta/{name}"] = (losses[name] - full) / tokens
        values[f"kv_kl/{name}"] = divergences[name] / tokens
        grown, values[f"kv_bytes/{name}"] = _bytes(trained, name)
        values[f"kv_bits/{name}"] = 8.0 * size * grown / numbers
    return values


def _log_probabilities(trained: Trained, batch: Batch, name: str | None) -> Tensor:
    tokens = batch["tokens"]
    with trained.precision.autocast():
        state = _start(trained.model, name, len(tokens), tokens.shape[1])
        logits = read(trained.model, tokens, state, every=True, spans=batch.get("spans"))
    return logits.float().log_softmax(dim=-1)


def _start(model: Any, name: str | None, rows: int, capacity: int, *, static: bool = False) -> Any:
    """Return a state that keeps keys and values in the format of this name (None: as computed)."""
    before = getattr(model, "stored", None)
    if name is not None:
        store_keys_and_values(model, name)
    state = start(model, rows, capacity, static=static)
    if name is not None:
        model.stored = before
    return state


def _nats(log_probabilities: Tensor, targets: Tensor) -> float:
    return -float(log_probabilities.gather(1, targets[:, None]).double().sum())


def _bytes(trained: Trained, name: str | None) -> tuple[float, float]:
    """Return (bytes that a text of twice the length takes more, bytes at the training length)."""
    sizes = []
    seq = trained.cfg.train.sequence_length
    for capacity in (seq, seq + 64 * 32):  # whole groups of tokens, many of them
        with trained.precision.autocast():
            state = _start(trained.model, name, 1, capacity, static=True)
            read(
                trained.model, torch.zeros(1, 1, dtype=torch.int64).to(trained.ranks.device), state
            )
        sizes.append(float(state.num_bytes()))
    return sizes[1] - sizes[0], sizes[0]
