"""Keys and values of texts that are filled in, kept between passes over a part of them.

Shape legend: batch, kv = key/value heads, seq = tokens read, ctx = all tokens, dim = head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

KeptKeysValues = dict[int, tuple[Tensor, Tensor]]  # of one text, by the number of the branch


@dataclass(frozen=True)
class Canvas:
    """A pass over a part of texts of one length, all of whose keys and values are kept.

    A pass over whole texts fills what is kept. A later one computes those of its part anew, and its
    tokens see the kept ones of the rest: what has changed there since they do not know.

    Args:
        kept: of each row; updated.
        begin: the first token that the pass reads.
        length: of the texts.
    """

    kept: Sequence[KeptKeysValues]
    begin: int
    length: int

    def exchange(
        self,
        number: int,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
    ) -> tuple[Float[Tensor, "batch kv ctx dim"], Float[Tensor, "batch kv ctx dim"]]:
        """Keep the keys and values of the tokens read in branch `number`; return those of all."""
        if k.shape[2] == self.length:
            for row, kept in enumerate(self.kept):
                kept[number] = k[row].clone(), v[row].clone()
            return k, v
        part = slice(self.begin, self.begin + k.shape[2])
        for row, kept in enumerate(self.kept):
            for mine, new in zip(kept[number], (k, v), strict=True):
                mine[:, part] = new[row]
        keys, values = zip(*(kept[number] for kept in self.kept), strict=True)
        return torch.stack(keys), torch.stack(values)
