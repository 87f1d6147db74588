"""Chains of steps: checked when built, exact densities both ways, and GNPE on the location model by its known laws."""

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy import stats

from sbiplat.errors import SettingError
from sbiplat.posteriors.chain import Chain, Gibbs, Recovery
from sbiplat.posteriors.steps import Derived, Factor, Pinned, Reparametrisation, Target, Tilt, in_words

NOISE, KAPPA = 0.5, 0.8  # of x, and of the kernel
V = NOISE**2  # the posterior's variance under the flat prior


def log_normal(values, mean, sd):
    return (-0.5 * ((values - mean) / sd) ** 2 - math.log(sd * math.sqrt(2 * math.pi))).sum(-1)


def gaussian(name, gives, mean, sd, needs=(), **more):
    """A Factor N(mean(x, columns), sd^2)."""
    def draw(x, columns, n, generator):
        m = mean(x, columns)
        new = m + sd * torch.randn(len(m), n, m.shape[-1], generator=generator, dtype=torch.float64)
        return {gives: new}, log_normal(new, m, sd)

    return Factor(name, (gives,), draw, lambda x, c: log_normal(c[gives], mean(x, c), sd), needs=needs, **more)


def of_x(x, columns):
    return torch.as_tensor(x["x"])[:, None, :]


def shift(takes="u", gives="theta", by="proxy"):
    return Reparametrisation("shift", (takes,), (gives,), lambda x, c: ({gives: c[takes] + c[by]}, torch.zeros(c[takes].shape[:2])),
                             lambda x, c: ({takes: c[gives] - c[by]}, torch.zeros(c[gives].shape[:2])), given=(by,))


def exponential(takes="z", gives="theta"):
    return Reparametrisation("exp", (takes,), (gives,), lambda x, c: ({gives: c[takes].exp()}, c[takes].sum(-1)),
                             lambda x, c: ({takes: c[gives].log()}, -c[gives].log().sum(-1)))


X = {"x": np.array([[0.3], [2.0]])}


def test_density_is_that_of_the_change_of_variables_forwards_and_backwards():
    chain = Chain([gaussian("q", "z", of_x, 0.7), exponential()])
    state = chain.sample(X, 500, 3)
    theta = state.columns["theta"].numpy()[..., 0]
    exact = stats.lognorm(0.7, scale=np.exp(X["x"])).logpdf(theta)
    assert set(state.columns) == {"theta"}, "what a reparametrisation takes is gone"
    np.testing.assert_allclose(state.log_q.numpy(), exact, atol=1e-10)
    np.testing.assert_allclose(chain.log_prob(X, {"theta": state.columns["theta"]}).numpy(), exact, atol=1e-10)


