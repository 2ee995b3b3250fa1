"""Accuracy and calibration of the next token, and the loss by its position."""

import json

import torch

from models.contract import logits
from runner.evaluate.scores import calibration_error, predictions
from runner.evaluate.validation import to_device
from runner.generate.generate import read
from runner.machine.storage import write_atomically
from runner.records.contracts import Trained


def write_details(trained: Trained) -> dict[str, float]:
    """Write positions.json; return the values of `measure_details`."""
    values, positions = measure_details(trained)
    if trained.folder is not None:
        write_atomically(trained.folder / "positions.json", json.dumps(positions))
    return values


@torch.no_grad()
def measure_details(trained: Trained) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return (values; a row position, loss, n for each position), the loss in nats per token; every rank computes all.

    The values are `val_accuracy` and `val_calibration_error` of the next token, and `state_bytes`: what the model
    remembers of one sequence while it decodes.
    """
    model, corpus, cfg, precision = trained.model, trained.corpus, trained.cfg, trained.precision
    seq, device = cfg.train.sequence_length, trained.ranks.device
    nats, count = (torch.zeros(seq, dtype=torch.float64) for _ in range(2))
    predicted = []
    for batch in corpus.held_out(seq, cfg.eval.batch_size, cfg.eval.tokens):
        batch = to_device(batch, device, masked=getattr(cfg.data, "mask_documents", False))
        with precision.autocast():
            scores = logits(model, batch["tokens"], documents=batch.get("documents"))
        targets = batch["targets"]
        losses = torch.nn.functional.cross_entropy(
            scores.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
        )
        length = targets.shape[1]
        nats[:length] += losses.view(targets.shape).double().sum(dim=0).cpu()
        count[:length] += (targets >= 0).sum(dim=0).cpu()
        there = targets >= 0
        predicted.append(predictions(scores[there], targets[there]))
    with precision.autocast():
        _, state = read(
            model, batch["tokens"][:1].tolist(), device, static=batch["tokens"].shape[1]
        )
    confidence, right = (torch.cat(parts) for parts in zip(*predicted, strict=True))
    values = {
        "val_accuracy": float(right.double().mean()),
        "val_calibration_error": calibration_error(confidence, right),
    }
    if state is not None:
        values["state_bytes"] = state.num_bytes()
    rows = [
        {"position": place, "loss": float(nats[place] / count[place]), "n": int(count[place])}
        for place in range(seq)
        if count[place]
    ]
    return values, rows
