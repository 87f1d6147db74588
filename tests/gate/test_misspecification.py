"""Misspecification: the test has its level whatever x is, finds what no simulation looks like, names it, and stays with every draw."""

import json
import shutil
import sys
import time
import tracemalloc
import warnings
from dataclasses import dataclass, replace

import h5py
import numpy as np
import pytest
import torch
from scipy import stats

import sbiplat as sp
from sbiplat import files
from sbiplat.cli import app
from sbiplat.diagnostics.distance import Space, mmd_p_value, shrunk_covariance
from sbiplat.diagnostics.examined import Examined
from sbiplat.diagnostics.misspecification import FARTHEST, Reference, Tails, chance_of, power
from sbiplat.errors import Misspecified, SettingError, Uncertified
from sbiplat.gate.criteria import Criteria
from sbiplat.gate.misspecification import arrays_of, examine
from sbiplat.gate.watch import Watch, reference_from
from sbiplat.observation import ObservationSpec, feature_names, fields_of, flat
from sbiplat.posteriors.base import Posterior
from sbiplat.progress import silent

LEVEL = 0.01


def gaussian(rng, n, size=6):
    """x with correlated features: their sum varies ten times as much as their differences."""
    return rng.standard_normal((n, 1)) + 0.3 * rng.standard_normal((n, size))


def counts(rng, n):
    """A constant, a rare event, a few counts, heavy tails and something positive: what x may be."""
    return np.stack([np.full(n, 3.0), rng.uniform(size=n) < 0.002, rng.poisson(1.0, n), rng.standard_cauchy(n), rng.lognormal(0, 2, n)], 1)


@dataclass(frozen=True)
class FirstOnly:
    """An embedding that is blind to all but the first two features."""

    def context(self, x):
        return x["x"][:, :2]


class BlindSampler:
    """A sampler whose estimator has such an embedding."""

    estimator = FirstOnly()

    def contexts(self, x):
        return self.estimator.context({k: torch.as_tensor(v) for k, v in x.items()})

    def sample(self, x, n, seed):
        return np.random.default_rng(seed).standard_normal((len(x["x"]), n, 1))


class XSampler:
    """A sampler that shows no contexts, as an exact posterior's."""

    sample = BlindSampler.sample


def examined(law, seed=0, rows=3000, held_out=500, sampler=None, spec=None):
    rng = np.random.default_rng([seed, 7])
    x = law(rng, rows + held_out).astype(np.float32)
    spec = spec or ObservationSpec.declare(x.shape[1:])
    posterior = Posterior(sp.Prior({"a": sp.Normal(0, 1)}), spec, sampler or XSampler())
    theta = np.zeros((rows + held_out, 1), np.float32)
    return Examined(posterior, {"theta": theta[rows:], "x": fields_of(spec, x[rows:].reshape(held_out, -1))},
                    {"theta": theta[:rows], "x": fields_of(spec, x[:rows].reshape(rows, -1))}, seed)


def look(reference, x, sampler=None):
    return reference.look({"x": np.asarray(x, np.float32)}, sampler or XSampler())


# ------------------------------------------------------------------------------------------------------------ level


@pytest.mark.parametrize("law", [gaussian, counts])
def test_p_values_are_valid_for_any_x(law):
    """Over banks, Pr(p <= alpha) is at most alpha, and (without ties) at least alpha - 1/(n + 1); four binomial standard errors."""
    reference = Reference.fit(examined(law), LEVEL)
    rng = np.random.default_rng(3)
    trials, n = 500, 99
    x = law(rng, trials * (n + 1)).astype(np.float32)
    distances, _ = reference.measure(x, {"x": x})
    sets = distances.reshape(trials, n + 1, -1)
    p = np.array([replace(reference, held_out=some[1:]).p_values(some[:1])[0] for some in sets])
    for alpha in (0.05, 0.2, 0.5):
        share, error = (p <= alpha).mean(), 4 * np.sqrt(alpha * (1 - alpha) / trials)
        assert share <= alpha + error
        if law is gaussian:
            assert share >= alpha - error


