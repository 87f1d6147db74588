"""Our spline is zuko's, parameter by parameter, and its inverse is its inverse."""

import pytest
import torch
from zuko.transforms import MonotonicRQSTransform

from sbiplat.nets.spline import BOUND, Spline


def both(scale, dtype=torch.float64, rows=2000, bins=8):
    """Ours and zuko's, and x of which some lies outside of the splines' domain."""
    generator = torch.Generator().manual_seed(0)
    phi = (scale * torch.randn(rows, 3, 3 * bins - 1, generator=generator)).to(dtype).requires_grad_()
    x = (3 * torch.randn(rows, 3, generator=generator)).to(dtype)
    widths, heights, derivatives = phi.split([bins, bins, bins - 1], dim=-1)
    return Spline(torch.stack([widths, heights], -2), derivatives), MonotonicRQSTransform(widths, heights, derivatives), phi, x


@pytest.mark.parametrize("bins", [2, 8])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_values_densities_and_gradients_are_zukos(scale, bins):
    ours, theirs, phi, x = both(scale, bins=bins)
    assert 0.02 < (x.abs() > BOUND).double().mean() < 0.5
    (y, ladj), (their_y, their_ladj) = ours.call_and_ladj(x), theirs.call_and_ladj(x)
    torch.testing.assert_close(y, their_y)
    torch.testing.assert_close(ladj, their_ladj)
    own, their = (torch.autograd.grad((a * b).sum(), phi)[0] for a, b in ((y, ladj), (their_y, their_ladj)))
    torch.testing.assert_close(own, their, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.inv(y), x, rtol=1e-6, atol=1e-6)


def test_single_precision_loses_no_more_than_zukos():
    (ours, theirs, _, x), exact = both(1.0, torch.float32), both(1.0)[1]
    with torch.no_grad():
        true, true_ladj = exact.call_and_ladj(x.double())
        (y, ladj), (their_y, their_ladj) = ours.call_and_ladj(x), theirs.call_and_ladj(x)
        given = true.float()
        for own, their, right in ((y, their_y, true), (ladj, their_ladj, true_ladj), (ours.inv(given), theirs.inv(given), x)):
            assert (own - right).abs().mean() < 1.2 * (their - right).abs().mean()


def test_values_at_and_beside_the_knots_stay_finite_and_in_place():
    """Where rounding decides on the bin, and slopes next to one another differ by orders of magnitude."""
    ours, theirs, _, _ = both(30.0, torch.float32, rows=20_000)
    with torch.no_grad():
        for knots, there in ((theirs.horizontal, ours.call_and_ladj), (theirs.vertical, lambda y: (ours.inv(y), torch.zeros(())))):
            for to in (-torch.inf, torch.inf):
                for at in knots.unbind(-1):
                    value, ladj = there(torch.nextafter(at, torch.tensor(to)))
                    assert torch.isfinite(value).all()
                    assert torch.isfinite(ladj).all()
                    assert value.abs().max() <= BOUND * (1 + 1e-5)
