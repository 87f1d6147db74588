"""Continuous flows: log-densities, draws and traces against a linear field, whose answer is known, and what the solver's error costs."""

import numpy as np
import pytest
import torch

from sbiplat.nets import continuous, flows
from sbiplat.nets.continuous import CHARGE, FINER, ContinuousFlow, Velocity, signs, solve

A = torch.tensor([[0.4, 0.3, 0.0], [-0.2, -0.5, 0.1], [0.6, 0.0, 0.2]])


def linear_flow(trace, hidden, A=A):
    """A flow with v = A z, through random weights whose product is A and an activation that is none."""
    dim = len(A)
    flow = ContinuousFlow(dim, 1, hidden, 6, trace).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in flow.parameters():
            p.zero_()  # no shifts, and gates of 1
        product = torch.eye(dim)
        for layer in flow.velocity.layers[:-1]:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.weight.shape[1] ** 0.5)
            product = layer.weight @ product
        flow.velocity.layers[-1].weight.copy_(A @ torch.linalg.pinv(product))
    flow.velocity.bend = lambda h: (h, torch.ones_like(h))
    return flow


def base(z):
    return flows.standard_normal_log_prob(z)


@pytest.mark.parametrize("hidden", [(5,), (6, 4), (6, 5, 4)])
def test_the_density_and_the_draws_of_a_linear_flow_are_known(hidden):
    """dz / dt = A z over [0, 1]: draws are exp(A) z_0, and log q(w) = log N(exp(-A) w) - tr A."""
    flow, w = linear_flow("exact", hidden), torch.tensor([[0.4, -1.0, 0.3], [2.0, 0.3, -1.5]])
    with torch.no_grad():
        found = flow.log_prob(w, torch.zeros(2, 1))
        draws = flow.sample(torch.zeros(2, 1), 50, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, base(w @ torch.linalg.matrix_exp(-A).mT) - A.trace(), rtol=1e-4, atol=1e-4)
    noise = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(draws, noise @ torch.linalg.matrix_exp(A).mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hidden", [(6, 4), (6, 5, 4)])
def test_hutchinsons_estimate_is_unbiased_and_each_probe_gives_its_quadratic_form(hidden):
    """With v = A z a probe e gives log q - (e' A e - tr A); the mean over probes is log q within its standard error."""
    flow, w, context = linear_flow("hutchinson", hidden), torch.tensor([[0.4, -1.0, 0.3]]), torch.zeros(1, 1)
    exact = base(w @ torch.linalg.matrix_exp(-A).mT) - A.trace()
    found, forms = [], []
    for seed in range(100):
        flow.probes = signs((1, 1, 3), torch.Generator().manual_seed(seed))
        with torch.no_grad():
            found.append(flow.log_prob(w, context))
        forms.append(flow.probes[0, 0] @ A @ flow.probes[0, 0])
    found, forms = torch.cat(found), torch.stack(forms)
    torch.testing.assert_close(found, exact - (forms - A.trace()), rtol=1e-4, atol=1e-4)
    error = found.std() / 100**0.5
    assert error > 0.01, "one probe alone is off"
    assert abs(float(found.mean() - exact)) < 4 * error


def test_the_steps_converge_with_order_five():
    A = torch.tensor([[0.0, 6.0], [-6.0, -1.0]], dtype=torch.float64)
    z = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    exact = z @ torch.linalg.matrix_exp(A).mT
    error = [float((solve(lambda z, t: (z @ A.mT, z[..., 0]), z, steps, back=False)[0] - exact).norm()) for steps in (8, 16, 32)]
    assert np.log2(error[0] / error[1]) == pytest.approx(5, abs=0.5)
    assert np.log2(error[1] / error[2]) == pytest.approx(5, abs=0.5)


def test_the_integral_has_the_same_sign_both_ways():
    for back in (False, True):
        total = solve(lambda z, t: (0 * z, 3 * t**2 + 0 * z[..., 0]), torch.zeros(4, 2), 2, back=back)[1]
        torch.testing.assert_close(total, torch.ones(4))


def test_the_reported_error_is_above_the_solvers_own():
    A = torch.tensor([[0.0, 9.0], [-9.0, 0.0]])
    w = torch.tensor([[1.0, 0.5]])
    noise, _, reported = solve(lambda z, t: (z @ A.mT, 0 * z[..., 0]), w, 6, back=True, errors=True)
    off = float((base(noise) - base(w @ torch.linalg.matrix_exp(-A).mT)).abs())
    assert off > 1e-3, "six steps are too few for a turn of 9 rad"
    assert CHARGE * float(reported) > off, "what a wrong solution could gain costs more"


def test_training_is_charged_for_the_reported_error_and_evaluation_takes_finer_steps():
    A, w, context = torch.tensor([[0.0, 9.0], [-9.0, 0.0]]), torch.tensor([[1.0, 0.5]]), torch.zeros(1, 1)
    flow, exact = linear_flow("exact", (4, 4), A), float(base(w @ torch.linalg.matrix_exp(-A).mT))
    coarse, _, reported = solve(lambda z, t: (z @ A.mT, 0 * z[..., 0]), w, 6, back=True, errors=True)
    with torch.no_grad():
        charged, fine = float(flow.train().log_prob(w, context)), float(flow.eval().log_prob(w, context))
    assert charged == pytest.approx(float(base(coarse) - CHARGE * reported), rel=1e-3)
    assert abs(fine - exact) < 0.1 * abs(float(base(coarse)) - exact)


def velocity(dim, hidden):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Velocity(dim, 3, hidden).double()
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.4)
    return net


