"""Ready-made actions: the laws of groups, closed forms, and kernels that are densities over the group's measure."""

import math
import subprocess
import sys

import pytest
import torch
from scipy import stats

import sbiplat as sp
from sbiplat.errors import SymmetryError
from sbiplat.symmetry import (
    Euclidean2,
    ImageRotation,
    Permutation,
    Phase,
    Product,
    Rotation2D,
    Rotation3D,
    Scaling,
    SpectrumShift,
    TimeShift,
    Translation,
    Units,
)
from sbiplat.symmetry.frame import centred
from simulators import rotated_galaxy


def draw(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=4):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_actions_are_reached_and_made_without_torch():
    code = ("import sys, sbiplat as sp; s = sp.symmetry; "
            "s.Product(s.TimeShift('t', 0.1), s.Rotation3D(('a', 'b', 'c'), 'v'), s.Permutation(), s.Units({'m': 1}, {'x': 2})); "
            "assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------- how they act


def test_translation_adds_to_the_last_axis():
    x = {"x": draw(4, 7, 2), "y": draw(4)}
    moved = Translation(("a", "b")).act_data(torch.tensor([[1.0, -2.0]] * 4, dtype=torch.float64), x)
    assert torch.equal(moved["x"], x["x"] + torch.tensor([1.0, -2.0]))
    assert moved["y"] is x["y"]
    assert torch.equal(Translation("a").act_data(torch.full((4, 1), 3.0), x)["x"], x["x"] + 3)


def test_units_change_each_by_its_power():
    action = Units({"length": 2, "volume": 6, "count": 0}, {"x": 2, "y": -4})
    theta = uniform(5, 3) + 0.1
    moved, log_det = action.act_theta(torch.full((5, 1), math.log(3), dtype=torch.float64), theta)
    assert torch.allclose(moved, theta * torch.tensor([9.0, 729.0, 1.0], dtype=torch.float64))
    assert torch.allclose(log_det, torch.full((5,), 8 * math.log(3), dtype=torch.float64))
    x = action.act_data(torch.full((5, 1), math.log(3), dtype=torch.float64), {"x": torch.ones(5, 2), "y": torch.ones(5)})
    assert torch.allclose(x["x"], torch.tensor(9.0))
    assert torch.allclose(x["y"], torch.tensor(3.0**-4))


def test_a_phase_turns_complex_amplitudes_by_its_order():
    z = torch.complex(draw(3, 5), draw(3, 5, seed=9))
    g = draw(3, 1)
    pairs = torch.stack([z.real, z.imag], -2)
    moved = Phase("phi", axis=-2, order=2, fold=2).act_data(g, {"x": pairs})["x"]
    assert torch.allclose(torch.complex(*moved.unbind(-2)), z * torch.exp(2j * g))


@pytest.mark.parametrize("action", [Phase("phi", low=0.0), Rotation2D("phi", low=0.0)])
def test_angles_wrap_into_their_range(action):
    theta = torch.tensor([[6.0], [0.5], [0.0]], dtype=torch.float64)
    moved, _ = action.act_theta(torch.tensor([[1.0], [-1.0], [-1e-17]], dtype=torch.float64), theta)
    assert torch.allclose(moved[:2, 0], torch.tensor([7.0 - 2 * math.pi, 2 * math.pi - 0.5], dtype=torch.float64))
    assert 0 <= moved[2, 0] < 2 * math.pi, "rounding does not leave the prior's support"


def blob(x, y, angle, pixels=33):
    """An elliptic Gaussian, (1, pixels, pixels)."""
    place = torch.arange(pixels, dtype=torch.float64) - (pixels - 1) / 2
    b, a = torch.meshgrid(place - y, place - x, indexing="ij")
    along, across = a * math.cos(angle) + b * math.sin(angle), b * math.cos(angle) - a * math.sin(angle)
    return torch.exp(-0.5 * ((along / 3.5) ** 2 + (across / 2.5) ** 2))[None]


@pytest.mark.parametrize(("mode", "error"), [("bilinear", 0.03), ("bicubic", 0.02)])
def test_an_image_is_moved_as_its_centre_and_angle_are(mode, error):
    action = Euclidean2(("angle", "x", "y"), mode=mode, low=0.0, fold=2)
    theta, g = torch.tensor([[2.9, 3.0, -1.5]], dtype=torch.float64), torch.tensor([[0.7, -2.2, 1.3]], dtype=torch.float64)
    moved, _ = action.act_theta(g, theta)
    found = action.act_data(g, {"x": blob(*theta[0, 1:].tolist(), theta[0, 0].item())})["x"]
    assert (found - blob(*moved[0, 1:].tolist(), moved[0, 0].item())).abs().max() < error
    assert 0 <= moved[0, 0] < math.pi


def test_quarter_turns_of_square_images_are_exact():
    x = draw(2, 3, 8, 8)
    moved = ImageRotation("a", mode="bilinear").act_data(torch.full((2, 1), math.pi / 2, dtype=torch.float64), {"x": x})["x"]
    assert torch.allclose(moved, torch.rot90(x, -1, (-2, -1)), atol=1e-12), "from the last axis (X) to the one before (Y)"


def rotation(alpha, cos_beta, gamma):
    """Rz(alpha) Ry(beta) Rz(gamma)."""
    def z(a):
        return torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]], dtype=torch.float64)
    s = math.sqrt(1 - cos_beta**2)
    y = torch.tensor([[cos_beta, 0, s], [0, 1, 0], [-s, 0, cos_beta]], dtype=torch.float64)
    return z(alpha) @ y @ z(gamma)


