"""Shifts in time, against closed forms."""

import math

import pytest
import torch

from sbiplat.errors import SymmetryError
from sbiplat.symmetry import SpectrumShift, TimeShift
from sbiplat.symmetry.shift import shift_series, shift_spectrum

RNG = torch.Generator().manual_seed(5)


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=RNG, dtype=dtype)


@pytest.mark.parametrize("samples", [32, 33])
def test_a_sinusoid_is_shifted_by_any_fraction_of_a_sample(samples):
    spacing, t = 0.25, torch.tensor([0.1, -3.37], dtype=torch.float64)
    s = torch.arange(samples, dtype=torch.float64) * spacing
    rate = 2 * math.pi * 3 / (samples * spacing)
    there = torch.stack([torch.sin(rate * (s - a) + 0.4) for a in t])
    assert torch.allclose(shift_series(torch.sin(rate * s + 0.4).expand(2, -1), t, spacing), there, atol=1e-12)


def test_whole_samples_are_a_roll_but_for_the_highest_frequency_of_an_even_number():
    x = noise(1, 33)
    assert torch.allclose(shift_series(x, torch.tensor([3.0]), 1.0), x.roll(3, -1), atol=1e-12)
    even = noise(1, 32)
    sign = (-1.0) ** torch.arange(32)
    moved, highest = shift_series(even, torch.tensor([3.0]), 1.0), (even * sign).mean() * sign
    assert torch.allclose(moved, (even - highest).roll(3, -1) + highest, atol=1e-12)


@pytest.mark.parametrize("samples", [32, 33])
def test_shifts_of_any_real_series_compose_and_keep_lengths(samples):
    x, a, b = noise(4, 2, samples), noise(4), noise(4)
    assert torch.allclose(shift_series(shift_series(x, a, 0.3), b, 0.3), shift_series(x, a + b, 0.3), atol=1e-12)
    assert torch.allclose(shift_series(shift_series(x, a, 0.3), -a, 0.3), x, atol=1e-12)
    assert torch.allclose(shift_series(x, a, 0.3).square().sum(-1), x.square().sum(-1))


def test_a_spectrum_is_shifted_as_its_series_is():
    x, t = noise(3, 2, 33), noise(3)
    spectrum = torch.fft.rfft(x)
    moved = shift_spectrum(torch.stack([spectrum.real, spectrum.imag], -2), t, torch.arange(17, dtype=torch.float64) / (33 * 0.5))
    back = torch.fft.irfft(torch.complex(*moved.unbind(-2)), n=33)
    assert torch.allclose(back, shift_series(x, t, 0.5), atol=1e-12)


def test_times_may_differ_by_channel():
    x, t = noise(3, 2, 33), noise(3, 2)
    both = shift_series(x, t, 1.0)
    assert torch.allclose(both[:, 1], shift_series(x[:, 1], t[:, 1], 1.0))


def test_phases_of_many_turns_keep_float32_accuracy():
    x, t = noise(2, 2, 8, dtype=torch.float32), torch.tensor([1e4 + 1 / 3, -2e4], dtype=torch.float64)
    frequencies = 1000 + torch.arange(8, dtype=torch.float64) / 7
    exact = shift_spectrum(x.double(), t, frequencies)
    found = shift_spectrum(x, t, frequencies)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, atol=1e-5)


@pytest.mark.parametrize(("action", "shape"), [(TimeShift("t", 0.5, channels=(2, 0)), (3, 16)),
                                               (SpectrumShift("t", 0.5, 20.0, channels=(2, 0)), (3, 2, 16))])
def test_only_the_channels_named_are_shifted(action, shape):
    x, g = {"x": noise(4, *shape), "y": noise(4)}, noise(4, 1)
    moved = action.act_data(g, x)
    assert torch.equal(moved["x"][:, 1], x["x"][:, 1])
    assert moved["y"] is x["y"]
    whole = type(action)(**{**{k: getattr(action, k) for k in action.__dataclass_fields__}, "channels": None}).act_data(g, x)["x"]
    assert torch.equal(moved["x"][:, [0, 2]], whole[:, [0, 2]])


@pytest.mark.parametrize("wrong", [{"spacing": 0.0}, {"spacing": 1.0, "channels": (1, 1)}, {"spacing": 1.0, "channels": -1}])
def test_impossible_shifts_are_one_line(wrong):
    with pytest.raises(SymmetryError):
        TimeShift("t", **wrong)


def test_orbits_of_few_series_are_those_of_each_row():
    """Spectra computed once for all that act on a series give what act_data does, with another field and with channels too."""
    generator = torch.Generator().manual_seed(4)
    x = {"x": torch.randn(3, 2, 41, generator=generator), "y": torch.arange(3.0)}
    g, owner = torch.randn(50, 1, generator=generator, dtype=torch.float64), torch.randint(3, (50,), generator=generator)
    for channels in (None, (1,)):
        action = TimeShift("t", 0.1, channels=channels)
        seen, wanted = action.orbits(x)(g, owner), action.act_data(g, {k: v[owner] for k, v in x.items()})
        assert set(seen) == {"x", "y"}
        torch.testing.assert_close(seen, wanted)
    assert (seen["x"] - TimeShift("t", 0.1).orbits(x)(g, owner.flip(0))["x"]).abs().max() > 0.1
