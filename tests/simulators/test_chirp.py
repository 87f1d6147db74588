"""The chirp: its physics against published figures and independent formulas, its symmetry, and its exact posterior."""

import math
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import kstest

import sbiplat as sp
from sbiplat.simulator import check
from simulators.chirp import FULL, SMALL, Network, chirp, chirp_full, full_signals, posterior_sampler, small_signals
from simulators.chirp_detectors import H1, L1, SIDEREAL, V1, around_baseline, direction
from simulators.chirp_posterior import Problem
from simulators.chirp_waveform import (
    LIGHT,
    REFERENCE,
    SUN,
    advanced_ligo,
    advanced_virgo,
    amplitude,
    chirp_time,
    isco_frequency,
    phase_basis,
    phase_weights,
    total_mass,
)

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

DATA = Path(__file__).parents[2] / "simulators" / "data"
DETECTORS = (H1, L1, V1)


def prior_draws(simulator, n, seed=0):
    return simulator.prior.sample_each([np.random.default_rng([seed, k]) for k in range(n)])


def psi(frequencies, chirp_mass, mass_ratio, t_c=0.0, phase=0.0):
    return (phase_weights(*[np.array([v]) for v in (chirp_mass, mass_ratio, t_c, phase)]) @ phase_basis(np.asarray(frequencies)))[0]


# ------------------------------------------------------------------------------------------------------ the phase


@pytest.mark.parametrize("mass_ratio", [1.0, 0.3])
def test_the_phase_is_that_of_energy_lost_to_the_waves(mass_ratio):
    """dt/dv = -E'(v) / F(v), re-expanded to v^7, with energy and flux as in Blanchet, Living Rev. Relativity 17, 2 (2014), eqs. 232 and 314.

    Psi is the stationary-phase transform, d Psi / df = 2 pi t(f), which makes d/dv (Psi' / v^2) = -6 E' / F.
    """
    chirp_mass = 11.0
    total, eta = total_mass(chirp_mass, mass_ratio)
    pi2 = math.pi**2
    energy = [1, 0, -3 / 4 - eta / 12, 0, -27 / 8 + 19 / 8 * eta - eta**2 / 24, 0,
              -675 / 64 + (34445 / 576 - 205 * pi2 / 96) * eta - 155 / 96 * eta**2 - 35 / 5184 * eta**3, 0]
    slope = np.array(energy) * (1 + np.arange(8) / 2)  # of E = -(eta / 2) v^2 (...), over -eta v

    def flux(v):
        return np.array([1, 0, -1247 / 336 - 35 / 12 * eta, 4 * math.pi, -44711 / 9072 + 9271 / 504 * eta + 65 / 18 * eta**2,
                         -math.pi * (8191 / 672 + 583 / 24 * eta),
                         6643739519 / 69854400 + 16 * pi2 / 3 - 1712 / 105 * (np.euler_gamma + math.log(4 * v))
                         + (-134543 / 7776 + 41 * pi2 / 48) * eta - 94403 / 3024 * eta**2 - 775 / 324 * eta**3,
                         math.pi * (-16285 / 504 + 214745 / 1728 * eta + 193385 / 3024 * eta**2)])

    def ratio(v):
        below, out = flux(v), np.zeros(8)
        for k in range(8):
            out[k] = slope[k] - np.dot(below[1:k + 1], out[:k][::-1])
        return 15 / (16 * eta) * sum(out[k] * v ** (k - 9) for k in range(8))

    span = (0.2, 0.35)
    curve = np.polynomial.Chebyshev.interpolate(lambda v: psi(v**3 / (math.pi * SUN * total), chirp_mass, mass_ratio), 40, domain=span)
    first, second = curve.deriv(), curve.deriv(2)
    for v in np.linspace(0.22, 0.33, 7):
        assert second(v) / v**2 - 2 * first(v) / v**3 == pytest.approx(ratio(v), rel=1e-7)
        without = ratio(v) - 15 / (16 * eta) * v**-2 * 1.0  # the check would see a change of the last coefficient by 1
        assert without != pytest.approx(ratio(v), rel=1e-7)


