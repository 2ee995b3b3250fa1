import torch

from kernels.rotary import rotary_frequencies, rotary_tables, rotate


def test_rotation_and_its_gradient_equal_complex_multiplication() -> None:
    """In float64 up to the fp32 tables; the pair (i, i + dim/2) is one complex number."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 8, requires_grad=True)
    cos, sin = rotary_tables(torch.arange(7), rotary_frequencies(8, 10000.0, torch.device("cpu")))
    angle = torch.arange(7.0)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    twin = x.detach().double().requires_grad_()
    turned = torch.complex(twin[..., :4], twin[..., 4:]) * torch.polar(
        torch.ones_like(angle), angle
    )
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    out = rotate(x, cos, sin)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(2, 3, 7, 8)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(x.grad.double(), twin.grad, rtol=1e-5, atol=1e-5)


def test_rotated_products_depend_on_distance_only() -> None:
    cos, sin = rotary_tables(torch.arange(32), rotary_frequencies(16, 10000.0, torch.device("cpu")))
    q, k = torch.randn(16).expand(1, 1, 32, 16), torch.randn(16).expand(1, 1, 32, 16)
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2))[0, 0]
    for shift in (1, 5):
        torch.testing.assert_close(
            scores[shift:, shift:], scores[:-shift, :-shift], rtol=1e-4, atol=1e-4
        )
