"""How many bits of biographies a model has learnt (Allen-Zhu and Li, arXiv 2404.05405).

    p1      nats of a person's name, summed over its tokens, mean over people
    p2      nats of the person's values, summed over theirs
    bits    N log2(N0 / e^p1) + N log2(S0 / e^p2), at least 0 each
    most    N log2(N0 / N) + N log2 S0: all values known, and of names that they are these N
    recall  the share of values that are recalled exactly: each token is the likeliest

N0 names are possible, and S0 is the product of the numbers of values; each name and value includes
the character after it, so that none is the beginning of another.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.contract import logits
from models.sizes import num_embedding_parameters, num_parameters
from runner.data.people_config import PeopleConfig
from runner.data.people_corpus import PeopleCorpus
from runner.evaluate.people_config import CapacityConfig, people_of
from runner.records.contracts import Trained

_NAME, _VALUE = 1, 2


@dataclass(frozen=True)
class Capacity:
    """Bits that N people hold and that are learnt of them.

    Args:
        names_nats, values_nats: p1 and p2.
        value_recall: the share of values that are recalled.
    """

    people: PeopleConfig
    names_nats: float
    values_nats: float
    value_recall: float

    @property
    def bits(self) -> float:
        """The bits that are learnt, R x parameters."""
        people, count = self.people, self.people.num_people
        names = math.log2(people.num_names) - self.names_nats / math.log(2)
        values = people.bits_per_person - self.values_nats / math.log(2)
        return count * (max(0.0, names) + max(0.0, values))

    @property
    def most(self) -> float:
        """The bits that there are to learn, Rmax x parameters."""
        people, count = self.people, self.people.num_people
        return count * (math.log2(people.num_names / count) + people.bits_per_person)


def measure_capacity(cfg: CapacityConfig, trained: Trained) -> dict[str, float]:
    """Return p1, p2, recall, bits, and bits per parameter with embeddings and without.

    Of people who tell the same in several wordings, the mean over wordings counts.
    """
    people = people_of(cfg, trained)
    corpus = PeopleCorpus(people, trained.corpus.tokenizer)
    found = _learnt(cfg, trained, corpus)
    model, vocab = trained.cfg.model, trained.corpus.tokenizer.vocab_size
    parameters = num_parameters(model, vocab)
    without = parameters - num_embedding_parameters(model, vocab)
    if getattr(model, "tied", False):  # the table counts as the head's
        without -= vocab * int(model.width)
    return {
        "names_nats": found.names_nats,
        "values_nats": found.values_nats,
        "value_recall": found.value_recall,
        "bits": found.bits,
        "bits_per_parameter": found.bits / parameters,
        "bits_per_parameter_without_embeddings": found.bits / without,
        "most_bits_per_parameter": found.most / parameters,
    }


@torch.no_grad()
def _learnt(cfg: CapacityConfig, trained: Trained, corpus: PeopleCorpus) -> Capacity:
    """Return what is learnt of each person; every rank computes all."""
    count = min(cfg.num_people, corpus.cfg.num_people)
    texts = [(n, t) for n in range(count) for t in range(corpus.cfg.templates_train)]
    sums, device = torch.zeros(3, dtype=torch.float64), trained.ranks.device
    recalled = num_values = 0
    for first in range(0, len(texts), cfg.batch_size):
        told = [
            corpus.told(corpus.people.biography(n, t))
            for n, t in texts[first : first + cfg.batch_size]
        ]
        ids, kinds = (
            torch.nn.utils.rnn.pad_sequence(
                [torch.from_numpy(row[part].astype("int64")) for row in told], batch_first=True
            )
            for part in (0, 2)
        )
        with trained.precision.autocast():
            scores = logits(trained.model, ids[:, :-1].to(device))
        nats = -scores.double().log_softmax(-1).cpu().gather(2, ids[:, 1:, None])[..., 0]
        for kind in (_NAME, _VALUE):
            sums[kind] += nats[kinds[:, 1:] == kind].sum()
        wrong = _wrong_tokens(scores.argmax(-1).cpu() != ids[:, 1:], kinds[:, 1:] == _VALUE)
        recalled, num_values = recalled + int((wrong == 0).sum()), num_values + len(wrong)
    names, values = (float(sums[kind]) / len(texts) for kind in (_NAME, _VALUE))
    return Capacity(corpus.cfg, names, values, recalled / num_values)


def _wrong_tokens(wrong: Tensor, in_value: Tensor) -> Tensor:
    """Return the number of wrong tokens in each value of texts [batch, seq]; other text parts them.

    Args:
        wrong: of each token, whether another one is likelier.
        in_value: whether it is of a value.
    """
    begins = in_value & ~torch.nn.functional.pad(in_value[:, :-1], (1, 0))
    number = begins.flatten().cumsum(0) - 1
    return torch.bincount(number[in_value.flatten()], weights=wrong[in_value].double())
