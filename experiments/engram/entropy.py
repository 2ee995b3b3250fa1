"""Entropy of the toy, the least loss that it allows, to entropy.csv.

PYTHONPATH=. python experiments/engram/entropy.py
"""

from pathlib import Path

import pandas as pd
import yaml

from runner.data import markov
from runner.data.markov_config import MarkovConfig

HERE = Path(__file__).parent


def entropy(grid: Path) -> float:
    """Return the entropy, in nats per token, of the validation sequences of a grid's toy."""
    sweep = yaml.safe_load(grid.read_text())
    toy = sweep["hydra"]["sweeper"]["blocks"][0]["params"]
    vocab_size, seq = toy["tokenizer.vocab_size"], toy["train.sequence_length"]
    return markov.entropy(MarkovConfig(), vocab_size, seq, sweep["eval"]["tokens"])


if __name__ == "__main__":
    table = pd.DataFrame({"entropy_nats": [entropy(HERE / "sweep.yaml")]})
    table.to_csv(HERE / "entropy.csv", index=False)