def test_fresh_rows_are_of_the_law_of_the_held_out_ones():
    """1000 fresh rows against the held-out ones by the two-sample Kolmogorov-Smirnov test, and a moved law to show that it can fail."""
    reference = Reference.fit(examined(gaussian), LEVEL)
    rng = np.random.default_rng(5)
    fresh = look(reference, gaussian(rng, 1000))
    assert stats.ks_2samp(fresh.score, reference.scores).pvalue > 1e-3
    assert stats.ks_2samp(look(reference, 1.3 * gaussian(rng, 1000)).score, reference.scores).pvalue < 1e-3
    assert fresh.count <= stats.betabinom.ppf(0.9999, 1000, 5, 496)


def test_the_number_of_alarms_in_a_batch_has_the_law_that_is_stated():
    rng = np.random.default_rng(0)
    batch, n, level, trials = 40, 199, 0.05, 4000
    everything = rng.standard_normal((trials, n + batch))
    held = np.sort(everything[:, :n], axis=1)
    p = (1 + (held[:, None] >= everything[:, n:, None]).sum(2)) / (n + 1)
    found = (p < level).sum(1)
    for least in (1, 3, 5, 8):
        expected = chance_of(least, batch, n, level)
        assert abs((found >= least).mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / trials)


# ------------------------------------------------------------------------------------------- what it finds and names


def test_a_feature_six_sd_away_is_found_and_named():
    spec = ObservationSpec.declare((6,), labels=[f"band {k}" for k in "abcdef"])
    reference = Reference.fit(examined(gaussian, spec=spec), LEVEL)
    x = gaussian(np.random.default_rng(1), 20)
    x[:, 3] += 6 * np.sqrt(1.09)
    for row in x:
        found = look(reference, row[None])
        assert found.unusual
        assert found.p_value[0] == 1 / 501
        assert found.features[0][0].name == "band d"
        assert "band d = " in found.text()


def test_what_is_odd_only_together_is_named_by_what_the_others_let_expect():
    """A feature at 1.5 sd, in the middle of its range, where all the others say -1."""
    reference = Reference.fit(examined(gaussian), LEVEL)
    x = np.full((1, 6), -1.0)
    x[0, 2] = 1.5
    found = look(reference, x)
    assert found.unusual
    assert found.tails.min() > 0.05
    assert "no feature is out of range by itself, but given the others x[2] is off by" in found.text()


def test_x_sees_what_the_embedding_is_blind_to():
    sampler = BlindSampler()
    reference = Reference.fit(examined(gaussian, sampler=sampler), LEVEL)
    assert list(reference.spaces) == ["x", "context"]
    x = np.zeros((1, 6))
    x[0, 4] = 5.0
    found = look(reference, x, sampler)
    assert found.p_values["mahalanobis context"][0] > 0.1
    assert found.p_values["mahalanobis x"][0] < LEVEL
    assert found.unusual


def test_a_gap_between_modes_is_seen_by_nearest_rows_alone():
    """Two far modes: what lies between them is near the mean, and like nothing in the bank."""
    def modes(rng, n):
        return rng.choice([-5.0, 5.0], (n, 1)) + 0.2 * rng.standard_normal((n, 3))

    found = look(Reference.fit(examined(modes), LEVEL), np.zeros((1, 3)))
    assert found.p_values["mahalanobis x"][0] > 0.5
    assert found.p_values["nearest x"][0] < LEVEL
    assert found.unusual


def test_a_departure_from_a_constant_and_a_number_beyond_all_are_found():
    reference = Reference.fit(examined(counts), LEVEL)
    ordinary = np.array([[3.0, 0.0, 1.0, 0.5, 1.0]])
    assert not look(reference, ordinary).unusual
    off = ordinary.copy()
    off[0, 0] = 3.001
    assert look(reference, off).p_values[FARTHEST][0] < LEVEL
    assert "x[0] = 3.001 is outside the range of all 3000 rows (3 to 3)" in look(reference, off).text()
    for value in (1e30, -1e308):
        wild = ordinary.copy()
        wild[0, 3] = value
        with np.errstate(all="raise"):
            found = reference.look({"x": wild}, XSampler())
        assert found.unusual
        assert np.isfinite(found.score).all()


