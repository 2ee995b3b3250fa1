"""Loss on the validation split, per token and in bits per byte, and a sample of text."""

import math

import torch

from models.language_model import LanguageModel, TokenLoss
from models.precision import Precision
from runner.config import RunConfig
from runner.data.order import validation_batches
from runner.data.tokenizers import Tokenizer
from runner.data.tokens import Corpus
from runner.serve.generate import generate


@torch.no_grad()
def validate_loss(
    model: LanguageModel, corpus: Corpus, cfg: RunConfig, precision: Precision, device: torch.device
) -> dict[str, float]:
    """Return `val_loss` (nats per token), `val_bits_per_byte` and `val_tokens`."""
    lengths = torch.from_numpy(corpus.tokenizer.bytes_per_id())
    nats, tokens, num_bytes = 0.0, 0, 0
    batches = validation_batches(
        corpus.val, cfg.train.sequence_length, cfg.eval.batch_size, cfg.eval.tokens
    )
    for batch in batches:
        documents = batch["documents"].to(device) if cfg.data.mask_documents else None
        with precision.autocast():
            out = model(
                batch["tokens"].to(device), batch["targets"].to(device), documents=documents
            )
        assert isinstance(out, TokenLoss)
        nats += float(out.nll.double().sum())
        tokens += batch["targets"].numel()
        num_bytes += int(lengths[batch["targets"]].sum())
    return {
        "val_loss": nats / tokens,
        "val_bits_per_byte": nats / (math.log(2) * max(1, num_bytes)),
        "val_tokens": tokens,
    }


def sample_text(
    model: LanguageModel, tokenizer: Tokenizer, cfg: RunConfig, device: torch.device
) -> str:
    """Return a continuation of `eval.prompt`: the same random draws at every evaluation."""
    prompt = torch.from_numpy(tokenizer.encode(cfg.eval.prompt).astype("int64"))
    generator = torch.Generator().manual_seed(cfg.seed)
    ids = generate(
        model, prompt.to(device), max_new_tokens=cfg.eval.sample_tokens,
        context=cfg.train.sequence_length, generator=generator, temperature=0.8,
    )  # fmt: skip
    return tokenizer.decode(ids.tolist())