LAL_F = [30.0, 50.0, 80.0, 125.0]
LAL_PLUS = [1.202110113723851e-24 - 1.7153560890815412e-23j, -4.982684020234889e-24 - 8.059456101597352e-24j,
            2.9257662743076306e-24 + 4.628741293077741e-24j, 1.0467557844726656e-24 - 3.0803587488382443e-24j]
LAL_CROSS = [-1.6977622282067857e-23 - 1.1897804532926349e-24j, -7.97679282819292e-24 + 4.931578217776217e-24j,
             4.581265768401549e-24 - 2.8957576218127526e-24j, -3.048764490586936e-24 - 1.0360195438990137e-24j]


def test_the_waveform_is_that_of_lal():
    """SimInspiralChooseFDWaveform of LALSimulation 6.2.1: TaylorF2, 14 and 9 solar masses, 500 Mpc, inclination pi / 6; up to its own phi_ref."""
    eta, cos = 14 * 9 / 23**2, math.cos(math.pi / 6)
    wave = amplitude(23 * eta**0.6, 500.0) * np.array(LAL_F) ** (-7 / 6) * np.exp(-1j * psi(LAL_F, 23 * eta**0.6, 9 / 14))
    turn = -(1 + cos**2) / 2 * wave / LAL_PLUS
    np.testing.assert_allclose(np.abs(turn), 1.0, rtol=1e-7)
    np.testing.assert_allclose(turn, turn[0], rtol=1e-7)
    np.testing.assert_allclose(1j * cos * wave / LAL_CROSS, turn, rtol=1e-7)


def test_the_phase_is_the_waves_when_it_passes_the_reference_frequency():
    """In the stationary phase Psi(f) = 2 pi f t(f) - Phi(t(f)) - pi / 4, with t(f) = Psi'(f) / 2 pi."""
    for t_c in (0.0, 0.05):
        curve = np.polynomial.Chebyshev.interpolate(lambda f, t_c=t_c: psi(f, 12.0, 0.7, t_c, 1.3), 40, domain=(40.0, 60.0))
        time = curve.deriv()(REFERENCE) / (2 * math.pi)
        assert 2 * math.pi * REFERENCE * time - psi([REFERENCE], 12.0, 0.7, t_c, 1.3)[0] - math.pi / 4 == pytest.approx(1.3, abs=1e-8)


# ------------------------------------------------------------------------------------------------------ detectors


def test_delays_between_the_detectors_are_those_published():
    """At most 10.0 ms from Hanford to Livingston, 27.3 ms and 26.4 ms to Virgo, and so much for a source in line with them."""
    for (a, b), published in zip(combinations(DETECTORS, 2), (10.0, 27.3, 26.4), strict=True):
        baseline = np.subtract(a.vertex, b.vertex)
        longest = np.linalg.norm(baseline) / LIGHT
        assert longest * 1e3 == pytest.approx(published, abs=0.05)
        n = -baseline / np.linalg.norm(baseline)
        ra, sin_dec = np.arctan2(n[1], n[0]) + SIDEREAL, n[2]
        np.testing.assert_allclose(direction(ra, sin_dec), n, atol=1e-12)
        assert a.delay(ra, sin_dec) - b.delay(ra, sin_dec) == pytest.approx(longest, rel=1e-12)


def test_the_square_around_a_baseline_covers_the_sky_evenly_and_is_linear_in_the_delay():
    u = np.random.default_rng(3).random((100_000, 2))
    ra, sin_dec = around_baseline(H1, L1, u).T
    delay = H1.delay(ra, sin_dec) - L1.delay(ra, sin_dec)
    longest = np.linalg.norm(np.subtract(H1.vertex, L1.vertex)) / LIGHT
    np.testing.assert_allclose(delay, longest * (1 - 2 * u[:, 0]), atol=1e-12)
    assert kstest(ra / (2 * np.pi), "uniform").pvalue > 1e-3
    assert kstest((sin_dec + 1) / 2, "uniform").pvalue > 1e-3


