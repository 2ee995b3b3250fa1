"""Accuracy and calibration of next-token predictions, and the loss by position."""

import json

import torch

from models.contract import batch_logits
from models.text_state import TextState
from runner.evaluate.scores import calibration_error, predictions
from runner.evaluate.validation import to_device
from runner.generate.decoding_batch import prefill
from runner.machine.errors import ConfigError
from runner.machine.storage import write_atomically
from runner.records.contracts import Trained


def write_details(trained: Trained) -> dict[str, float]:
    """Write positions.json and return the values of `measure_details`."""
    values, positions = measure_details(trained)
    if trained.folder is not None:
        write_atomically(trained.folder / "positions.json", json.dumps(positions))
    return values


@torch.no_grad()
def measure_details(trained: Trained) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return (values, a row for each position).

    The values are `val_accuracy`, `val_calibration_error` and, if the model has a state,
    `state_bytes`, the size of one sequence's decoding state. A row has `position`, `loss` (nats per
    token) and `n` (targets). Every rank computes everything.

    Raises:
        ConfigError: the model sees the token that it should predict.
    """
    model, corpus, cfg, precision = trained.model, trained.corpus, trained.cfg, trained.precision
    if not getattr(cfg.model, "causal", True):
        raise ConfigError(
            "eval.details measures predictions of the next token, which a model with "
            "model.causal=false sees; leave it out"
        )
    seq, device = cfg.train.sequence_length, trained.ranks.device
    nats, count = (torch.zeros(seq, dtype=torch.float64) for _ in range(2))
    predicted = []
    for batch in corpus.held_out(seq, cfg.eval.batch_size, cfg.eval.tokens):
        batch = to_device(batch, device, masked=getattr(cfg.data, "mask_documents", False))
        with precision.autocast():
            scores = batch_logits(model, batch)
        targets = batch["targets"]
        losses = torch.nn.functional.cross_entropy(
            scores.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
        )
        length = targets.shape[1]
        nats[:length] += losses.view(targets.shape).double().sum(dim=0).cpu()
        count[:length] += (targets >= 0).sum(dim=0).cpu()
        counted = targets >= 0
        predicted.append(predictions(scores[counted], targets[counted]))
    with precision.autocast():
        text = batch["tokens"][:1].tolist()
        _, state = prefill(model, text, capacity=len(text[0]), static=True)
    confidence, correct = (torch.cat(parts) for parts in zip(*predicted, strict=True))
    values = {
        "val_accuracy": float(correct.double().mean()),
        "val_calibration_error": calibration_error(confidence, correct),
    }
    if not isinstance(state, TextState):
        values["state_bytes"] = state.num_bytes()
    rows = [
        {"position": i, "loss": float(nats[i] / count[i]), "n": int(count[i])}
        for i in range(seq)
        if count[i]
    ]
    return values, rows
