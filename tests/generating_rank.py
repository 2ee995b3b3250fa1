"""One rank of several that generate together: prints the ids and masks of all texts as JSON."""

import json

import torch

from models.decoder_config import DecoderConfig
from runner.data.tokenizers import ByteTokenizer
from runner.generate.calculator_tool import CalculatorConfig
from runner.generate.over_ranks import generate_over_ranks
from runner.generate.sampling import Sampling
from runner.generate.tools import tools_for
from runner.machine.ranks import Ranks


def texts(ranks: Ranks) -> list[list[int]]:
    """Return the ids of seven texts, whose calls a calculator answers."""
    tokenizer = ByteTokenizer()
    model = DecoderConfig(depth=1, width=16, num_heads=2).build(257, 3).double()
    prompts = [torch.tensor([65 + n]) for n in range(7)]
    done = generate_over_ranks(
        ranks,
        model,
        prompts,
        Sampling(max_new_tokens=9, temperature=1.0, seed=4),
        rows=2,
        context=16,
        decode=tokenizer.decode,
        ends=(),
        tools=tools_for([CalculatorConfig()], tokenizer),
    )
    return [[*c.prompt, *c.ids] for c in done]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(texts(Ranks("cpu"))))