LAL_RESPONSES = {  # of LAL 7.7.1 at ra 1.3, dec -0.7, psi 0.4 and GPS 1126259462: F_plus, F_cross, delay from the earth's centre
    "H1": (0.215166743542185, 0.4624340916974541, 0.0031497527306869936),
    "L1": (0.019733631699985002, -0.5361167676182098, -0.005831244811340727),
    "V1": (0.06928547447177187, -0.36512125936805695, 0.0067087133643682914),
}


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: d.name)
def test_responses_are_those_of_lal(detector):
    sky = np.array([1.3]), np.sin([-0.7])
    plus, cross, delay = LAL_RESPONSES[detector.name]
    np.testing.assert_allclose(detector.patterns(*sky, np.array([0.4])), [[plus], [cross]], atol=1e-6)
    np.testing.assert_allclose(detector.delay(*sky), delay, atol=1e-8)
    assert float(detector.delay(*map(torch.as_tensor, sky), torch)) == detector.delay(*sky)[0]


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: d.name)
def test_patterns_have_the_size_of_two_perpendicular_arms(detector):
    """F_+^2 + F_x^2 does not depend on the polarisation, is 2/5 on average over the sky, and 1 overhead."""
    rng = np.random.default_rng(1)
    ra, sin_dec, angle = rng.uniform(0, 2 * np.pi, 100_000), rng.uniform(-1, 1, 100_000), rng.uniform(0, np.pi, 100_000)
    power = sum(f**2 for f in detector.patterns(ra, sin_dec, angle))
    np.testing.assert_allclose(power, sum(f**2 for f in detector.patterns(ra, sin_dec, 0 * angle)), atol=1e-12)
    assert power.mean() == pytest.approx(0.4, abs=4 * power.std() / 100_000**0.5)
    up = np.cross(detector.x_arm, detector.y_arm)
    over = np.array([np.arctan2(up[1], up[0]) + SIDEREAL]), np.array([up[2]]) / np.linalg.norm(up)
    assert sum(f**2 for f in detector.patterns(*over, np.array([0.3])))[0] == pytest.approx(1.0, abs=1e-5)


def test_the_sidereal_time_is_that_of_2015_09_14():
    """Greenwich mean sidereal time of 1982 (Aoki et al., A&A 105, 359): 09:50:45 UTC, with UT1 = UTC to 0.3 s."""
    days = 2457279.5 - 2451545.0
    century = days / 36525
    midnight = 24110.54841 + 8640184.812866 * century + 0.093104 * century**2
    seconds = midnight + 1.00273790935 * (9 * 3600 + 50 * 60 + 45)
    assert seconds / 86400 * 2 * math.pi % (2 * math.pi) == pytest.approx(SIDEREAL, abs=3e-5)


# ---------------------------------------------------------------------------------------------------------- noise


def test_noise_curves_are_those_of_their_papers():
    assert advanced_ligo(215.0) == pytest.approx(1e-49 * (1 - 5 + 111 * 0.5 / 1.5), rel=1e-12)
    assert advanced_ligo(430.0) == pytest.approx(1e-49 * (2**-4.14 - 5 / 4 + 111 * 5 / 3), rel=1e-12)
    lal = [5.5997513610462264e-45, 2.1112328638054695e-47, 1.552780892402255e-47]  # SimNoisePSDAdvVirgo
    np.testing.assert_allclose(advanced_virgo([20.0, 100.0, 400.0]), lal, rtol=1e-12)


