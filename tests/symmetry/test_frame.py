"""theta as it is seen from a proxy and in units of an adaptive kernel's f, beside finite differences; with a factor that moves nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import sbiplat as sp
from sbiplat.symmetry import GroupAction, Product, Rotation2D, Scaling, Translation
from sbiplat.symmetry.frame import PROXY, Frame, Sight


@dataclass(frozen=True)
class Difference(GroupAction):
    """The pose is a - b, derived; approximate, and it moves nothing."""

    parameters = ("a", "b")
    coordinates = ("difference",)
    exact = False
    moves = False

    def pose_of(self, theta):
        return (theta[:, 0] - theta[:, 1])[:, None]

    def act_data(self, g, x):
        return x

    def act_theta(self, g, theta):
        return theta, theta.new_zeros(len(theta))


PRIOR = sp.Prior({"b": sp.Uniform(-1, 2), "turn": sp.Uniform(-math.pi, math.pi), "s": sp.LogUniform(0.1, 20), "a": sp.Normal(0.5, 2),
                  "free": sp.Normal(0, 1)})
ACTION = Product(Difference(), Scaling("s"), Translation("a"), Rotation2D("turn"))
WIDTHS = (0.2, 0.1, 0.3, 0.4)
MOVED_BY = {"s": 1, "a": 2, "turn": 3}  # the coordinate of each moved parameter


def case(rows=6):
    generator = torch.Generator().manual_seed(4)
    draw = torch.randn(3, rows, 5, dtype=torch.float64, generator=generator)
    frame = Frame(ACTION, PRIOR, WIDTHS, (True, False, True, False), adaptive=True)
    z, log_f = 0.7 * draw[0], draw[2][:, :4]
    return frame, z, frame.action.blur(frame.pose(z), frame.kernel_widths(z, log_f), generator), log_f


def jacobian(f, z, step=1e-6):
    columns = [(f(z + step * e) - f(z - step * e)) / (2 * step) for e in torch.eye(z.shape[1], dtype=z.dtype)]
    return torch.stack(columns, -1)


@pytest.mark.parametrize("units", ["its own", "f"])
def test_log_det_is_that_of_finite_differences(units):
    frame, z, proxy, log_f = case()
    stretch = log_f if units == "f" else None
    found = frame.to_relative(z, proxy, stretch)[1]
    exact = torch.linalg.slogdet(jacobian(lambda z: frame.to_relative(z, proxy, stretch)[0], z)).logabsdet
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)
    other = frame.to_relative(z, proxy, None if stretch is not None else log_f)[1]
    assert ((other - exact).abs() > 1e-3).all()


def test_theta_comes_back_from_its_frame():
    frame, z, proxy, log_f = case()
    back, inside = frame.from_relative(frame.to_relative(z, proxy, log_f)[0], proxy, log_f)
    assert inside.all()
    torch.testing.assert_close(back, z, atol=1e-9, rtol=0)
    assert not torch.allclose(frame.from_relative(frame.to_relative(z, proxy, log_f)[0], proxy)[0], z, atol=1e-3)


def test_each_moved_parameter_is_in_units_of_its_own_factors_f():
    frame, z, proxy, log_f = case()
    plain, scaled = frame.to_relative(z, proxy)[0], frame.to_relative(z, proxy, log_f)[0]
    for k, name in enumerate(PRIOR.names):
        by = torch.zeros(len(z), dtype=z.dtype) if name not in MOVED_BY else log_f[:, MOVED_BY[name]]
        torch.testing.assert_close(scaled[:, k], plain[:, k] * (-by).exp())


def test_a_factor_that_moves_nothing_widens_its_kernel_alone():
    frame, z, proxy, log_f = case()
    wider = log_f.clone()
    wider[:, 0] += 1.0
    one, other = (frame.to_relative(z, proxy, f) for f in (log_f, wider))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    widths = frame.kernel_widths(z, wider) / frame.kernel_widths(z, log_f)
    torch.testing.assert_close(widths, torch.tensor([math.e, 1.0, 1.0, 1.0], dtype=torch.float64).expand(len(z), 4))


def test_the_net_is_told_the_proxy_log_f_and_the_centre_as_it_is_seen_from_the_proxy_where_x_tells_little():
    frame, z, proxy, log_f = case()
    centre = frame.action.blur(frame.pose(z), frame.kernel_widths(z), torch.Generator().manual_seed(1))
    x = {"x": torch.zeros(len(z), 2, dtype=torch.float64)}
    told = frame.standardise(x, proxy, Sight(log_f, centre))[PROXY]
    assert told.shape == (len(z), frame.numbers_told) == (len(z), 10)
    torch.testing.assert_close(told[:, :2], frame.action.log(proxy)[:, [0, 2]])
    torch.testing.assert_close(told[:, 2:6], log_f)
    seen = frame.action.log(frame.action.compose(frame.action.inverse(proxy), centre)) / frame.kernel_widths(proxy, log_f)
    torch.testing.assert_close(told[:, 6:], seen * (2 * log_f / math.log(2) - 1).clamp(0, 1))
    assert (told[:, 6:][log_f <= 0.5 * math.log(2)] == 0).all()
    torch.testing.assert_close(told[:, 6:][log_f > math.log(2)], seen[log_f > math.log(2)])
    rows = torch.tensor([3, 0, 3])
    look = frame.standardiser(x, Sight(log_f, centre))
    torch.testing.assert_close(look(proxy[rows], rows)[PROXY], told[rows])
