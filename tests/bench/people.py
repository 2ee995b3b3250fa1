"""Samples of data=people a second of CPU time of one process, by condition.

python -m tests.bench.people [--people 65536] [--samples 20000]
"""

import argparse
import time
from typing import Literal

from runner.data.people_config import PeopleConfig
from runner.data.people_corpus import PeopleCorpus
from runner.data.tokenizers_config import TokenizerConfig

CONDITIONS: tuple[Literal["in_weight", "in_tool", "biography"], ...] = (
    "in_weight",
    "in_tool",
    "biography",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=65536)
    parser.add_argument("--samples", type=int, default=20000)
    given = parser.parse_args()
    print("| condition | samples a second | seconds to begin |")
    print("| --- | --- | --- |")
    for condition in CONDITIONS:
        config = PeopleConfig(condition=condition, num_people=given.people)
        begun = time.process_time()
        corpus = PeopleCorpus(config, TokenizerConfig(kind="dialogue").build(()))
        samples = corpus.samples(224, 0)
        _ = samples[0]
        ready = time.process_time()
        for index in range(given.samples):
            _ = samples[index]
        took = time.process_time() - ready
        print(f"| {condition} | {given.samples / took:.0f} | {ready - begun:.2f} |", flush=True)


if __name__ == "__main__":
    main()