def test_of_a_batch_chance_is_allowed_for_and_a_gross_one_is_told_of():
    reference = Reference.fit(examined(gaussian, held_out=1000), LEVEL)
    rng = np.random.default_rng(9)
    told = [look(reference, gaussian(rng, 100)).unusual for _ in range(25)]
    assert sum(told) <= 3
    x = gaussian(rng, 100)
    x[37] += 30 * np.arange(6)
    found = look(reference, x)
    assert found.unusual
    assert "the farthest is number 37" in found.text()
    assert 37 in found.features


# -------------------------------------------------------------------------------------------------------------- MMD


def test_mmd_has_its_level_and_its_power():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((150, 3))
    fresh = [mmd_p_value([rng.standard_normal((40, 3))], [rng.standard_normal((150, 3))], rng, 99)[1] for _ in range(300)]
    assert abs(np.mean(np.array(fresh) <= 0.1) - 0.1) < 4 * np.sqrt(0.09 / 300)
    narrow = [mmd_p_value([0.4 * rng.standard_normal((40, 3))], [rows], rng, 99)[1] for _ in range(20)]
    assert max(narrow) <= 0.05, "a batch that is too alike is seen, though each of it is ordinary"


def test_a_batch_reports_mmd_and_one_observation_does_not():
    reference = Reference.fit(examined(gaussian), LEVEL)
    assert look(reference, np.zeros((1, 6))).mmd_p_value is None
    found = look(reference, 0.3 * gaussian(np.random.default_rng(2), 60))
    assert not found.unusual
    assert found.mmd_p_value <= 0.01
    assert look(reference, 0.3 * gaussian(np.random.default_rng(2), 60)).mmd_p_value == found.mmd_p_value


# -------------------------------------------------------------------------------------------------- distances, tails


def test_distances_of_a_known_gaussian():
    rng = np.random.default_rng(0)
    factor = np.tril(rng.standard_normal((4, 4))) + 2 * np.eye(4)
    space = Space.fit(rng.standard_normal((20_000, 4)) @ factor.T, rng)
    x = rng.standard_normal((2000, 4))
    found, _ = space.measure(x @ factor.T)
    np.testing.assert_allclose(found[:, 0] ** 2, np.square(x).sum(1), rtol=0.15)
    precision = np.linalg.inv(factor @ factor.T)
    exact = (x @ factor.T) @ precision / np.sqrt(np.diag(precision))
    np.testing.assert_allclose(space.conditional(x @ factor.T), exact, atol=0.2)


def test_the_shrunk_covariance_is_that_of_ledoit_and_wolf():
    covariance = pytest.importorskip("sklearn.covariance")
    rows = np.random.default_rng(0).standard_normal((30, 12)) * np.arange(1, 13)
    rows -= rows.mean(0)
    np.testing.assert_allclose(shrunk_covariance(rows), covariance.ledoit_wolf(rows, assume_centered=True)[0], rtol=1e-10)


@pytest.mark.parametrize("count", [20, 5000])
def test_tails_are_ranks_and_never_too_small(count):
    rng = np.random.default_rng(0)
    rows = np.stack([rng.standard_normal(count), rng.integers(0, 4, count).astype(float)], 1)
    tails = Tails.fit(rows)
    for x in (rng.standard_normal((1, 2)), rng.integers(-1, 5, (40, 2)).astype(float)):
        below, above = (1 + (rows <= x[:, None]).sum(1)) / (count + 1), (1 + (rows >= x[:, None]).sum(1)) / (count + 1)
        exact = np.minimum(1, 2 * np.minimum(below, above))
        found = tails.p_values(x)
        assert (found >= exact - 1e-12).all()
        np.testing.assert_allclose(found, exact, atol=0.05 if count > 100 else 1e-12)
    assert tails.p_values(np.array([[100.0, -9.0]])).max() == 2 / (count + 1)


