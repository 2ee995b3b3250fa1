import torch

from kernels.philox import NoiseKey, dropout, keep_mask, philox, random_words


def _words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([v]).int() for v in values)


def test_philox_gives_the_published_known_answers() -> None:
    """Random123's kat_vectors for philox4x32-10."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones,) * 4, (ones, ones), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ]
    for counter, key, answer in cases:
        assert [int(w) & 0xFFFFFFFF for w in philox(_words(*counter), key)] == [
            int(word, 16) for word in answer.split()
        ]


def test_words_depend_on_the_sample_not_on_its_batch() -> None:
    whole = random_words(NoiseKey(seed=1, step=5, samples=torch.arange(8)), 3, 10)
    part = random_words(NoiseKey(seed=1, step=5, samples=torch.tensor([6, 2])), 3, 10)
    assert torch.equal(part, whole[[6, 2]])
    assert not torch.equal(
        whole, random_words(NoiseKey(seed=1, step=6, samples=torch.arange(8)), 3, 10)
    )
    assert not torch.equal(
        whole, random_words(NoiseKey(seed=1, step=5, samples=torch.arange(8)), 4, 10)
    )


def test_dropout_keeps_the_stated_share() -> None:
    """n = 100,000 draws: the share lies within 5 standard deviations of 1 - drop."""
    mask = keep_mask(NoiseKey(seed=0, step=0, samples=torch.arange(100)), 0, 1000, 0.3)
    assert abs(mask.float().mean().item() - 0.7) < 5 * (0.3 * 0.7 / 1e5) ** 0.5
    x = torch.ones(2, 5)
    assert dropout(x, 0.3, None, 0) is x
