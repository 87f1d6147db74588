"""Recalibration: exact where the standardised shape is the same for all x, a density that belongs to its draws, and gated as any run."""

import json
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

import sbiplat as sp
from sbiplat.errors import RunError, Uncertified
from sbiplat.posteriors import recalibrated
from sbiplat.posteriors.recalibrated import Maps, RecalibratedSampler
from sbiplat.progress import silent


@dataclass(frozen=True)
class Wrong:
    """The posterior N(x, 1) of each parameter, with another sd and a shift."""

    sd: float
    shift: float

    def sample(self, x, n, seed):
        mean = np.asarray(x["x"], float)
        return mean[:, None] + self.shift + self.sd * np.random.default_rng(seed).standard_normal((len(mean), n, mean.shape[1]))

    def log_prob(self, z, x):
        return stats.norm.logpdf(z, np.asarray(x["x"], float)[:, None] + self.shift, self.sd).sum(-1)


def pairs(seed, n, dim=2):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim))
    return x + rng.standard_normal((n, dim)), {"x": x.astype(np.float32)}


@pytest.mark.parametrize("wrong", [Wrong(0.6, 0.0), Wrong(1.6, 0.0), Wrong(1.0, 0.7), Wrong(0.7, -0.5)])
def test_width_and_bias_are_mended(wrong):
    sampler = RecalibratedSampler(wrong, recalibrated.fit(wrong, *pairs(0, 2000)))
    x = {"x": np.array([[0.3, -1.0]], np.float32)}
    z = sampler.sample(x, 20_000, 3)[0]
    assert np.abs(z.mean(0) - [0.3, -1.0]).max() < 0.12
    assert np.abs(z.std(0) - 1).max() < 0.12
    points = np.random.default_rng(1).standard_normal((1, 500, 2)) + x["x"][:, None]
    gap = sampler.log_prob(points, x) - stats.norm.logpdf(points, x["x"][:, None], 1.0).sum(-1)
    assert abs(gap.mean()) < 0.15, "recalibrated density against the exact one"


def test_the_density_is_that_of_the_draws():
    wrong = Wrong(0.5, 0.4)
    sampler = RecalibratedSampler(wrong, recalibrated.fit(wrong, *pairs(0, 800, 1)))
    x, grid = {"x": np.zeros((1, 1), np.float32)}, np.linspace(-8, 8, 4001)
    density = np.exp(sampler.log_prob(grid[None, :, None], x)[0])
    step = grid[1] - grid[0]
    assert density.sum() * step == pytest.approx(1.0, abs=5e-3)
    z = np.sort(sampler.sample(x, 20_000, 1)[0, :, 0])
    assert np.abs(np.interp(z, grid, np.cumsum(density) * step) - np.arange(1, 20_001) / 20_000).max() < 0.02


def test_maps_are_inverse_of_one_another():
    rng = np.random.default_rng(0)
    maps = Maps.fit(rng.standard_normal((50, 40, 3)), 2 * rng.standard_normal((50, 3)) + 1)
    y = 3 * rng.standard_normal((200, 3))
    back, log_slope = maps.inverse(maps.forward(y))
    assert np.abs(back - y).max() < 1e-9
    numeric = np.log((maps.inverse(y + 1e-6)[0] - maps.inverse(y - 1e-6)[0]) / 2e-6).sum(-1)
    assert np.abs(numeric - maps.inverse(y)[1]).max() < 1e-4
    assert log_slope.shape == (200,)


def test_a_recalibrated_run_is_a_run_that_has_to_pass_the_gate(line_run, tmp_path):
    run = sp.recalibrate(line_run, out=tmp_path / "r", progress=silent)
    assert run.weights_digest == line_run.weights_digest
    shutil.copy(line_run.path / "certificate.json", run.path)
    with pytest.raises(Uncertified, match="other settings"):
        sp.load(run)
    (run.path / "certificate.json").unlink()
    assert sp.gate(run, n=300, progress=silent).passed
    x = np.array([0.4, -0.2])
    draws = sp.load(run).sample(x, 4000, seed=0)
    assert np.abs(draws.std(0) / sp.load(line_run).sample(x, 4000, seed=0).std(0) - 1).max() < 0.25
    with pytest.raises(RunError, match="recalibrated already"):
        sp.recalibrate(run, out=tmp_path / "again")
    with pytest.raises(RunError, match="another --out"):
        sp.recalibrate(line_run, out=tmp_path / "r")


@pytest.mark.parametrize("edit", [lambda r: r.update(knots=[[1]]), lambda r: r.pop("images"), lambda r: r.update(images="x"),
                                  lambda r: r["knots"][0].reverse()])
def test_damaged_maps_are_one_line(line_run, tmp_path, edit):
    run = sp.recalibrate(line_run, out=tmp_path / "r", progress=silent)
    record = json.loads((run.path / "run.json").read_text())
    edit(record["recalibration"])
    (run.path / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="recalibration"):
        sp.load(run.path, allow_uncertified=True)