def test_ten_thousand_features_take_bounded_memory_and_time():
    def long(rng, n):
        return rng.standard_normal((n, 2)) @ np.random.default_rng(1).standard_normal((2, 10_000)) + rng.standard_normal((n, 10_000))

    made = examined(long, rows=1200, held_out=250)
    tracemalloc.start()
    try:
        reference = Reference.fit(made, LEVEL)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 1200 * 10_000 * 4, "some copies of the rows, and nothing that grows with the square of the features"
    assert sum(v.nbytes for v in arrays_of(reference).values()) < 30e6
    x = long(np.random.default_rng(2), 1)
    start = time.perf_counter()
    assert not look(reference, x).unusual
    assert time.perf_counter() - start < 1
    x[0, 4321] += 15
    assert "x[4321]" in look(reference, x).text()
    assert look(reference, long(np.random.default_rng(2), 1) * 1.2).unusual, "what the leading components leave is counted"


def test_features_are_named_as_their_simulator_names_them():
    plain = ObservationSpec.declare((3, 2), labels=["up", "down"], axis=("time [s]", [0.0, 0.5, 1.0]))
    assert feature_names(plain, np.array([0, 5])) == ["up[0] at time [s] = 0", "down[2] at time [s] = 1"]
    several = ObservationSpec.declare({"a": (2,), "b": (2, 2), "c": ()})
    assert feature_names(several, np.array([1, 4, 6])) == ["a[1]", "b[1, 0]", "c"]
    x = {"a": np.zeros((5, 2)), "b": np.arange(20.0).reshape(5, 2, 2), "c": np.ones(5)}
    back = fields_of(several, flat(several, x))
    assert all(np.array_equal(back[k], x[k]) and back[k].dtype == np.float32 for k in x)


# --------------------------------------------------------------------------------------------------------- the gate


def test_the_gate_measures_level_and_power():
    made = examined(gaussian)
    part = examine(made, Criteria())
    assert [c.name for c in part.criteria] == ["misspecification level"]
    assert part.criteria[0].passed
    figures = part.figures["misspecification"]
    assert figures["alarms"] < 0.05
    assert figures["one_feature"] > 0.95
    assert power(Reference.fit(made, LEVEL), made, 0.0).one_feature == figures["alarms"], "no departure, no power"


def test_held_out_pairs_of_two_kinds_are_refused():
    made = examined(gaussian)
    made.pairs["x"]["x"][:250] *= 2
    criterion = examine(made, Criteria()).criteria[0]
    assert not criterion.passed
    assert criterion.mend


def test_too_few_pairs_for_the_level_are_named_as_not_tested():
    assert examine(examined(gaussian, held_out=150), Criteria()).not_tested == ("misspecification",)
    assert examine(examined(gaussian, held_out=150), Criteria(unlike=0.05)).not_tested == ()


# ------------------------------------------------------------------------------------------- a run, and what it draws


