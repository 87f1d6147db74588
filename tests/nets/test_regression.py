"""The linear-Gaussian posterior in closed form: exact for a linear-Gaussian model, harmless elsewhere."""

import numpy as np
import torch

import sbiplat as sp
from sbiplat.estimators.base import Architecture
from sbiplat.estimators.npe import NPE
from sbiplat.nets.regression import Regression
from sbiplat.observation import ObservationSpec
from sbiplat.progress import silent
from sbiplat.training import batches, trainer

ROWS, FEATURES, DIM = 20_000, 6, 3


def linear_gaussian(rows, seed=0):
    """z ~ N(0, I), u = G z + noise of covariance C; and the posterior's mean map K and covariance S."""
    law = np.random.default_rng(99)
    G, root = law.normal(size=(FEATURES, DIM)), 0.5 * law.normal(size=(FEATURES, FEATURES))
    C = root @ root.T + 0.2 * np.eye(FEATURES)
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(rows, DIM))
    u = z @ G.T + rng.multivariate_normal(np.zeros(FEATURES), C, rows)
    S = np.linalg.inv(np.eye(DIM) + G.T @ np.linalg.solve(C, G))
    return torch.as_tensor(u, dtype=torch.float32), torch.as_tensor(z, dtype=torch.float32), S @ G.T @ np.linalg.inv(C), S


def fitted(u, z):
    regression = Regression(u.shape[1], z.shape[1])
    regression.fit(u, z)
    return regression


def test_a_linear_gaussian_posterior_is_found_in_closed_form():
    u, z, K, S = linear_gaussian(ROWS)
    regression = fitted(u, z)
    # an element of the map has sd sqrt(S_kk / (rows var)) < 0.01; of the covariance sqrt(2 / rows) = 1 % of its size
    np.testing.assert_allclose(regression.weight.numpy().T, K, atol=0.04)
    np.testing.assert_allclose((regression.factor @ regression.factor.mT).numpy(), S, atol=0.05 * S.diagonal().max())


def test_whitened_parameters_of_new_rows_are_standard_normal():
    regression = fitted(*linear_gaussian(ROWS)[:2])
    u, z, *_ = linear_gaussian(ROWS, seed=1)
    w = regression.whiten(z, regression(u)).numpy()
    np.testing.assert_allclose(w.mean(0), 0, atol=5 / np.sqrt(ROWS))
    np.testing.assert_allclose(np.cov(w.T), np.eye(DIM), atol=0.05)


def test_whitening_is_undone_and_its_jacobian_is_autograds():
    regression = fitted(*linear_gaussian(500)[:2])
    u, z, *_ = linear_gaussian(4, seed=2)
    mean = regression(u)
    torch.testing.assert_close(regression.unwhiten(regression.whiten(z, mean), mean), z, rtol=1e-4, atol=1e-5)
    jacobian = torch.autograd.functional.jacobian(lambda v: regression.whiten(v, mean[0]), z[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], regression.log_det)


def test_rows_that_were_used_do_not_look_better_than_new_ones():
    # as many features as a sixth of the rows, none of which says anything: residuals of the fit itself would be 9 % too small
    rng = np.random.default_rng(3)
    u, z = (torch.as_tensor(rng.normal(size=(300, n)), dtype=torch.float32) for n in (50, 2))
    regression = fitted(u, z)
    fresh, new = (torch.as_tensor(rng.normal(size=(20_000, n)), dtype=torch.float32) for n in (50, 2))
    sd = regression.whiten(new, regression(fresh)).std(0).numpy()
    np.testing.assert_allclose(sd, 1, atol=0.12)  # 1 / sqrt(2 * 300) = 0.04 from the covariance of 300 rows
    assert regression.weight.abs().max() < 0.1