def test_rotations_of_space_are_euler_angles_zyz():
    action = Rotation3D(("alpha", "cos_beta", "gamma"))
    theta = torch.tensor([[1.0, -0.3, 5.0], [4.0, 0.9, 0.2]], dtype=torch.float64)
    vectors = draw(2, 6, 3)
    turned = action.act_data(action.pose_of(theta), {"x": vectors})["x"]
    assert torch.allclose(turned, torch.stack([v @ rotation(*t.tolist()).T for v, t in zip(vectors, theta, strict=True)]), atol=1e-12)
    assert torch.allclose(action.unchart(action.chart(theta)[0]), theta)


def test_a_uniform_rotation_stays_uniform_in_the_angles():
    """cos_beta uniform is Haar: the angles of g times a uniform rotation are uniform again."""
    action = Rotation3D(("alpha", "cos_beta", "gamma"))
    span = torch.tensor([2 * math.pi, 2.0, 2 * math.pi], dtype=torch.float64)
    theta = uniform(4000, 3) * span - torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    moved, log_det = action.act_theta(action.exp(draw(1, 3).repeat(4000, 1)), theta)
    share = (moved + torch.tensor([0.0, 1.0, 0.0])) / span
    assert all(stats.kstest(share[:, k].numpy(), "uniform").pvalue > 1e-3 for k in range(3))
    assert not log_det.any()


def test_a_set_is_sorted_with_all_its_fields():
    action = Permutation(("place", "size"), by=1)
    x = {"place": draw(3, 6, 2), "size": draw(3, 6)}
    g = action.identity(3)
    there = action.act_data(g, x)
    assert (there["place"][..., 1].diff(dim=1) >= 0).all()
    order = x["place"][..., 1].argsort(dim=1)
    assert torch.equal(there["size"], x["size"].gather(1, order))
    mixed = action.act_data(g, action.scramble(x, torch.Generator().manual_seed(1)))
    assert all(torch.equal(mixed[k], there[k]) for k in x)
    rows = Permutation(axis=1, by=0).act_data(g, {"x": x["place"].movedim(1, 2)})["x"]
    assert (rows[:, 0].diff(dim=1) >= 0).all()


# ------------------------------------------------------------------------------------------------------ the kernel

SMALL = [Translation(("a", "b")), Scaling("s"), Phase("phi", low=0.0), Phase("phi", order=2, fold=2), Euclidean2(("a", "x", "y"), fold=2),
         Rotation3D(("a", "b", "c")), Product(Phase("phi"), Translation("a"))]


@pytest.mark.parametrize("action", [Translation(("a", "b")), Phase("phi"), Phase("phi", order=2, fold=2), Euclidean2(("a", "x", "y"), fold=2),
                                    Product(Phase("phi"), Translation("a"))], ids=repr)