@pytest.mark.parametrize("hidden", [(7,), (7, 5), (7, 5, 6)])
@pytest.mark.parametrize("dim", [1, 2, 12])
def test_the_trace_is_that_of_the_jacobian(dim, hidden):
    net, generator = velocity(dim, hidden), torch.Generator().manual_seed(0)
    z = torch.randn(4, dim, generator=generator, dtype=torch.float64)
    conditions = net.from_context(torch.randn(4, 3, generator=generator, dtype=torch.float64)) + net.at(torch.tensor(0.3, dtype=torch.float64))
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda u, c=c: net(u, c)[0], u) for u, c in zip(z, conditions, strict=True)])
    _, slopes = net(z, conditions)
    torch.testing.assert_close(net.trace(slopes), torch.einsum("nii->n", jacobian))
    probes = signs((20, 1, dim), generator).double().expand(-1, 4, -1)
    torch.testing.assert_close(net.estimate(slopes, probes), torch.einsum("kni,nij,knj->kn", probes, jacobian, probes).mean(0))


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_log_prob_is_one_function_whatever_is_evaluated_beside(trace):
    flow, generator = linear_flow(trace, (6, 4)), torch.Generator().manual_seed(5)
    z = torch.randn(40, 3, generator=generator)
    before = torch.get_rng_state()
    with torch.no_grad():
        together, again = (flow.log_prob(z, torch.zeros(40, 1)) for _ in range(2))
        alone = torch.cat([flow.log_prob(z[k:k + 1], torch.zeros(1, 1)) for k in range(40)])
    assert torch.equal(together, again)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_training_with_hutchinson_draws_probes_afresh_for_every_row():
    flow, z = linear_flow("hutchinson", (6, 4)).train(), torch.ones(40, 3)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        first, second = (flow.log_prob(z, torch.zeros(40, 1)) for _ in range(2))
    assert len(first.unique()) > 1, "rows that are alike get probes of their own"
    assert not torch.equal(first, second)


def fitted_to_a_ring(monkeypatch, charge):
    """log q after a short training on a thin ring in two steps: as those two find it, as log_prob says, and with 32 times as many."""
    monkeypatch.setattr(continuous, "CHARGE", charge)
    generator = torch.Generator().manual_seed(0)
    angle, radius = 2 * torch.pi * torch.rand(2000, generator=generator), 1.5 + 0.05 * torch.randn(2000, generator=generator)
    w, context = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1), torch.zeros(2000, 1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        flow = ContinuousFlow(2, 1, (32, 32), 2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(250):
        rows = torch.randint(0, 2000, (128,), generator=generator)
        optimizer.zero_grad()
        (-flow.train().log_prob(w[rows], context[rows]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()

    def found(steps):
        flow.steps = steps // FINER
        with torch.no_grad():
            return float(flow.eval().log_prob(w, context).mean())

    return found(2), found(4), found(64)


def test_a_flow_that_is_not_charged_learns_to_be_solved_wrongly_and_one_that_is_does_not(monkeypatch):
    trained, _, exact = fitted_to_a_ring(monkeypatch, 0.0)
    assert trained - exact > 0.5
    _, said, exact = fitted_to_a_ring(monkeypatch, CHARGE)
    assert said == pytest.approx(exact, abs=0.05)
    assert exact > -2.5, "N(0, I) gives the ring -2.96"
