"""Loading the model and the tokenizer of a trained cell."""

from pathlib import Path

from models.language_model import LanguageModel
from runner.data.corpus import load_tokenizer
from runner.data.tokenizers import Tokenizer
from runner.machine.errors import CheckpointError
from runner.records import checkpoint, checkpoint_folder
from runner.records.cells import load_cell


def load_model(folder: Path, *, average: bool = False) -> tuple[LanguageModel, Tokenizer, int]:
    """Return (model with the newest weights, tokenizer, longest trained sequence in tokens).

    `average` loads the weights averaged over training instead.

    Raises:
        CheckpointError: the run has no checkpoint yet.
    """
    cell = load_cell(folder)
    newest = checkpoint_folder.newest(folder / "checkpoints")
    if newest is None:
        raise CheckpointError(
            f"{folder} has no checkpoint; train the cell first (state: {cell.state})"
        )
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    model = cell.config.model.build(tokenizer.vocab_size, cell.config.seed)
    checkpoint.load_weights(newest, model, average=average)
    context = cell.config.train.sequence_length
    if cell.config.init is not None:  # its pretraining may have used longer sequences
        context = max(context, getattr(cell.config.model, "context_length", context))
    return model, tokenizer, context