@pytest.mark.parametrize("width", [0.3, 1.5])
def test_a_kernel_integrates_to_one_over_the_group(action, width):
    """A grid over coordinates, angles over a whole turn; flat measure."""
    around = {"phi", "a"} if not isinstance(action, Translation | Product) else {"phi"}
    axes = []
    for name in action.coordinates:
        half = math.pi if name in around else 6 * width
        axes.append((torch.arange(60, dtype=torch.float64) + 0.5) / 60 * 2 * half - half)
    v = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    pose = action.exp(draw(1, len(axes)))
    proxy = action.compose(pose.expand(len(v), -1), action.exp(v))
    density = action.log_kernel(proxy, pose.expand(len(v), -1), torch.full((len(axes),), width, dtype=torch.float64)).exp()
    cell = math.prod((a[1] - a[0]).item() for a in axes)
    assert density.sum().item() * cell == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("widths", [(0.3, 0.3, 0.3), (0.2, 0.9, 0.5)])
def test_the_kernel_on_rotations_integrates_to_one_over_haar(widths):
    """Haar uniform rotations, total volume 8 pi^2, by importance sampling from the kernel with other widths mixed with Haar."""
    action, widths = Rotation3D(("a", "b", "c")), torch.tensor(widths, dtype=torch.float64)
    n, pose = 200_000, action.exp(draw(1, 3)).repeat(200_000, 1)
    haar = torch.nn.functional.normalize(draw(n, 4), dim=-1)
    near = action.blur(pose, 1.2 * widths, torch.Generator().manual_seed(2))
    proxy = torch.where(uniform(n, 1) < 0.5, haar, near)
    mixture = torch.logaddexp(action.log_kernel(proxy, pose, 1.2 * widths), torch.tensor(-math.log(8 * math.pi**2))) - math.log(2)
    ratio = (action.log_kernel(proxy, pose, widths) - mixture).exp()
    assert abs(ratio.mean().item() - 1) < 5 * ratio.std().item() / math.sqrt(n) + 1e-4


def test_the_measure_of_rotation_vectors_is_haar():
    """Over the ball |v| < pi the density of log_volume has the volume 8 pi^2; the share within an angle t is (t - sin t) / pi."""
    action = Rotation3D(("a", "b", "c"))
    r = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000 * math.pi
    shell = 4 * math.pi * r.square() * action.log_volume(torch.stack([r, 0 * r, 0 * r], -1)).exp() * math.pi / 20000
    assert shell.sum().item() == pytest.approx(8 * math.pi**2, rel=1e-6)
    haar = action.log(torch.nn.functional.normalize(draw(5000, 4), dim=-1)).norm(dim=-1)
    assert stats.kstest(haar.numpy(), lambda t: (t - torch.sin(torch.as_tensor(t)).numpy()) / math.pi).pvalue > 1e-3


@pytest.mark.parametrize("action", SMALL, ids=repr)
@pytest.mark.parametrize("width", [0.3, 1.2])
def test_blurred_poses_follow_the_kernel(action, width):
    """E_K[K'/K] = 1 for another normalised density K', and for K' = K exactly: so a draw's density is that of log_kernel."""
    n, widths = 20_000, torch.full((len(action.coordinates),), width, dtype=torch.float64)
    pose = action.exp(draw(1, len(widths))).repeat(n, 1)
    proxy = action.blur(pose, widths, torch.Generator().manual_seed(8))
    ratio = (action.log_kernel(proxy, pose, 0.8 * widths) - action.log_kernel(proxy, pose, widths)).exp()
    assert abs(ratio.mean().item() - 1) < 5 * ratio.std().item() / math.sqrt(n)
    wrong = (action.log_kernel(proxy, pose, 0.7 * widths) - action.log_kernel(proxy, pose, 0.8 * widths)).exp()
    assert abs(wrong.mean().item() - 1) > 5 * wrong.std().item() / math.sqrt(n), "draws of another width would be seen"


@pytest.mark.parametrize("action", [Phase("phi", low=0.0), Phase("phi", order=2, fold=2, low=0.0), ImageRotation("phi", fold=4, low=0.0),
                                    Euclidean2(("phi", "x", "y"), fold=2, low=0.0), rotated_galaxy.Motion(),
                                    Product(Phase("phi", order=3, fold=3, low=0.0), Translation("t"))], ids=repr)
