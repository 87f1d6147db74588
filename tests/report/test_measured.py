"""What the gate measured, on the page: the diagnosis, where calibration fails, robustness, and the worst change of an observation."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from test_report import LOOSE, NAMES, Page, X, hostile, page_of

import sbiplat as sp
from sbiplat import files
from sbiplat.diagnostics.misspecification import transformed
from sbiplat.gate import learning
from sbiplat.gate.certificate import hashed
from sbiplat.observation import ObservationSpec
from sbiplat.progress import silent
from sbiplat.report import figures, tested, worst
from sbiplat.report.words import number

ROBUST = {"attacked": 12, "attack_steps": 4, "attack_restarts": 1, "attack_queries": 10, "excess": 100.0, "attacked_coverage": 1.0,
          "masking": 1e3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("measured")
    bank = sp.simulate(hostile, 2000, 1, place / "bank", workers=1, progress=silent)
    return sp.train(bank, "npe", out=place / "run", flow="gaussian", max_epochs=3, batch_size=128, progress=silent).path


@pytest.fixture(scope="module")
def certified(trained: Path) -> Path:
    place = trained.with_name("certified")
    shutil.copytree(trained, place)
    assert sp.gate(place, progress=silent, **LOOSE, **ROBUST).passed
    return place


@pytest.fixture(scope="module")
def refused(trained: Path) -> Path:
    place = trained.with_name("refused")
    shutil.copytree(trained, place)
    assert not sp.gate(place, progress=silent, **{**LOOSE, **ROBUST, "information": 1e3}).passed
    return place


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which takes most of the time."""
    monkeypatch.setattr(figures, "image", lambda figure, raster=False: figures.Image("data:image/png;base64,AAAA", 10))


@pytest.fixture
def own(certified: Path, tmp_path: Path) -> Path:
    """A certified run of the test's own."""
    shutil.copytree(certified, tmp_path / "run")
    return tmp_path / "run"


def _content(run: Path) -> dict[str, Any]:
    return json.loads((run / "certificate.json").read_text())


def _arrays(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "diagnostics.npz") as archive:
        return {name: archive[name] for name in archive.files}


