"""Conditional densities: normalised, sampled as they are scored, and right where the answer is known."""

import numpy as np
import pytest
import torch

from sbiplat.errors import SettingError
from sbiplat.nets import flows
from sbiplat.nets.made import MaskedInverse
from sbiplat.nets.noise import Common
from sbiplat.nets.standardise import Standardise, robust_scale, soft_clip
from sbiplat.observation import ObservationSpec


def made(name, dim, context=3, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        density = flows.build(name, dim, context, flows.Shape(transforms=2, hidden=(16, 16), bins=6, components=3, activation="silu")).eval()
        with torch.no_grad():  # away from the initial near-identity
            for p in density.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return density


def test_nflows_refuses_hidden_layers_of_several_widths():
    with pytest.raises(SettingError, match=r"hidden = \[16, 32\].*of one width; give one, such as \[16, 16\]"):
        flows.build("nflows_maf", 2, 3, flows.Shape(2, (16, 32), 6, 3, "silu"))


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("name", list(flows.FLOWS))
def test_density_integrates_to_one_and_draws_follow_it(name, dim):
    density, context = made(name, dim), torch.tensor([[0.3, -1.0, 0.5]])
    axis = torch.linspace(-20, 20, 8001 if dim == 1 else 501)
    grid = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    step = float(axis[1] - axis[0]) ** dim
    with torch.no_grad():
        p = density.log_prob(grid, context.expand(len(grid), -1)).double().exp()
        draws = density.sample(context, 40_000, torch.Generator().manual_seed(1))[0]
    assert float(p.sum()) * step == pytest.approx(1.0, abs=5e-3)
    mean = (p[:, None] * grid).sum(0) * step
    sd = ((p[:, None] * (grid - mean) ** 2).sum(0) * step).sqrt()
    assert torch.all((draws.mean(0) - mean).abs() < 5 * sd / 200)
    np.testing.assert_allclose(draws.std(0), sd, rtol=0.03)


@pytest.mark.parametrize("name", list(flows.FLOWS))
def test_each_context_gets_draws_of_its_own_density(name):
    """One released sampler mixes draws between conditions: a context's draws must not depend on its neighbours' contexts."""
    density = made(name, 2)
    contexts = torch.tensor([[0.0, 0.0, 0.0], [3.0, -3.0, 3.0]])
    with torch.no_grad():
        draws = density.sample(contexts, 4000, torch.Generator().manual_seed(0))
        own = density.log_prob(draws, contexts[:, None].expand(-1, 4000, -1)).mean(1)
        other = density.log_prob(draws, contexts.flip(0)[:, None].expand(-1, 4000, -1)).mean(1)
    assert torch.all(own > other + 0.05), "the divergence from the other context's density is positive"


@pytest.mark.parametrize("name", list(flows.FLOWS))
def test_sampling_is_seeded_and_leaves_the_global_generator_alone(name):
    density, context = made(name, 3), torch.zeros(1, 3)
    before = torch.get_rng_state()
    with torch.no_grad():
        a, b = (density.sample(context, 5, torch.Generator().manual_seed(s)) for s in (7, 7))
    assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("name", list(flows.FLOWS))
def test_draws_by_common_numbers_are_a_function_of_the_context(name, dim):
    """Whatever its neighbours are; and of about the mean and the spread that many draws have."""
    density, contexts = made(name, dim), torch.tensor([[0.0, 0.0, 0.0], [3.0, -3.0, 3.0], [0.3, -1.0, 0.5]])
    with torch.no_grad():
        all_of_them = density.sample(contexts, 32, Common(5))
        alone = density.sample(contexts[1:2], 32, Common(5))
        many = density.sample(contexts, 20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(all_of_them[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.equal(all_of_them, density.sample(contexts, 32, Common(6)))
    assert torch.all((all_of_them.std(1) / many.std(1)).log().abs() < 0.4)
    assert torch.all((all_of_them.mean(1) - many.mean(1)).abs() < 0.4 * many.std(1))


def test_standardisation_survives_heavy_tails_constants_and_one_wild_row():
    rng = np.random.default_rng(0)
    x = np.stack([rng.standard_cauchy(5000), np.full(5000, 7.0), rng.normal(1e6, 1e-2, 5000), np.r_[1e30, rng.normal(size=4999)]], axis=1)
    spec = ObservationSpec.declare((4,), dtype="float64")
    net = Standardise(spec)
    net.fit({"x": torch.as_tensor(x)})
    out = net({"x": torch.as_tensor(x)})["x"]
    assert torch.isfinite(out).all()
    assert out.abs().max() < 80
    assert float(out[:, 1].abs().max()) == 0.0
    assert 0.5 < float(out[:, 3].std()) < 6.0


def test_log_transform_takes_zeros_and_the_range_of_float64():
    spec = ObservationSpec.declare((2,), dtype="float64", transform="log")
    net = Standardise(spec, {"x": None})
    out = net({"x": torch.tensor([[1e-300, 0.0], [1e300, 1.0]], dtype=torch.float64)})["x"]
    assert torch.isfinite(out).all()
    assert float(out[0, 0]) == pytest.approx(np.log(1e-300), rel=1e-6)


def test_soft_clip_keeps_order_and_is_smooth_at_the_knee():
    u = torch.linspace(-1000, 1000, 200_001, dtype=torch.float64)
    c = soft_clip(u)
    assert torch.all(c.diff() > 0)
    slope = c.diff() / u.diff()
    assert float(slope.diff().abs().max()) < 0.01


def test_robust_scale_of_constant_features_is_one():
    loc, scale = robust_scale(np.full((100, 3), 2.5))
    np.testing.assert_array_equal(loc, 2.5)
    np.testing.assert_array_equal(scale, 1.0)


@pytest.mark.parametrize("name", ["nsf", "maf", "coupling_nsf", "bpf"])
@pytest.mark.parametrize("dim", [2, 3, 7])
def test_the_fast_inverse_is_zukos_own(name, dim):
    flow, context = made(name, dim).inner.flow, torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    y = torch.randn(4, 50, dim, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for transform in flow.transform.transforms:
            exact = transform(context[:, None].expand(-1, 50, -1)).inv(y)
            torch.testing.assert_close(MaskedInverse(transform)(y.movedim(-1, 0), context).movedim(0, -1), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("name", ["nsf", "coupling_nsf"])
def test_a_spline_flow_is_zukos_own(name, dim):
    """Weights, and so runs of before, mean the same."""
    import zuko

    ours, c = made(name, dim).inner.flow, torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    passes = {"passes": 2, "randperm": dim > 2} if name == "coupling_nsf" and dim > 1 else {}
    theirs = zuko.flows.NSF(dim, 3, bins=6, transforms=2, hidden_features=(16, 16), activation=torch.nn.SiLU, **passes)
    theirs.load_state_dict(ours.state_dict())
    z = 3 * torch.randn(200, dim, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(c).log_prob(z), theirs(c).log_prob(z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_the_head_whitens_as_its_matrices_do(dim):
    head, z, context = flows.GaussianHead(dim, 3), torch.randn(50, dim), torch.randn(50, 3)
    torch.nn.init.normal_(head.net.weight)
    mu, A, log_det = head(context)
    w, own = head.whiten(z, context)
    torch.testing.assert_close(w, (A @ (z - mu).unsqueeze(-1)).squeeze(-1), rtol=1e-4, atol=1e-4)
    for given in (own, log_det):
        torch.testing.assert_close(given, torch.linalg.slogdet(A)[1], rtol=1e-4, atol=1e-4)
