"""Questions/s of a multiple-choice benchmark, beginnings read once against every choice whole.

    python -m tests.bench.choices [--size 124M] [--shots 5]

Questions are of HellaSwag's lengths, four endings each, random ids; both ways score the same pairs
in batches of 16 rows; interleaved, minima over rounds. The scores are compared. CPU time is that
of this process alone, where others run beside it.
"""

import argparse
import random
import time
from functools import partial

import torch

from models.decoder_config import DecoderConfig
from runner.data.tokenizers import ByteTokenizer
from runner.evaluate.harness import HarnessModel
from tests.bench.timing import interleaved

SIZES = {
    "10M": {"width": 256, "depth": 8, "num_heads": 4},
    "124M": {"width": 768, "depth": 12, "num_heads": 12},
}
CONTEXT, ENDING, CHOICES, VOCAB = (20, 90), (8, 40), 4, 50257
Pairs = list[tuple[list[int], list[int]]]


class _Tokenizer(ByteTokenizer):
    vocab_size = VOCAB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--shots", type=int, default=0, help="examples before every question")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = DecoderConfig(**SIZES[given.size], context_length=1024).build(VOCAB, 0)
    pairs = questions(given.questions, given.shots)
    shared, whole = (
        HarnessModel(model, _Tokenizer(), context=1024, shares_prefixes=shares)
        for shares in (True, False)
    )
    apart = max(
        abs(a[0] - b[0]) for a, b in zip(shared.score(pairs), whole.score(pairs), strict=True)
    )
    cpu = {"shared": float("inf"), "whole": float("inf")}
    calls = {
        "shared": partial(_score, shared, pairs, cpu, "shared"),
        "whole": partial(_score, whole, pairs, cpu, "whole"),
    }
    rates = {
        name: given.questions / best for name, best in interleaved(calls, given.rounds).items()
    }
    print(f"{given.questions} questions, {torch.get_num_threads()} threads")
    print("| size | shots | shared, questions/s | whole | ratio | of CPU time | apart, nats |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| {given.size} | {given.shots} | {rates['shared']:.2f} | {rates['whole']:.2f} | "
        f"{rates['shared'] / rates['whole']:.2f} | {cpu['whole'] / cpu['shared']:.2f} | "
        f"{apart:.1e} |"
    )


def _score(model: HarnessModel, pairs: Pairs, cpu: dict[str, float], name: str) -> None:
    """Score the pairs; note the least CPU time, in s."""
    begun = time.process_time()
    model.score(pairs)
    cpu[name] = min(cpu[name], time.process_time() - begun)


def questions(count: int, shots: int) -> Pairs:
    """Return the (context, ending) pairs of `count` questions after `shots` examples."""
    rng = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(least, most))]

    examples = [token for _ in range(shots) for token in ids(*CONTEXT) + ids(*ENDING)]
    pairs = []
    for _ in range(count):
        context = [*examples, *ids(*CONTEXT)]
        pairs += [(context, ids(*ENDING)) for _ in range(CHOICES)]
    return pairs


if __name__ == "__main__":
    main()