def test_the_signal_to_noise_ratio_is_the_integral_and_gives_the_published_horizon():
    """rho^2 = 4 A^2 int f^(-7/3) / S df of a source overhead and face on. Two neutron stars at 8: 445 Mpc with Advanced LIGO's design (Abadie et al.,
    CQG 27, 173001, 2010), whose curve of 2009 lies a tenth above the earlier one that we take from Sathyaprakash & Schutz."""
    chirp_mass = 2.8 * 0.25**0.6
    network = Network((H1,), (advanced_ligo,), 20.0, 1500.0, chirp_mass)
    up = np.cross(H1.x_arm, H1.y_arm)
    one = np.ones(1)
    s = network.signals(chirp_mass * one, one, 100 * one, one, 0 * one, 0 * one, 0 * one,
                        one * (np.arctan2(up[1], up[0]) + SIDEREAL), one * up[2] / np.linalg.norm(up), dtype=np.float64)
    rho = math.sqrt(np.sum(s**2))
    power, _ = quad(lambda f: f ** (-7 / 3) / advanced_ligo(f), 20.0, 1500.0, limit=200, epsabs=0)
    assert rho == pytest.approx(2 * amplitude(chirp_mass, 100.0) * math.sqrt(power), rel=5e-3)
    assert 100 * rho / 8 == pytest.approx(445, rel=0.15)


def test_white_noise_of_unit_variance_is_the_detectors_noise():
    """A series of white noise with spectrum S, transformed as the signal is and scaled by sqrt(4 df / S), has unit variance in each part."""
    rng, samples, dt = np.random.default_rng(2), 64, 1 / 256
    power = 7.0e-47
    series = rng.standard_normal((4000, samples)) * math.sqrt(power / (2 * dt))
    spectrum = dt * np.fft.rfft(series)[:, 1:-1]
    scaled = spectrum * math.sqrt(4 / (samples * dt) / power)
    assert np.var([scaled.real, scaled.imag]) == pytest.approx(1.0, abs=5 * math.sqrt(2 / (2 * scaled.size)))
    noisy = chirp.observe.function(torch.zeros(200, *SMALL.shape), None, torch.Generator().manual_seed(1))
    assert float(noisy.var()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / noisy.numel()))


# ---------------------------------------------------------------------------------------------------------- bands


@pytest.mark.parametrize(("network", "simulator"), [(SMALL, chirp), (FULL, chirp_full)], ids=["chirp", "chirp_full"])
def test_bins_are_fine_enough_for_the_slowest_chirp(network, simulator):
    """Inner products of signals, and so all that a likelihood knows of them, are those of four times as many bins."""
    f, width = network.bins
    np.testing.assert_allclose(np.diff(f), width[:-1], rtol=1e-12)
    assert f[0] == network.f_min
    assert f[-1] + width[-1] == network.f_max
    lightest = simulator.prior.law.marginals[0].support[0]
    assert all(1 / w >= chirp_time(a, lightest) + 0.1 for a, w in zip(f, width, strict=True))
    theta = prior_draws(simulator, 40)
    theta[:, 0] = lightest + 0.02 * np.arange(40)
    theta[:, 1] = 0.9  # light enough for the last stable orbit to lie far up
    fixed = [np.full(40, math.cos(math.pi / 6)), np.zeros(40)]
    columns = [*theta[:, :3].T, *fixed, *theta[:, 3:].T] if simulator is chirp else list(theta.T)
    fine = Network(network.detectors, network.noise, network.f_min, network.f_max, network.chirp_mass, 4.0)
    object.__setattr__(fine, "bins", tuple(np.concatenate(v) for v in ([(f[:, None] + width[:, None] * (np.arange(4) / 4 - 3 / 8)).ravel()],
                                                                       [np.repeat(width / 4, 4)])))
    a, b = [n.signals(*columns, dtype=np.float64).reshape(40, -1) for n in (network, fine)]
    size = np.linalg.norm(b, axis=1)
    assert np.abs(a @ a.T - b @ b.T).max() < 0.02 * (size[:, None] * size).max()


def test_the_small_band_ends_before_the_last_stable_orbit_and_the_full_one_is_cut_there():
    names = dict(zip(chirp.prior.names, chirp.prior.law.marginals, strict=True))
    heaviest = total_mass(names["chirp_mass"].support[1], names["mass_ratio"].support[0])[0]
    assert isco_frequency(heaviest) > SMALL.f_max
    assert isco_frequency(1.0) == pytest.approx(4397, rel=1e-3)  # Hz for the sun's mass
    theta = prior_draws(chirp_full, 20)
    edge = isco_frequency(total_mass(theta[:, 0], theta[:, 1])[0])
    seen = np.abs(full_signals(theta)).sum((1, 2)) > 0
    assert (seen == (FULL.frequencies <= edge[:, None])).all()
    assert not seen.all()


