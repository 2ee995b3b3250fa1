"""Generation by all ranks of a run: each continues its share of the prompts."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from runner.generate.generate import Completion, Settings, generate
from runner.generate.tool_pool import InTurn
from runner.machine.ranks import Ranks


def generate_over_ranks(
    ranks: Ranks,
    model: Any,
    prompts: Sequence[Tensor],
    sampling: Settings,
    *,
    rows: int,
    **options: Any,
) -> list[Completion]:
    """Return a completion of each prompt, the same on all ranks; all of them call it.

    The parameters of a sharded model are gathered in every forward pass, so all ranks take the same
    passes: each continues every prompt, and calls of tools are waited for in turn.

    Args:
        rows: the most prompts that a rank continues at a time.
        **options: of `generate`.
    """
    if not prompts:
        return []
    if ranks.world == 1:
        return generate(model, prompts, sampling, rows=rows, **options)
    if isinstance(model, FSDPModule):
        return generate(model, prompts, sampling, rows=rows, pool=InTurn(), **options)
    mine = prompts[ranks.rank :: ranks.world]
    done = generate(model, mine, sampling, rows=rows, **options)
    shares = ranks.gather(done)
    return [shares[n % ranks.world][n // ranks.world] for n in range(len(prompts))]