def _with_arrays(run: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Another diagnostics.npz, and a certificate to which it belongs."""
    arrays = _arrays(run)
    change(arrays)
    out = io.BytesIO()
    np.savez(out, **arrays)
    (run / "diagnostics.npz").write_bytes(out.getvalue())
    content = _content(run)
    content["digests"]["diagnostics"] = files.digest_bytes(out.getvalue())
    content["sha256"] = hashed(content)
    (run / "certificate.json").write_text(json.dumps(content))


# ----------------------------------------------------------------------------------------------- head and diagnosis


def test_the_head_says_level_and_that_nobody_signed(certified: Path) -> None:
    page = page_of(certified)
    assert "Level: standard, for use. Signature: none; the certificate's hash guards against mistakes, not against forgery." in page.text


def test_the_head_names_the_key_that_signed_and_a_signature_that_does_not_fit(own: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from sbiplat.gate import signature

    key = signature.keygen(tmp_path / "site.key")
    content = signature.signed(_content(own), signature.read_private(tmp_path / "site.key"))
    (own / "certificate.json").write_text(json.dumps(content))
    assert f"Signature: of the key {key}, and it fits." in page_of(own).text
    content["signature"]["public_key"] = (signature.keygen(tmp_path / "other.key"), (tmp_path / "other.key.pub").read_text().strip())[1]
    (own / "certificate.json").write_text(json.dumps(content))
    assert "Signature: does not hold: the signature is not that of its key" in page_of(own).text


def test_a_refused_run_shows_its_defects_with_the_command_as_typed(refused: Path) -> None:
    page, found = page_of(refused), _content(refused)["diagnosis"]
    assert found
    for finding in found:
        for part in ("defect", "evidence", "mend"):
            assert re.sub(r"\s+", " ", finding[part]) in page.text
    commands = re.findall(r"<code>(.*?)</code>", page.html)
    assert any("sbiplat train" in command and "--estimator npe" in command for command in commands)
    assert "Failed criterion" not in page.text, "the diagnosis says it already"
    assert "diagnosis" in page.ids


def test_a_certified_run_has_no_diagnosis(certified: Path) -> None:
    assert "diagnosis" not in page_of(certified).ids


# ------------------------------------------------------------------------------------------------------- robustness


def test_robustness_has_the_certificate_s_figures(certified: Path) -> None:
    page = page_of(certified)
    assert {"robustness", "kl", "robustness-table"} <= page.ids
    for told in _content(certified)["figures"]["robustness"]["eps"]:
        for value in (told["eps"], told["worst_kl"][1], told["noise_kl"][1], told["excess"]):
            assert number(float(value)) in page.text
    assert "Here each of 12 held-out observations is changed a little" in page.text


def test_robustness_that_was_not_tested_says_why(own: Path) -> None:
    content = _content(own)
    content["figures"]["robustness"] = {"not_tested": "no <b>density"}
    content["not_tested"].append("robustness")
    content["sha256"] = hashed(content)
    (own / "certificate.json").write_text(json.dumps(content))
    _with_arrays(own, lambda arrays: [arrays.pop(name) for name in list(arrays) if name.startswith("attack")])
    page = page_of(own)
    assert "It was not tested: no <b>density." in page.text
    assert "kl" not in page.ids
    assert "robustness: whether small, deliberate or unlucky changes of the data mislead the posterior" in page.text


def test_the_pair_that_moved_most_is_kept_as_it_was_attacked(refused: Path) -> None:
    """x + delta - x, in units of what eps is in each feature, is delta; the truth is that of a row of the bank."""
    arrays, spec = _arrays(refused), hostile.x
    k, pair = arrays["attack_pair"]
    assert arrays["attack_worst"][k, pair] == arrays["attack_worst"][k].max()
    rows = transformed(spec, arrays["attack_pair_x"].astype(float))
    eps = arrays["attack_eps"][k]
    np.testing.assert_allclose((rows[1] - rows[0]) / (rows[2] - rows[0]) * eps, arrays["attack_delta"][k, pair], rtol=0.02, atol=0.002)
    assert np.sqrt(np.square(arrays["attack_delta"][k, pair]).mean()) == pytest.approx(eps, rel=1e-3)
    with h5py.File(refused.with_name("bank") / "bank.h5") as bank:
        theta, x = bank["theta"][:], bank["x"][:]
    row = int(np.abs(theta - arrays["attack_pair_truth"]).sum(1).argmin())
    np.testing.assert_allclose(arrays["attack_pair_truth"], theta[row], rtol=1e-4)
    np.testing.assert_allclose(arrays["attack_pair_x"][0], x[row].ravel(), rtol=1e-5)
    assert arrays["attack_pair_draws"].shape == (2, 1000, 3)
    assert arrays["attack_pair_draws"].dtype == np.float32


def test_a_refused_run_shows_a_held_out_pair_and_never_the_observation_s_posterior(refused: Path) -> None:
    page, arrays = page_of(refused, X), _arrays(refused)
    assert "The held-out simulation that moved most" in page.text
    assert {"changed-x", "changed-posterior"} <= page.ids
    assert not {"posterior-table", "corner", "predictive"} & page.ids
    k, pair = arrays["attack_pair"]
    assert f"moves the posterior by {number(float(arrays['attack_worst'][k, pair]))} nats" in page.text
    assert "a known truth, not your observation" in page.text


def test_a_certified_run_shows_the_gate_s_attack_on_the_observation(own: Path) -> None:
    page = page_of(own, X, seed=4)
    assert "The worst change of your observation" in page.text
    assert "The held-out simulation that moved most" not in page.text
    found = sp.attack(own, X, eps=0.3, seed=4, steps=4, restarts=1, queries=10)
    assert f"moves the posterior by {number(float(found.kl[0]))} nats; noise of that size moves it by {number(float(found.noise_kl[0]))}," \
        in page.text


def test_the_change_that_is_drawn_is_the_attack_s(certified: Path) -> None:
    run, held = sp.Run.open(certified), sp.load(certified)
    theta = held.sample(X, 400, seed=0)
    change = worst.of_observation(run, sp.Certificate.read(run), held, {"x": X.astype("float32")}, theta, 0)
    found = sp.attack(certified, X, eps=0.3, seed=0, steps=4, restarts=1, queries=10)
    np.testing.assert_allclose(change.rows[1], np.ravel(found.x), rtol=1e-5)
    np.testing.assert_allclose(change.rows[0], X.ravel(), rtol=1e-6)
    np.testing.assert_allclose(change.there.mean(0), held.sample(found.x, 400, seed=1).mean(0), atol=6 * theta.std(0).max() / np.sqrt(200))
    assert change.truth is None


def test_noise_is_of_the_attack_s_size_and_around_x(certified: Path) -> None:
    """In whitened x each of 24 features has mean 0 exactly, by pairs, and over 200 draws the root mean square eps within 5 %."""
    run, arrays = sp.Run.open(certified), _arrays(certified)
    change = worst.of_pair(run, arrays, _content(certified)["figures"]["robustness"])
    assert change is not None
    rows = transformed(run.x, change.rows)
    unit = (rows[2] - rows[0]) / change.eps
    delta = (transformed(run.x, worst.noises(run, change, 0)) - rows[0]) / unit
    np.testing.assert_allclose(delta.mean(0), 0, atol=1e-6)
    assert np.sqrt(np.square(delta).mean()) == pytest.approx(change.eps, rel=0.05)


def test_without_a_bank_the_held_out_pair_stands_in_and_the_page_says_why(own: Path) -> None:
    record = json.loads((own / "run.json").read_text())
    record["bank"].update(path="/nowhere", relative_path="../nowhere")
    (own / "run.json").write_text(json.dumps(record))
    page = page_of(own, X)
    assert "Your observation was not attacked:" in page.text
    assert "The held-out simulation that moved most" in page.text
    assert "posterior-table" in page.ids


@pytest.mark.parametrize("spoil", [lambda run: (run / "certificate.json").unlink(),
                                   lambda run: (run / "certificate.json").write_text("{")], ids=["untested", "void"])
def test_a_run_without_a_certificate_that_holds_shows_no_change(own: Path, spoil: Any) -> None:
    spoil(own)
    assert not {"robustness", "changed-x", "changed-posterior", "kl", "by-x"} & page_of(own, X).ids


# ------------------------------------------------------------------------------------------------------ damaged arrays


DAMAGE = {
    "no noise": (lambda a: a.pop("attack_noise"), "The figure of robustness is left out: diagnostics.npz is damaged", "kl"),
    "other shape": (lambda a: a.update(attack_worst=a["attack_worst"][0]), "The figure of robustness is left out", "kl"),
    "not finite": (lambda a: a.update(attack_worst=a["attack_worst"] * np.nan), "The figure of robustness is left out", "kl"),
    "text": (lambda a: a.update(attack_eps=np.array(["<b>"] * 3)), "The figure of robustness is left out", "kl"),
    "pair": (lambda a: a.update(attack_pair=np.array([9, 0])), "The worst change is left out", "changed-x"),
    "pair's x": (lambda a: a.update(attack_pair_x=a["attack_pair_x"][:, :-1]), "The worst change is left out", "changed-x"),
    "pair's draws": (lambda a: a.update(attack_pair_draws=a["attack_pair_draws"][:, :, :2]), "The worst change is left out",
                     "changed-posterior"),
    "curves": (lambda a: a.update(ecp=a["ecp"][:, :-1]), "The figures of coverage are left out", "ranks"),
    "names": (lambda a: a.update(names=np.zeros(4)), "The figures of coverage are left out", "ranks"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_arrays_leave_their_section_out_with_a_sentence(own: Path, how: str) -> None:
    change, sentence, gone = DAMAGE[how]
    _with_arrays(own, change)
    page = page_of(own)
    assert sentence in page.text
    assert f"run `sbiplat gate {own}` again" in page.text
    assert gone not in page.ids
    assert "CERTIFIED" in page.text, "the rest of the page stands"


def test_a_run_whose_gate_kept_no_pair_has_no_such_section(own: Path) -> None:
    _with_arrays(own, lambda arrays: [arrays.pop(name) for name in list(arrays) if name.startswith("attack_pair")])
    page = page_of(own)
    assert "kl" in page.ids
    assert not {"changed-x", "changed-posterior"} & page.ids
    assert "left out:" not in page.text


# ------------------------------------------------------------------------------------------------ where it fails


AXES, SETS = 3, 4


def _local(ranks: np.ndarray, features: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a gate: ranks (P, K), features of x (P, A)."""
    edges = np.quantile(features, np.linspace(0, 1, 11), axis=0).T
    place = np.stack([np.searchsorted(e[1:-1], f, side="right") for e, f in zip(edges, features.T, strict=True)], 1)

    def by_tenth(values: np.ndarray) -> np.ndarray:
        return np.array([[values[place[:, a] == t].mean(0) for t in range(10)] for a in range(features.shape[1])])

    return {"ranks": ranks, "local_names": np.array([f"SBC p{k}" for k in range(ranks.shape[1])]),
            "local_axes": np.array([f"x, feature {a}" for a in range(features.shape[1])]), "local_edges": edges,
            "local_bias": by_tenth(ranks - 0.5), "local_spread": by_tenth(np.abs(2 * ranks - 1) - 0.5)}


@pytest.fixture
def drawn_maps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was to be drawn, instead of figures."""
    seen: list[Any] = []
    monkeypatch.setattr(figures, "maps", lambda panels, rows, *args: seen.append((panels, rows)))
    return seen


def test_what_is_calibrated_has_a_framed_cell_in_one_report_of_twenty(drawn_maps: list[Any]) -> None:
    """200 reports: at 5 % ten have one, with an sd of 3.1; the normal approximation and dependence between cells make it fewer."""
    rng = np.random.default_rng(0)
    framed = [tested.places(_local(rng.uniform(size=(500, SETS)), rng.standard_normal((500, AXES))), [])["by_x"]["marked"] > 0
              for _ in range(200)]
    assert sum(framed) <= 20


def test_what_is_wrong_in_a_tenth_of_x_is_framed_there(drawn_maps: list[Any]) -> None:
    rng = np.random.default_rng(1)
    ranks, features = rng.uniform(size=(1000, SETS)), rng.standard_normal((1000, AXES))
    there = features[:, 2] > np.quantile(features[:, 2], 0.9)
    ranks[there, 1] = np.sqrt(ranks[there, 1])  # mean 2/3: the posterior lies too low
    found = tested.places(_local(ranks, features), [])["by_x"]
    (panels, rows), = drawn_maps
    first = panels[0]
    assert first.title == "bias along x, feature 2", "the axis along which it departs most comes first"
    assert rows == ["p0", "p1", "p2", "p3"]
    assert np.argwhere(first.far).tolist() == [[1, 9]]
    assert first.values[1, 9] == pytest.approx(1 / 6, abs=0.09)
    assert found["marked"] >= 1


def test_features_of_few_values_are_drawn_but_not_judged(drawn_maps: list[Any]) -> None:
    arrays = _local(np.random.default_rng(2).uniform(size=(1000, SETS)), np.random.default_rng(3).standard_normal((1000, AXES)))
    arrays["local_edges"][:, 5] = arrays["local_edges"][:, 4]
    arrays["local_bias"][0, 3, 2] = 0.4
    assert tested.places(arrays, [])["by_x"]["marked"] == 0


def test_a_tenth_of_the_prior_with_too_many_truths_is_framed(drawn_maps: list[Any]) -> None:
    stated = np.full((3, 10), 0.1)
    seen = stated.copy()
    seen[1, 7], seen[1, 2] = 0.16, 0.04
    found = tested.places({"ranks": np.zeros((1000, 2)), "regions_found": seen, "regions_stated": stated}, ["a", "b", "c"])
    (panels, rows), = drawn_maps
    assert rows == ["a", "b", "c"]
    assert sorted(map(tuple, np.argwhere(panels[0].far).tolist())) == [(1, 2), (1, 7)]
    assert found["by_theta"]["most"] == pytest.approx(0.06)
    assert found["by_x"] is None


def _plant(arrays: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(4)
    pairs = len(arrays["ranks"])
    made = _local(rng.uniform(size=(pairs, 3)), rng.standard_normal((pairs, 2)))
    made.pop("ranks")
    arrays.update(made, local_axes=np.array(["estimate of <b>", "$x$"]), regions_found=np.full((3, 10), 0.1),
                  regions_stated=np.full((3, 10), 0.1))


def test_maps_stand_on_the_page_where_the_gate_made_them(own: Path) -> None:
    _with_arrays(own, lambda arrays: [arrays.pop(n) for n in list(arrays) if n.startswith(("local_", "regions_"))])
    assert "By parts of the data" not in page_of(own).text
    _with_arrays(own, _plant)
    page = page_of(own)
    assert {"by-x", "by-theta"} <= page.ids
    assert "Good: pale, and no cell framed" in page.text


@pytest.mark.parametrize("name", ["local_bias", "local_edges", "regions_stated", "local_names"])
def test_damaged_maps_are_left_out_with_a_sentence(own: Path, name: str) -> None:
    _with_arrays(own, lambda arrays: (_plant(arrays), arrays.update({name: arrays[name][:-1]})))
    page = page_of(own)
    assert "The maps of local coverage are left out: diagnostics.npz is damaged" in page.text
    assert not {"by-x", "by-theta"} & page.ids


def test_the_scale_of_a_map_is_centred_at_zero() -> None:
    values = np.array([[0.3, -0.1], [0.0, 0.05]])
    for limit, most in ((0.12, 0.3), (0.2, 0.4)):  # at twice what chance makes, so that chance is pale
        panels = [figures.Map("a", values, np.full((2, 2), limit)), figures.Map("b", values / 10, np.full((2, 2), np.inf))]
        drawn = figures.maps(panels, ["p", "q"], "departure", 2, "where")
        shown = [ax.images[0] for ax in drawn.axes if ax.images]
        assert [image.get_clim() for image in shown] == [(-most, most)] * 2
        assert [len(ax.patches) for ax in drawn.axes[:2]] == [1, 0]


# --------------------------------------------------------------------------------- the learning curve and the features


def _curve(run: Path, weights: str | None = None, **changed: Any) -> None:
    content = {"format_version": 1, "weights": weights or sp.Run.open(run).weights_digest, "rows": [500, 1000, 2000],
               "log_density": [1.0, 1.4, 1.6], "gains": [[0.4, 0.02], [0.2, 0.02]], "next_gain": 0.1, "enough": 4000, "held_out": 130}
    (run / learning.FILE).write_text(json.dumps({**content, **changed}))


def test_the_learning_curve_is_drawn_with_what_it_says(own: Path) -> None:
    assert "learning-curve" not in page_of(own).ids
    _curve(own)
    page = page_of(own)
    assert "learning-curve" in page.ids
    assert "the last doubling, to 2,000 rows, gained 0.200 +- 0.020 nats, the next one would gain about 0.10" in page.text


def test_a_learning_curve_of_other_weights_is_not_shown_and_a_damaged_one_is_told_of(own: Path) -> None:
    _curve(own, weights="0" * 64)
    assert "learning-curve" not in page_of(own).ids
    _curve(own, rows=[1])
    page = page_of(own)
    assert "learning-curve" not in page.ids
    assert "The learning curve is left out:" in page.text


def test_the_next_doubling_is_drawn_where_the_curve_has_it() -> None:
    drawn = figures.learning_curve((500, 1000, 2000), (1.0, 1.4, 1.6), ((0.4, 0.02), (0.2, 0.02)), 0.1)
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn.axes[0].lines}
    np.testing.assert_allclose(lines["the next doubling, if it goes on so"], [[2000, 1.6], [4000, 1.7]])


def test_the_oddest_features_are_named_with_their_range(own: Path) -> None:
    sp.gate(own, progress=silent, **{**LOOSE, **ROBUST, "unlike": 0.05})
    odd = X.copy()
    odd[3, 1] = 1e6
    with pytest.warns(sp.Misspecified):
        page = page_of(own, odd)
    assert "features" in page.ids
    row = re.search(r"<tr><td>down\[3\].*?</tr>", page.html)
    assert row is not None
    assert '<td class="n no">1e+06</td>' in row[0]


# ------------------------------------------------------------------------------------------------------- the figures


def test_the_limit_that_is_drawn_is_features_times_noise() -> None:
    rng = np.random.default_rng(5)
    noise, cover = rng.uniform(1, 2, (3, 20)), np.full((3, 2, 4), 0.5)
    found = figures.Robust(np.array([0.1, 0.3, 1.0]), 3 * noise, noise, np.full((3, 20), np.nan), 7.0, 0.1, np.array([0.5, 0.9]), cover,
                           cover, np.full((3, 2), 0.2))
    drawn = figures.robustness(found)
    lines = {line.get_label().replace("\n", " "): line.get_ydata() for line in drawn.axes[0].lines}
    np.testing.assert_allclose(lines["most that is in proportion: 7 × noise"], 7 * np.median(noise, axis=1))
    np.testing.assert_allclose(lines["worst change found: median"], np.median(3 * noise, axis=1))
    assert not any("gradients" in label for label in lines), "no search was made"
    assert [ax.get_xscale() for ax in drawn.axes] == ["log"] * 3
    assert drawn.axes[0].get_yscale() == "log"


def test_robustness_whose_data_the_sampler_refused_is_drawn() -> None:
    kl = np.ones((2, 5))
    kl[0] = 0
    cover = np.full((2, 2, 1), np.nan)
    drawn = figures.robustness(figures.Robust(np.array([0.1, 1.0]), kl, kl / 2, kl, 3.0, 0.1, np.array([0.5, 0.9]), cover, cover,
                                              np.full((2, 2), 0.4)))
    drawn.canvas.draw()
    lines = {line.get_label().replace("\n", " "): line.get_ydata() for line in drawn.axes[0].lines}
    assert "worst change found: median" in lines, "what was not refused is drawn all the same"
    shares = [line.get_ydata() for ax in drawn.axes[1:] for line in ax.lines if line.get_label() in ("under attack", "under noise")]
    assert shares
    assert not np.isfinite(np.concatenate(shares)).any(), "no coverage is made up"


@pytest.mark.parametrize(("dim", "panels"), [(1, 1), (3, 3), (20, 8)])
def test_posteriors_beside_one_another_show_the_truth_wherever_it_is(dim: int, panels: int) -> None:
    rng = np.random.default_rng(6)
    here, truth = rng.standard_normal((300, dim)), np.full(dim, 9.0)
    drawn = figures.beside(here, here + 2, [f"$p{k}" for k in range(dim)], ["<b>"] * dim, (np.full(dim, -np.inf), np.full(dim, np.inf)),
                           ("a", "b"), truth)
    shown = [ax for ax in drawn.axes if ax.patches]
    assert len(shown) == panels
    for ax in shown:
        low, high = ax.get_xlim()
        assert low < 9 < high


@pytest.mark.parametrize("shape", [(), (5,), (60,), (30, 2), (16, 16), {"a": (3,), "img": (16, 16)}])
@pytest.mark.parametrize("transform", ["none", "log"])
def test_a_change_of_x_of_any_shape_is_drawn(shape: Any, transform: str) -> None:
    spec = ObservationSpec.declare(shape, transform=transform)
    rng = np.random.default_rng(7)
    x = {name: np.exp(rng.standard_normal((41, *s))) for name, s in spec.shapes.items()}
    from sbiplat.report import predictive

    shown, _ = predictive.panels(spec, {k: v[0] for k, v in x.items()}, {k: v[1:] for k, v in x.items()}, worst.WORDS)
    titles = [ax.get_title() for ax in figures.observed(shown, worst.WORDS).axes]
    assert any(title.endswith("δ") for title in titles) == any(isinstance(panel, figures.Picture) for panel in shown)


def test_page_is_still_one_that_asks_nothing(own: Path) -> None:
    page: Page = page_of(own, X)
    assert not {"script", "svg", "link"} & {tag for tag, _ in page.tags}
    assert all(name in page.text for name in NAMES)