# ------------------------------------------------------------------------------------------------------- symmetry


@pytest.mark.parametrize(("simulator", "signals"), [(chirp, small_signals), (chirp_full, full_signals)], ids=["chirp", "chirp_full"])
def test_a_common_shift_of_time_is_exact(simulator, signals):
    theta = torch.as_tensor(prior_draws(simulator, 50))
    action = simulator.symmetry.factors[0]
    columns = [simulator.prior.names.index(p) for p in action.parameters]
    g = torch.linspace(-0.2, 0.2, 50, dtype=torch.float64)[:, None]
    moved, log_det = action.act_theta(g, theta[:, columns])
    shifted = theta.clone()
    shifted[:, columns] = moved
    assert action.exact
    assert float(log_det.abs().max()) == 0.0
    assert list(np.flatnonzero((shifted != theta).any(0))) == [simulator.prior.names.index("t_c")]
    torch.testing.assert_close(action.pose_of(moved), action.pose_of(theta[:, columns]) + g, rtol=0, atol=1e-15)
    x = torch.as_tensor(signals(theta.numpy(), np.float64))
    expected = torch.as_tensor(signals(shifted.numpy(), np.float64))
    torch.testing.assert_close(action.act_data(g, {"x": x})["x"], expected, rtol=0, atol=1e-10)
    single = action.act_data(g, {"x": x.float()})["x"]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=1e-5)


def test_in_the_standard_pose_every_detector_sees_the_coalescence_at_zero():
    theta = torch.as_tensor(prior_draws(chirp_full, 30))
    action = chirp_full.symmetry
    columns = [chirp_full.prior.names.index(p) for p in action.parameters]
    pose = action.pose_of(theta[:, columns])
    assert action.coordinates == ("arrival_H1", "delay_L1", "delay_V1")
    assert action.moved == ("t_c",)
    assert not action.exact
    x = torch.as_tensor(full_signals(theta.numpy(), np.float64))
    there = action.act_data(action.inverse(pose), {"x": x})["x"].numpy()
    at_zero = theta.numpy().copy()
    for k, detector in enumerate(FULL.detectors):
        at_zero[:, 5] = -detector.delay(*theta.numpy()[:, 7:].T)
        np.testing.assert_allclose(there[:, k], full_signals(at_zero, np.float64)[:, k], atol=1e-10)
    back = action.act_data(pose, {"x": torch.as_tensor(there)})["x"]
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)


def test_a_delay_shifts_its_own_detector_alone():
    delay = chirp.symmetry.factors[1]
    x = torch.as_tensor(small_signals(prior_draws(chirp, 5)))
    y = delay.act_data(torch.full((5, 1), 3e-3, dtype=torch.float64), {"x": x})["x"]
    assert torch.equal(y[:, 0], x[:, 0])
    assert not torch.allclose(y[:, 1], x[:, 1], atol=1e-2)
    theta = torch.as_tensor(prior_draws(chirp, 1000))[:, -2:]
    poses = delay.pose_of(theta)
    assert float(poses.abs().max()) < 0.01003
    assert delay.act_theta(poses, theta)[0] is theta


# ------------------------------------------------------------------------------------------------------ simulators


@pytest.mark.parametrize("simulator", [chirp, chirp_full], ids=lambda s: s.name)
def test_contract(simulator):
    assert check(simulator, rows=8).finite == 1.0


def test_most_signals_are_as_loud_as_detections():
    for simulator, signals in ((chirp, small_signals), (chirp_full, full_signals)):
        loudness = np.sqrt(np.square(signals(prior_draws(simulator, 1000))).sum((1, 2, 3)))
        assert np.mean((loudness > 8) & (loudness < 30)) > 0.65