def test_a_seed_fixes_the_draws_and_touches_no_global_generator():
    chain = Chain([gaussian("q", "z", of_x, 0.7)])
    before = torch.random.get_rng_state()
    one, same, other = (chain.sample(X, 20, seed).columns["z"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_pinned_and_derived_columns_need_not_be_given_backwards():
    chain = Chain([
        Pinned("fixed", {"c": torch.tensor([2.0])}), gaussian("q", "z", lambda x, c: c["c"] + 0 * of_x(x, c), 0.5, needs=("c",)),
        Derived("sum", ("c", "z"), ("s",), lambda x, c: {"s": c["c"] + c["z"]}), gaussian("r", "y", lambda x, c: c["s"], 0.1, needs=("s",)),
    ])
    state = chain.sample(X, 200, 0)
    assert (state.columns["c"] == 2).all()
    given = {k: state.columns[k] for k in ("z", "y")}
    np.testing.assert_allclose(chain.log_prob(X, given).numpy(), state.log_q.numpy(), atol=1e-10)
    assert (chain.log_prob(X, {**given, "c": torch.full((2, 200, 1), 2.5, dtype=torch.float64)}) == -math.inf).all()


def test_target_correction_gives_the_evidence_and_a_tilt_the_ratio():
    """q = N(0, 1.5^2), target c N(1, 1): the mean weight is c."""
    q = gaussian("q", "z", lambda x, c: 0 * of_x(x, c), 1.5)
    target = Target("target", ("z",), lambda x, c: math.log(7.0) + log_normal(c["z"], 1.0, 1.0))
    w = Chain([q, target]).sample(X, 40_000, 0).log_weight.exp()
    assert (w.mean(1) - 7).abs().max() < 5 * 7 * math.sqrt(1.0 / 40_000), "w / 7 has variance below 1"
    tilt = Tilt("tilt", ("z",), lambda x, c: log_normal(c["z"], 1.0, 1.0) - log_normal(c["z"], 0.0, 1.5))
    t = Chain([q, tilt]).sample(X, 40_000, 0).log_weight.exp()
    np.testing.assert_allclose(t.numpy() * 7, w.numpy())


# -------------------------------------------------------------------------------------------- the location model


@dataclass
class Recorded:
    """Stops after some iterations, and keeps theta of all."""

    iterations: int
    kept: list = field(default_factory=list)
    figures: dict = field(default_factory=dict)

    def watch(self, x, columns):
        return self

    def done(self, columns):
        self.kept.append(columns["theta"].clone())
        return torch.full((len(columns["theta"]),), len(self.kept) == self.iterations)

    def describe(self):
        return {"rule": "recorded", "iterations": self.iterations}


def kernel():
    return gaussian("kernel", "proxy", lambda x, c: c["pose"], KAPPA, needs=("pose",))


def main():
    """q(u | x, proxy), u = theta - proxy, exact: theta | x, proxy is N((m kappa^2 + proxy v) / (v + kappa^2), v kappa^2 / (v + kappa^2))."""
    return gaussian("main", "u", lambda x, c: (of_x(x, c) - c["proxy"]) * KAPPA**2 / (V + KAPPA**2),
                    math.sqrt(V * KAPPA**2 / (V + KAPPA**2)), needs=("proxy",))


def location(rule):
    """GNPE of the location model under a flat prior, from a start of 5 sd off."""
    pose = Derived("pose", ("theta",), ("pose",), lambda x, c: {"pose": c["theta"]})
    start = gaussian("initial", "pose", lambda x, c: of_x(x, c) + 5 * NOISE, NOISE)
    return [start, Gibbs("gibbs", ("pose",), (kernel(), main(), shift(), pose), rule)]


def test_gibbs_has_the_posterior_as_its_law_and_the_predicted_autocorrelation():
    rule = Recorded(31)
    chain = Chain(location(rule))
    state = chain.sample(X, 20_000, 1)  # of 40 seeds the KS p-values were uniform
    theta = torch.stack(rule.kept).numpy()[..., 0]  # (iterations, B, n)
    assert set(chain.columns) == {"proxy", "theta", "pose"}
    assert state.log_q is None
    assert state.figures["gibbs"]["iterations"] == 31
    last, before = theta[-1], theta[-2]
    for b, m in enumerate(X["x"][:, 0]):
        assert stats.kstest(last[b], stats.norm(m, NOISE).cdf).pvalue > 1e-3
        assert np.corrcoef(before[b], last[b])[0, 1] == pytest.approx(V / (V + KAPPA**2), abs=5 * 0.0071), "5 standard errors of a correlation"
        bias = theta[:4, b].mean(1) - m
        rho = V / (V + KAPPA**2)
        np.testing.assert_allclose(bias, 5 * NOISE * rho ** np.arange(1, 5), atol=5 * NOISE / math.sqrt(20_000) * 2), "it contracts by rho a step"


def test_too_few_iterations_are_seen():
    """Power of the test above: after three steps from 5 sd off it is not yet the posterior."""
    state = Chain(location(Recorded(3))).sample(X, 20_000, 0)
    theta = state.columns["theta"].numpy()[0, :, 0]
    assert stats.kstest(theta, stats.norm(X["x"][0, 0], NOISE).cdf).pvalue < 1e-6


class Fitted:
    """N(m_b, s_b^2) of the proxies, by their moments, widened."""

    def __init__(self, proxy):
        self.mean, self.sd = proxy.mean(1, keepdim=True), 1.1 * proxy.std(1, keepdim=True)

    def draw(self, x, columns, n, generator):
        new = self.mean + self.sd * torch.randn(len(self.mean), n, 1, generator=generator, dtype=torch.float64)
        return {"proxy": new}, (-0.5 * ((new - self.mean) / self.sd) ** 2 - self.sd.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def recovered(log_target):
    rest = [Recovery("recovery", ("proxy",), lambda x, c, g: Fitted(c["proxy"])), main(), shift(), Target("target", ("theta", "proxy"), log_target)]
    return Chain([*location(Recorded(15)), *rest])


def test_density_recovery_is_exact_and_its_weights_need_the_proxys_law():
    """With K(proxy | theta) in the target the evidence of the flat prior is 1 (p(x | theta) integrates to 1 over theta); without, not."""
    def likelihood(x, c):
        return log_normal(of_x(x, c), c["theta"], NOISE)

    state = recovered(lambda x, c: likelihood(x, c) + log_normal(c["proxy"], c["theta"], KAPPA)).sample(X, 20_000, 1)
    w = state.log_weight.exp()
    efficiency = w.mean(1) ** 2 / (w**2).mean(1)
    sd2 = 1.1**2
    expected = math.sqrt(2 * sd2 - 1) / sd2  # the weights are those of the proxies alone: N(m, v + kappa^2) over the widened fit
    np.testing.assert_allclose(efficiency, expected, atol=0.02)
    assert ((w.mean(1) - 1).abs() < 5 * torch.sqrt((1 / efficiency - 1) / 20_000)).all()
    proxy, theta = state.columns["proxy"], state.columns["theta"]
    fitted_mean, fitted_var = proxy.mean(1, keepdim=True), proxy.var(1, keepdim=True)
    joint = (-0.5 * (proxy - fitted_mean) ** 2 / fitted_var - 0.5 * torch.log(2 * math.pi * fitted_var))[..., 0]
    conditional = log_normal(theta - proxy, (of_x(X, {}) - proxy) * KAPPA**2 / (V + KAPPA**2), math.sqrt(V * KAPPA**2 / (V + KAPPA**2)))
    assert (state.log_q - joint - conditional).abs().mean() < 0.05, "log q(theta, proxy)"
    missing = recovered(likelihood).sample(X, 20_000, 1).log_weight.exp()
    assert (missing.mean(1) - 1).abs().min() > 0.1
    effective = missing.mean(1) ** 2 / (missing**2).mean(1)
    assert (effective < efficiency).all()


# ------------------------------------------------------------------------------------------- checked when it is built


def anything(name, gives=(), needs=(), **more):
    return Factor(name, gives, lambda x, c, n, g: ({}, None), needs=needs, **more)


TARGET = Target("exact", ("theta",), lambda x, c: c["theta"][..., 0])


@pytest.mark.parametrize(("steps", "told"), [
    ([], "needs at least one step"),
    ([anything("a", ("u",), ("proxy",))], r"step 'a' \(factor\) needs column 'proxy', and there are none; add a Factor that gives it"),
    ([anything("a", ("u",), ("p",)), anything("b", ("p",))], "put 'b', which gives it, before"),
    ([anything("a", ("z",)), exponential(), anything("b", ("y",), ("z",))], "step 'exp' has taken it: put 'b' before"),
    ([anything("a", ("z",)), anything("b", ("z",))], "step 'b' .* gives column 'z', which was there before; give it another name"),
    ([anything("a", ("z",)), anything("a", ("y",))], "two steps have this name; rename one"),
    ([anything("a", ("z", "z"))], "gives a column twice"),
    ([anything("a", ("theta",), density=False), TARGET], r"step 'exact' \(target\) needs the density .*; put a Recovery between them"),
    ([*location(Recorded(1)), TARGET], r"step 'exact' \(target\) needs the density .*; put a Recovery between them"),
    ([anything("a", ("proxy",)), main(), shift(), TARGET], r"'exact' \(target\) says nothing of column 'proxy', .*include its law"),
    ([anything("a", ("theta",)), TARGET, Target("again", ("theta",), TARGET.log_target)], "after weights were set by 'exact'; make one target"),
    ([anything("a", ("pose",)), Tilt("t", ("pose",), TARGET.log_target), location(Recorded(1))[1]], "would move weighted draws; put it before step 't'"),
    ([anything("a", ("pose",)), Gibbs("g", ("pose",), (anything("k", ("y",), ("pose",)),), Recorded(1))], "renews column 'pose', which none of its steps gives"),
    ([anything("a", ("theta",)), Gibbs("g", ("theta",), (TARGET,), Recorded(1))], "iterates 'exact', a target: put it after"),
])
def test_a_wrong_chain_is_one_line_that_names_the_step_and_the_mend(steps, told):
    with pytest.raises(SettingError, match=told) as error:
        Chain(steps)
    assert "\n" not in str(error.value)


def test_a_step_that_gives_other_than_it_declares_is_told():
    wrong = Factor("a", ("z",), lambda x, c, n, g: ({"y": torch.zeros(2, n, 1)}, torch.zeros(2, n)))
    with pytest.raises(SettingError, match="step 'a' gave the columns y; it declares z"):
        Chain([wrong]).sample(X, 5, 0)
    flat = Factor("a", ("z",), lambda x, c, n, g: ({"z": torch.zeros(2, n)}, torch.zeros(2, n)))
    with pytest.raises(SettingError, match=r"of shape \(2, 5\); expected \(2, 5, width\)"):
        Chain([flat]).sample(X, 5, 0)
    silent = Factor("a", ("z",), lambda x, c, n, g: ({"z": torch.zeros(2, n, 1)}, None))
    with pytest.raises(SettingError, match="gave no density: set density=False"):
        Chain([silent]).sample(X, 5, 0)


def test_what_cannot_be_evaluated_backwards_says_why():
    for steps, told in [(location(Recorded(1)), "'gibbs'"), ([anything("a", ("z",))], "'a' has no log_prob"),
                        ([gaussian("q", "z", of_x, 1.0), Reparametrisation("r", ("z",), ("t",), lambda x, c: None)], "an inverse")]:
        with pytest.raises(SettingError, match=told):
            Chain(steps).log_prob(X, {"theta": torch.zeros(2, 3, 1)})


def test_a_chain_describes_itself_as_json():
    said = recovered(lambda x, c: c["theta"][..., 0]).description()
    assert json.loads(json.dumps(said)) == said
    assert [s["step"] for s in said] == ["factor", "gibbs", "recovery", "factor", "reparametrisation", "target"]
    assert [s["name"] for s in said[1]["steps"]] == ["kernel", "main", "shift", "pose"]
    assert said[1]["rule"] == {"rule": "recorded", "iterations": 15}
    assert in_words(said).startswith("initial -> pose; gibbs [kernel -> proxy; main -> u; ")


def test_a_block_goes_on_with_the_observations_that_are_not_done():
    """Each observation ends at its own count, with its own x and columns, in its own place."""
    @dataclass
    class Until:
        counts: torch.Tensor
        figures: dict = field(default_factory=dict)

        def watch(self, x, columns):
            self.alive, self.now = torch.arange(len(self.counts)), 0
            return self

        def done(self, columns):
            self.now += 1
            assert len(columns["k"]) == len(self.alive), "those that are done are not iterated any more"
            ended = self.counts[self.alive] <= self.now
            self.alive = self.alive[~ended]
            return ended

        def describe(self):
            return {}

    begin = Factor("begin", ("k",), lambda x, c, n, g: ({"k": torch.zeros(len(x["x"]), n, 1, dtype=torch.float64)}, None), density=False)
    add = Derived("add", ("k",), ("k",), lambda x, c: {"k": c["k"] + torch.as_tensor(x["x"])[:, None]})
    made = Chain([begin, Gibbs("count", ("k",), (add,), Until(torch.tensor([3, 1, 2])))])
    state = made.sample({"x": np.array([[1.0], [10.0], [100.0]])}, 4, 0)
    assert state.columns["k"][..., 0].tolist() == [[3.0] * 4, [10.0] * 4, [200.0] * 4]
    assert state.figures["count"]["iterations"] == 3
