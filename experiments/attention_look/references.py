"""Losses of simpler rules on the validation sequences of a grid, to references.csv.

PYTHONPATH=. python experiments/attention_look/references.py [large.yaml]
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from runner.data.markov import counting_loss, entropy
from runner.data.markov_config import MarkovConfig

HERE = Path(__file__).parent
STARTS = (0.25, 0.5, 1.0, 2.0, 4.0)  # what each count may begin at


def references(*grids: Path) -> pd.DataFrame:
    """Return columns rule, loss_nats for the data of a grid; a later file of `grids` overrides."""
    config: dict[str, Any] = {"data": {}, "tokenizer": {}, "train": {}, "eval": {}}
    for grid in grids:
        changes = yaml.safe_load(grid.read_text())
        config = {key: section | changes[key] for key, section in config.items()}
    vocab_size = config["tokenizer"]["vocab_size"]
    sizes = (vocab_size, config["train"]["sequence_length"], config["eval"]["tokens"])
    data = MarkovConfig(**config["data"])
    losses = {
        "knowing nothing": float(np.log(vocab_size)),
        "counting tokens": min(
            counting_loss(data, *sizes, order=0, start=start) for start in STARTS
        ),
        "counting pairs (the least)": entropy(data, *sizes),
    }
    return pd.DataFrame(losses.items(), columns=["rule", "loss_nats"])


if __name__ == "__main__":
    names = ["sweep.yaml", *sys.argv[1:]]
    references(*(HERE / name for name in names)).to_csv(HERE / "references.csv", index=False)