def test_every_draw_carries_it_and_an_odd_observation_is_warned_of_once(line_run, tmp_path):
    posterior = sp.load(line_run.path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.sample(np.zeros(2), 10, seed=0)
    assert posterior.facts["misspecification"] == "none seen"
    assert posterior.facts["misspecification_p_value"] > 0.5
    with pytest.warns(Misspecified, match=r"x\[1\] = 9 is outside the range") as caught:
        posterior.sample([0.0, 9.0], 10, seed=0)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(Misspecified):
        data = posterior.to_arviz([0.0, 9.0], 20, seed=0)
    assert data.posterior.attrs["misspecification_p_value"] == 1 / (line_run_figures(line_run)["held_out"] + 1)
    assert "x[1]" in data.posterior.attrs["misspecification"]
    with pytest.raises(Uncertified, match=r"does not speak of such data: .* x\[1\] = 9"):
        sp.load(line_run.path, refuse_misspecified=True).sample([0.0, 9.0], 10)
    sp.load(line_run.path, refuse_misspecified=True).sample([0.0, 1.0], 10)


def line_run_figures(run):
    return json.loads((run.path / "certificate.json").read_text())["figures"]["misspecification"]


def test_each_of_a_set_of_independent_observations_stands_by_itself(line_run):
    posterior = sp.load(line_run.path)
    sets = replace(posterior, x=replace(posterior.x, shapes={"x": (3, 2)}), set_size=3)
    found = sets.misspecification([[0.0, 0.0], [0.0, 9.0], [1.0, 1.0]])
    assert found.p_value.shape == (3,)
    assert found.score.argmax() == 1
    with pytest.raises(SettingError, match="no test of misspecification"):
        replace(posterior, watch=None).misspecification(np.zeros(2))


def test_what_is_stored_gives_the_same_answers(line_run):
    posterior = sp.load(line_run.path)
    reference = posterior.watch.reference
    again = reference_from(arrays_of(reference), line_run_figures(line_run), line_run)
    x = {"x": np.random.default_rng(0).standard_normal((30, 2)).astype(np.float32)}
    one, two = (Watch(r).look(x, posterior.sampler) for r in (reference, again))
    np.testing.assert_array_equal(one.score, two.score)
    assert one.mmd_p_value == two.mmd_p_value


@pytest.mark.parametrize("harm", ["flip", "missing", "short", "object", "shape", "huge", "nan", "width", "rank"])
def test_a_damaged_or_hostile_file_is_one_line(harm, line_run, tmp_path, monkeypatch):
    path = shutil.copytree(line_run.path, tmp_path / "run") / "diagnostics.npz"
    if harm == "missing":
        path.unlink()
    elif harm == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:  # with a certificate that was forged to fit
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        arrays |= {"object": {"misspecification_units": np.array([{}], dtype=object)}, "shape": {"misspecification_units": np.ones((1, 2))},
                   "width": {"misspecification_x_scale": np.array([1.0, 0.0])}, "rank": {"misspecification_ranks": -arrays["misspecification_ranks"]},
                   "nan": {"misspecification_x_rows": np.full((9, 2), np.nan)}}.get(harm, {})
        np.savez_compressed(path, **arrays)
        if harm == "huge":
            monkeypatch.setattr(sys.modules["sbiplat.gate.watch"], "MOST_BYTES", 1000)
        if harm == "short":
            path.write_bytes(path.read_bytes()[:-2000])
        certificate = path.with_name("certificate.json")
        content = json.loads(certificate.read_text())
        del content["sha256"]
        content["digests"]["diagnostics"] = files.digest_file(path)
        certificate.write_text(json.dumps({**content, "sha256": files.digest_of(content)}))
    with pytest.raises(Uncertified, match=r"diagnostics.npz (is not the one|cannot be read).*run `sbiplat gate") as error:
        sp.load(path.parent)
    assert "\n" not in str(error.value)
    assert sp.load(path.parent, allow_uncertified=True).watch is None
    with pytest.raises(Uncertified, match="no test of misspecification is calibrated"):
        sp.load(path.parent, allow_uncertified=True, refuse_misspecified=True)


def test_a_refused_run_is_watched_too(line_bank, tmp_path):
    run = sp.train(line_bank, "npe", out=tmp_path / "run", flow="gaussian", max_epochs=1, progress=silent)
    sp.gate(run, n=300, draws=100, progress=silent)
    posterior = sp.load(run.path, allow_uncertified=True)
    assert posterior.provenance["certified"] == "no"
    with pytest.warns(Misspecified):
        posterior.sample([0.0, 9.0], 5)


def test_the_command_warns_in_one_line_and_refuses_where_asked(line_run, tmp_path, capsys):
    np.save(tmp_path / "odd.npy", [0.0, 9.0])
    np.save(tmp_path / "plain.npy", [0.0, 1.0])

    def sample(name, *words):
        app(["sample", str(line_run.path), "--observation", str(tmp_path / name), "--n", "20", "--out", str(tmp_path / f"{name}.h5"), *words],
            standalone_mode=False)
        return capsys.readouterr()

    assert sample("plain.npy").err == ""
    said = sample("odd.npy", "--json")
    assert said.err.startswith("warning: this observation is unlike the simulations of the bank (p = ")
    assert said.err.count("\n") == 1
    assert json.loads(said.out)["misspecification_p_value"] < 0.01
    with h5py.File(tmp_path / "odd.npy.h5") as file:
        assert "x[1] = 9" in file.attrs["misspecification"]
        assert file.attrs["misspecification_score"] > 1
    (tmp_path / "odd.npy.h5").unlink()
    with pytest.raises(Uncertified) as error:
        sample("odd.npy", "--refuse-misspecified")
    assert error.value.exit_code == 4
    assert not (tmp_path / "odd.npy.h5").exists()