def test_means_in_training_are_those_of_the_fit_without_the_row():
    u, z, *_ = linear_gaussian(60)
    whole = fitted(u, z)
    found = whole.left_out(whole(u), u, z)
    for k in (0, 17, 42):
        rest = torch.arange(60) != k
        centred = (u - u.mean(0)).double()
        ridge = torch.linalg.inv(whole.precision.double()) - centred.mT @ centred / 60  # r I
        x, y = u[rest].double(), z[rest].double()
        x_mean, y_mean = x.mean(0), y.mean(0)
        weight = torch.linalg.solve((x - x_mean).mT @ (x - x_mean) + 60 * ridge, (x - x_mean).mT @ (y - y_mean))
        torch.testing.assert_close(found[k].double(), (u[k].double() - x_mean) @ weight + y_mean, rtol=0.02, atol=0.02)


def test_a_net_sees_training_rows_as_wide_as_new_ones():
    rng = np.random.default_rng(5)
    law = rng.normal(size=(2, 80)) / 8
    z, new = rng.normal(size=(200, 2)), rng.normal(size=(5000, 2))
    u, fresh = (torch.as_tensor(v @ law + 0.5 * rng.normal(size=(len(v), 80)), dtype=torch.float32) for v in (z, new))
    z, new = (torch.as_tensor(v, dtype=torch.float32) for v in (z, new))
    regression = fitted(u, z)
    seen = regression.whiten(z, regression.left_out(regression(u), u, z)).std(0)
    plain = regression.whiten(z, regression(u)).std(0)
    there = regression.whiten(new, regression(fresh)).std(0)
    torch.testing.assert_close(seen, there, rtol=0.15, atol=0.0)  # 1 / sqrt(400) = 0.05 each
    assert bool((plain < 0.85 * there).all()), "which the fit's own residuals are not"


def test_without_features_nothing_is_changed():
    regression = fitted(torch.zeros(10, 0), torch.randn(10, 2, generator=torch.Generator().manual_seed(0)))
    z = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(regression.whiten(z, regression(torch.zeros(1, 0))), z)
    assert float(regression.log_det) == 0


def test_constant_and_repeated_features_are_no_trouble():
    u, z, *_ = linear_gaussian(1000)
    regression = fitted(torch.cat([u, u, torch.ones(1000, 1)], dim=1), z)
    assert bool(torch.isfinite(regression.weight).all())
    residual = z - regression(torch.cat([u, u, torch.ones(1000, 1)], dim=1))
    assert float(residual.var()) <= 1.05 * float((z - fitted(u, z)(u)).var())


def test_only_rows_that_were_fitted_are_left_out_and_only_in_training():
    """For a row that was not fitted, m - h z would hand its own z to the net."""
    spec = ObservationSpec.declare((FEATURES,))
    estimator = Architecture("npe", NPE.settings_class(flow="gaussian"), DIM, spec, True).build(0)
    u, z, *_ = linear_gaussian(200)
    estimator.fit_scales(z, {"x": u})
    x = estimator.prepare({"x": u})

    def means():
        return estimator.context_of(z, x)[:, -DIM:]

    plain = estimator.context(x)[:, -DIM:]
    torch.testing.assert_close(means(), plain)
    estimator.rows_were_fitted = True
    assert not torch.allclose(means(), plain)
    torch.testing.assert_close(estimator.eval().context_of(z, x)[:, -DIM:], plain)


def test_training_says_whether_every_row_was_fitted(line_bank, tmp_path, monkeypatch):
    seen = []
    original = trainer._Training.finish

    def finish(self):
        seen.append(self.estimator.rows_were_fitted)
        return original(self)

    monkeypatch.setattr(trainer._Training, "finish", finish)
    sp.train(line_bank, "npe", out=tmp_path / "all", flow="gaussian", max_epochs=1, progress=silent)
    monkeypatch.setattr(batches, "SCALE_ROWS", 2000)
    sp.train(line_bank, "npe", out=tmp_path / "some", flow="gaussian", max_epochs=1, progress=silent)
    assert seen == [True, False]


def test_it_may_be_left_away():
    estimator = Architecture("npe", NPE.settings_class(flow="gaussian", regression=False), DIM, ObservationSpec.declare((FEATURES,)), True).build(0)
    u, z, *_ = linear_gaussian(200)
    estimator.fit_scales(z, {"x": u})
    context = estimator.context(estimator.prepare({"x": u}))
    torch.testing.assert_close(estimator.whiten(z, context), z)