def test_polarisation_and_phase_turn_into_each_other():
    """What the prior of the full size leaves out is there twice."""
    theta = prior_draws(chirp_full, 20)
    turned = theta.copy()
    turned[:, 4] += math.pi / 2
    turned[:, 6] += math.pi
    np.testing.assert_allclose(full_signals(turned), full_signals(theta), atol=1e-5)


def test_log_likelihood_is_gaussian_about_the_signal():
    theta = prior_draws(chirp, 3)
    x = small_signals(theta)[1] + np.random.default_rng(0).standard_normal(SMALL.shape)
    expected = [-0.5 * np.sum((x - s) ** 2) - 0.5 * x.size * math.log(2 * math.pi) for s in small_signals(theta, np.float64)]
    np.testing.assert_allclose(chirp.log_likelihood(theta, x), expected, rtol=1e-10)


@pytest.mark.parametrize("simulator", [chirp, chirp_full], ids=lambda s: s.name)
def test_the_observation_file_is_what_its_seed_gives(simulator):
    from chirp_reference import observation

    x = sp.read_observation(DATA / f"{simulator.name}.npz", simulator.x)
    _, made, loudness = observation(simulator, 0)
    np.testing.assert_allclose(x, made, atol=1e-4)
    assert 8 <= loudness <= 30


# ------------------------------------------------------------------------------------------------ exact posterior


def test_exact_draws_have_the_moments_of_the_full_likelihood():
    """On a prior cut small about a faint source, against importance sampling of all seven parameters from it: means and sd to four standard errors; a wrong
    weight (noise energy off by a half) would be seen."""
    theta = np.array([11.5, 0.8, 1800.0, 0.01, 2.0, 1.0, 0.2])
    half = np.array([0.08, 0.1, 200.0, 0.004, 1.5, 0.2, 0.15])
    support = np.stack([theta - half, theta + half], 1)
    support[4] = 0.0, 2 * math.pi
    rng = np.random.default_rng(5)
    x = (small_signals(theta[None])[0] + rng.standard_normal(SMALL.shape)).astype(np.float32)
    proposals = support[:, 0] + (support[:, 1] - support[:, 0]) * rng.random((250_000, 7))
    log_w = chirp.log_likelihood(proposals, x)
    w = np.exp(log_w - log_w.max())
    w /= w.sum()
    effective = 1 / np.sum(w**2)
    assert effective > 200

    def sky_patch(u):
        return support[5:, 0] + (support[5:, 1] - support[5:, 0]) * u

    sky = [0, 1, 2, 3, 5, 6]  # the phase goes round
    values, draws = [np.concatenate([t[:, sky], np.cos(t[:, 4:5]), np.sin(t[:, 4:5])], 1) for t in (
        proposals, Problem(support, lambda t: small_signals(t, np.float64), SMALL.frequencies, sky_patch).draw(x, 1000, rng))]
    mean = w @ values
    sd = np.sqrt(w @ (values - mean) ** 2)
    error = sd * math.sqrt(1 / effective + 1 / len(draws))
    assert (np.abs(draws.mean(0) - mean) < 4 * error).all()
    np.testing.assert_allclose(draws.std(0), sd, rtol=4 / math.sqrt(2 * effective) * 1.5)
    prior_mean = values.mean(0)
    assert (np.abs(prior_mean - mean) > 4 * error).any(), "the data say too little for the test to see anything"


@pytest.mark.science
def test_exact_draws_are_calibrated():
    from chirp_reference import ranks

    each = np.array([ranks(k) for k in range(12)])
    assert min(kstest(u, "uniform").pvalue for u in each.T) > 0.05 / 7 / 10


def test_posterior_sampler_gives_draws_in_the_prior():
    theta = prior_draws(chirp, 1, seed=4)
    x = small_signals(theta)[0] + np.random.default_rng(1).standard_normal(SMALL.shape)
    draws = posterior_sampler(x.astype(np.float32), 5, np.random.default_rng(0))
    assert draws.shape == (5, 7)
    assert all(m.contains(v).all() for m, v in zip(chirp.prior.law.marginals, draws.T, strict=True))
