"""Loss on the validation split, per token and in bits per byte, and a sample of text."""

import itertools
import math
from collections.abc import Iterator

import torch

from models.language_model import LanguageModel, TokenLoss
from models.precision import Precision
from runner.data.order import Corpus, Sample
from runner.data.tokenizers import Tokenizer
from runner.evaluate.scores import calibration_error, predictions, repetition
from runner.generate.generate import generate, read
from runner.generate.sampling import Sampling
from runner.machine.ranks import Ranks
from runner.records.config import RunConfig


@torch.no_grad()
def validate_loss(
    model: LanguageModel, corpus: Corpus, cfg: RunConfig, precision: Precision, ranks: Ranks
) -> dict[str, float]:
    """Return `val_loss` (nats per token), `val_bits_per_byte` and `val_tokens`, shared among ranks."""
    lengths = torch.from_numpy(corpus.tokenizer.bytes_per_id())
    nats, tokens, num_bytes = 0.0, 0, 0
    device = ranks.device
    batches = corpus.held_out(cfg.train.sequence_length, cfg.eval.batch_size, cfg.eval.tokens)
    # Sharded parameters are gathered in every forward pass, so all ranks make the same number of
    # them; who has no batch of its own left repeats the last one without counting it.
    for mine, batch in _dealt(batches, ranks.rank, ranks.world):
        documents = batch["documents"].to(device) if cfg.data.mask_documents else None
        with precision.autocast():
            out = model(
                batch["tokens"].to(device), batch["targets"].to(device), documents=documents
            )
        assert isinstance(out, TokenLoss)
        if mine:
            counted = batch["targets"] >= 0
            nats += float(out.nll.double().sum())
            tokens += int(counted.sum())
            num_bytes += int(lengths[batch["targets"][counted]].sum())
    nats, num_bytes, tokens = ranks.sum(nats), int(ranks.sum(num_bytes)), int(ranks.sum(tokens))
    text_bytes = max(1.0, num_bytes * corpus.bytes_per_counted_byte)
    return {
        "val_loss": nats / tokens,
        "val_bits_per_byte": nats / (math.log(2) * text_bytes),
        "val_tokens": tokens,
    }


@torch.no_grad()
def validate_details(
    model: LanguageModel, corpus: Corpus, cfg: RunConfig, precision: Precision, device: torch.device
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return (values; a row position, loss, n for each position), the loss in nats per token; every rank computes all.

    The values are `val_accuracy` and `val_calibration_error` of the next token, and `state_bytes`: what the model
    remembers of one sequence while it decodes.
    """
    seq = cfg.train.sequence_length
    nats, count = (torch.zeros(seq, dtype=torch.float64) for _ in range(2))
    found = []
    for batch in corpus.held_out(seq, cfg.eval.batch_size, cfg.eval.tokens):
        documents = batch["documents"].to(device) if cfg.data.mask_documents else None
        with precision.autocast():
            logits = model(batch["tokens"].to(device), documents=documents)
        assert isinstance(logits, torch.Tensor)
        targets = batch["targets"].to(device)
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")  # fmt: skip
        length = targets.shape[1]
        nats[:length] += losses.view(targets.shape).double().sum(dim=0).cpu()
        count[:length] += (targets >= 0).sum(dim=0).cpu()
        there = targets >= 0
        found.append(predictions(logits[there], targets[there]))
    with precision.autocast():
        _, state = read(
            model, batch["tokens"][:1].tolist(), device, static=batch["tokens"].shape[1]
        )
    confidence, right = (torch.cat(parts) for parts in zip(*found, strict=True))
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


def _dealt(batches: Iterator[Sample], rank: int, world: int) -> Iterator[tuple[bool, Sample]]:
    """Yield every world-th batch from number `rank` on, (True, batch), filled up with (False, last)."""
    while round_ := list(itertools.islice(batches, world)):
        yield rank < len(round_), round_[min(rank, len(round_) - 1)]


def sample_text(
    model: LanguageModel, tokenizer: Tokenizer, cfg: RunConfig, device: torch.device
) -> tuple[str, float]:
    """Return a continuation of `eval.prompt`, the same random draws at every evaluation, and its `repetition`."""
    prompt = torch.from_numpy(tokenizer.encode(cfg.eval.prompt).astype("int64"))
    how = Sampling(max_new_tokens=cfg.eval.sample_tokens, temperature=0.8, seed=cfg.seed)
    (done,) = generate(
        model, [prompt.to(device)], how, context=cfg.train.sequence_length, decode=tokenizer.decode,
        eos=None, slide=True,
    )  # fmt: skip
    return tokenizer.decode([*prompt.tolist(), *done.ids]), repetition(done.ids)