def test_poses_on_both_sides_of_where_an_angle_wraps_are_near(action):
    """theta a little below low + period and a little above low: between them is the small angle, and the centre's move keeps its sign."""
    period = math.pi if isinstance(action, rotated_galaxy.Motion) else 2 * math.pi / action.factors[0].fold
    theta = torch.zeros(2, len(action.parameters), dtype=torch.float64)
    theta[:, 0] = torch.tensor([0.1, period - 0.1])
    theta[:, 1:] = torch.tensor([[0.3], [0.5]])
    pose = action.pose_of(theta)
    v = action.between(pose[[0, 0, 1, 1]], pose[[0, 1, 0, 1]])
    assert torch.allclose(v[:, 0], torch.tensor([0.0, -0.2, 0.2, 0.0], dtype=torch.float64), atol=1e-12)
    turned = math.cos(0.1) if v.shape[1] == 3 else 1.0
    assert v[1, 1:].sum().item() == pytest.approx(0.2 * turned * (v.shape[1] - 1)), "the centre's move, as seen from the first pose"
    spread = centred(action, action.pose_of(torch.cat([theta[:1].expand(500, -1), theta[1:].expand(501, -1)]))[None])[1]
    assert spread[..., 0].std() < 0.11, "chains on both sides are no two modes"
    naive = action.log(action.compose(action.inverse(pose[:1]), pose[1:]))
    assert len(action.stabiliser()) == 1 or naive[0, 0].abs() > 1, "power: elements alone are far apart"


@pytest.mark.parametrize("action", SMALL, ids=repr)
def test_the_kernel_is_equivariant_and_widths_may_differ_by_row(action):
    n, dim = 50, len(action.coordinates)
    widths = 0.2 + uniform(n, dim)
    pose, h = action.exp(draw(n, dim)), action.exp(draw(n, dim, seed=11))
    proxy = action.blur(pose, widths, torch.Generator().manual_seed(8))
    moved = action.log_kernel(action.compose(h, proxy), action.compose(h, pose), widths)
    assert torch.allclose(moved, action.log_kernel(proxy, pose, widths), atol=1e-6)


# --------------------------------------------------------------------------------------------------------- products


def test_factors_of_a_product_act_on_their_own_part():
    action = Product(TimeShift("t", 0.5), Product(Scaling("s"), Permutation("y")))
    assert action.parameters == action.coordinates == ("t", "s")
    assert len(action.factors) == 3
    theta, g = uniform(4, 2) + 0.5, draw(4, 2)
    moved, log_det = action.act_theta(g, theta)
    assert torch.allclose(moved, torch.stack([theta[:, 0] + g[:, 0], theta[:, 1] * g[:, 1].exp()], -1))
    assert torch.allclose(log_det, g[:, 1])
    x = {"x": draw(4, 9), "y": draw(4, 3)}
    found = action.act_data(g, x)
    assert torch.allclose(found["x"], TimeShift("t", 0.5).act_data(g[:, :1], x)["x"] * g[:, 1:].exp())
    assert torch.equal(found["y"], x["y"].sort(dim=1).values)


def test_a_product_sums_its_kernel_over_all_preimages():
    action = Product(Phase("a"), Rotation3D(("b", "c", "d")))
    v = 0.4 * draw(5, 4)
    widths = torch.full((4,), 0.7, dtype=torch.float64)
    by_factor = action.log_kernel(action.exp(v), action.identity(5), widths)
    parts = [(-0.5 * (w / widths).square() - widths.log() - 0.5 * math.log(2 * math.pi)).sum(-1) - action.log_volume(w) for w in action.preimages(v)]
    assert torch.allclose(by_factor, torch.logsumexp(torch.stack(parts), 0))


@pytest.mark.parametrize("make", [
    lambda: Product(TimeShift("t", 1.0), TimeShift("t", 1.0)), lambda: Product("t"), lambda: Product(),
    lambda: Units({"a": 0, "b": 1}, {"x": 1}), lambda: Units({"a": "big"}, {"x": 1}), lambda: Phase("p", axis=2), lambda: Phase("p", fold=0),
    lambda: Phase("p", order=3, fold=2), lambda: ImageRotation("a", mode="cubic"), lambda: Euclidean2(("a", "x")),
    lambda: Euclidean2(("a", "x", "x")), lambda: Rotation3D(("a", "b")), lambda: Permutation(by=-1), lambda: Translation(()),
    lambda: SpectrumShift("t", df=-1.0),
])
def test_impossible_actions_are_one_line(make):
    with pytest.raises(SymmetryError) as told:
        make()
    assert "\n" not in str(told.value)


def test_the_front_door_leads_to_them():
    assert sp.symmetry.TimeShift is TimeShift
    assert "symmetry" in dir(sp)
