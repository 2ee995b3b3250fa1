"""What the tests check of every call into kernels, models and runner.generate."""

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from kernels.hadamard import with_signs
from runner.generate.engine import largest_chunk


def test_wrong_shapes_and_wrong_types_are_refused() -> None:
    bits = torch.zeros(8, dtype=torch.uint8)
    assert with_signs(torch.eye(8), bits).shape == (8, 8)
    with pytest.raises(TypeCheckError):
        with_signs(torch.eye(4), bits)
    with pytest.raises(BeartypeCallHintViolation):  # no shape in its signature
        largest_chunk(lambda _: 0.0, 1.0, most="8")  # type: ignore[arg-type]
