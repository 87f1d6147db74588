"""The report: it shows what the certificate allows, as text, on one page that asks nothing of anybody."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sbiplat as sp
from sbiplat.diagnostics.predictive import simulate
from sbiplat.errors import ObservationError, RunError, SettingError, SimulatorError
from sbiplat.observation import ObservationSpec
from sbiplat.progress import silent
from sbiplat.report import figures, predictive
from sbiplat.report.figures.posterior import _Coordinate
from sbiplat.report.page import report
from sbiplat.report.words import to_digits

NAME = "<svg onload=alert(1)>"
BAD_UNIT = "</td><script>alert('unit')</script>"
NAMES = ("rate_a", "<b>width", r"c $\frac$")
BAD_CITATION = "<script src=http://evil.example/x.js></script> & Sons"
LOOSE = {"n": 120, "least_pairs": 100, "draws": 500, "deviation": 1.0, "under_coverage": 1.0, "over_coverage": 1.0, "tails": 1.0, "local": 1.0,
         "regions": 1.0, "c2st": 1.0, "information": 0.0, "nearest": 1.0}
X = np.exp(np.linspace(0, 1, 24)).reshape(12, 2)


LAWS = (sp.Uniform(-1, 1, unit=BAD_UNIT), sp.Normal(0, 1), sp.LogNormal(0, 0.5, unit="s"))


@sp.simulator(
    prior=sp.Prior(zip(NAMES, LAWS, strict=True)),
    x_shape=(12, 2), x_axis=("time <u>", range(12)), x_labels=("<i>up</i>", "down"), x_transform="log", x_unit="m",
    name=NAME, citation=BAD_CITATION, batched=True,
)
def hostile(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A <script>alert('summary')</script> simulator."""
    t = np.linspace(0, 1, 12)[None, :, None]
    log_x = theta[:, :1, None] * t + np.stack([theta[:, 1], np.log(theta[:, 2])], -1)[:, None] * (1 - t)
    return np.exp(log_x + 0.3 * rng.standard_normal(log_x.shape))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    bank = sp.simulate(hostile, 2000, 1, place / "bank", workers=1, progress=silent)
    run = sp.train(bank, "npe", out=place / "run", flow="mog", components=2, max_epochs=12, batch_size=128, learning_rate=3e-3,
                   progress=silent)
    return run.path


@pytest.fixture(scope="session")
def gated(trained: Path) -> Path:
    place = trained.with_name("gated")
    shutil.copytree(trained, place)
    assert sp.gate(place, progress=silent, **LOOSE).passed
    return place


@pytest.fixture
def drawn(gated: Path, tmp_path: Path) -> Path:
    """A certified run of its own."""
    shutil.copytree(gated, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def run(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, for tests that do not look at the figures: they are made but not drawn, which takes most of the time."""
    monkeypatch.setattr(figures, "image", lambda figure, raster=False: figures.Image("data:image/png;base64,AAAA", 10))
    return drawn


class Page(HTMLParser):
    """A page taken apart: tags with attributes, and the text that a reader sees."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self.words: list[str] = []
        self._table = self._where = ""
        self.feed(self.html)
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._table = dict(attrs).get("id") or ""
        if tag == "tr" and self._table == "posterior-table":
            self.cells.append([])
        if tag == "td" and self._table == "posterior-table":
            self.cells[-1].append("")
        self._where = tag

    def handle_endtag(self, tag: str) -> None:
        self._table = "" if tag == "table" else self._table
        self._where = ""

    def handle_data(self, data: str) -> None:
        if self._where != "style":
            self.words.append(data)
        if self._where == "td" and self._table == "posterior-table":
            self.cells[-1][-1] += data

    @property
    def ids(self) -> set[str | None]:
        return {attrs.get("id") for _, attrs in self.tags}


def page_of(run: Path, *args: Any, **settings: Any) -> Page:
    return Page(report(run, *args, progress=silent, draws=settings.pop("draws", 500), **settings))


# ------------------------------------------------------------------------------------------------- the page itself


def test_page_asks_nothing_of_the_network_and_runs_nothing(drawn: Path) -> None:
    page = page_of(drawn, X)
    active = {"script", "link", "iframe", "object", "embed", "form", "base", "svg", "audio", "video"}
    assert not active & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") or name == "srcset" for name in attrs), (tag, attrs)
        assert attrs.get("href", "#").startswith("#")
        assert re.match(r"data:image/(png|svg\+xml);base64,", attrs.get("src", "data:image/png;base64,"))
    styles = page.html[page.html.index("<style>"):page.html.index("</style>")]
    assert "url(" not in styles
    assert "@import" not in styles
    assert 1e5 < len(page.html) < 3e6


def test_text_of_a_run_never_becomes_markup(run: Path) -> None:
    page = page_of(run, X)
    for text in (NAME, BAD_UNIT, *NAMES, BAD_CITATION, "<script>alert('summary')</script>", "<i>up</i>", "time <u>"):
        assert text in page.text
    assert not {"script", "u", "i", "svg"} & {tag for tag, _ in page.tags}


def test_text_that_no_file_can_hold_does_not_stop_the_report(run: Path) -> None:
    _edit(run, lambda record: record["versions"].update({"py\ud800thon": "3\x00"}))
    assert "py?thon" in page_of(run).text


def test_a_reader_of_the_old_page_keeps_all_of_it(run: Path) -> None:
    path = report(run, X, draws=500, progress=silent)
    old = path.read_text()
    with path.open() as held:
        report(run, X, draws=500, seed=1, progress=silent)
        assert held.read() == old
    assert path.read_text() != old
    assert not list(run.glob(".tmp-*"))


def test_a_report_that_fails_leaves_the_old_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = report(run, X, draws=500, progress=silent)
    old = path.read_text()
    monkeypatch.setattr(sys.modules["sbiplat.report.page"], "render", lambda page: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(run, progress=silent)
    assert path.read_text() == old


def test_out_names_another_place(run: Path, tmp_path: Path) -> None:
    assert report(run, out=tmp_path / "new" / "page.html", progress=silent) == tmp_path / "new" / "page.html"
    assert not (run / "report.html").exists()


# --------------------------------------------------------------------------------------------------- the verdict


def test_certified_run_says_so_and_what_was_not_tested(run: Path) -> None:
    page = page_of(run)
    assert "CERTIFIED" in page.text
    assert json.loads((run / "certificate.json").read_text())["sha256"] in page.text
    assert "misspecification: whether your observation is of the kind that the simulator makes: too few pairs" in page.text


def test_loosened_thresholds_are_said(run: Path) -> None:
    assert re.search(r"Not the default thresholds:.*deviation 1 \(default 0.03\)", page_of(run).text)


def test_refused_run_shows_no_posterior_but_the_reason_and_the_mend(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    certificate = sp.gate(run, progress=silent, **{**LOOSE, "information": 1e3})
    page = page_of(run, X)
    assert "REFUSED" in page.text
    assert "CERTIFIED" not in page.text
    assert not {"posterior-table", "corner", "predictive"} & page.ids
    assert "No posterior is shown, since the gate refused it" in page.text
    assert certificate.failed[0].name == "information"
    assert certificate.failed[0].mend in page.text
    assert "Where the truth ranks" in page.text, "its coverage may be seen: it says what to mend"


def test_run_without_certificate_says_what_to_type(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    page = page_of(tmp_path / "run", X)
    assert "NOT YET GATED" in page.text
    assert f"sbiplat gate {tmp_path / 'run'}" in page.text
    assert "posterior-table" not in page.ids


def _other_weights(run: Path) -> None:
    data = bytearray((run / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "weights.safetensors").write_bytes(data)


def _altered(run: Path) -> None:
    content = json.loads((run / "certificate.json").read_text())
    content["criteria"][0]["figure"] = 999999
    (run / "certificate.json").write_text(json.dumps(content))


def _refused_but_altered(run: Path) -> None:
    content = json.loads((run / "certificate.json").read_text())
    (run / "certificate.json").write_text(json.dumps({**content, "passed": False}))


def _damaged(run: Path) -> None:
    (run / "certificate.json").write_text("{")


@pytest.mark.parametrize("spoil", [_other_weights, _altered, _refused_but_altered, _damaged])
def test_certificate_that_does_not_hold_vouches_for_nothing(run: Path, spoil: Any) -> None:
    spoil(run)
    page = page_of(run, X)
    assert "CERTIFICATE VOID" in page.text
    assert "CERTIFIED" not in page.text
    assert not {"posterior-table", "corner", "predictive"} & page.ids
    assert "passed" not in page.text, "the criteria of a void certificate are not shown"


def test_certificate_is_asked_for_again_when_the_posterior_is_loaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = sys.modules["sbiplat.report.page"]
    held = page.verdict_of(sp.Run.open(run))
    _other_weights(run)
    monkeypatch.setattr(page, "verdict_of", lambda run: held)  # the weights change while the report is being made
    again = page_of(run, X)
    assert "posterior-table" not in again.ids
    assert "The posterior cannot be loaded: the certificate of" in again.text


def test_unfinished_run_is_a_clear_error(run: Path) -> None:
    _edit(run, lambda record: record.update(finished=False))
    with pytest.raises(RunError, match="has not finished"):
        report(run, progress=silent)


# ------------------------------------------------------------------------------------------------- the posterior


def test_table_holds_the_moments_and_quantiles_of_the_draws(run: Path) -> None:
    page = page_of(run, X, draws=2000, seed=3)
    draws = sp.load(run).sample(X, 2000, seed=3)
    rows = [row for row in page.cells if row]
    assert [row[0] for row in rows] == list(NAMES)
    assert [row[1] for row in rows] == [BAD_UNIT, "–", "s"]
    for k, row in enumerate(rows):
        shown = [float(cell.replace("−", "-")) for cell in row[2:7]]
        mean, sd, quantiles = draws[:, k].mean(), draws[:, k].std(ddof=1), np.quantile(draws[:, k], [0.05, 0.5, 0.95])
        np.testing.assert_allclose(shown, [mean, sd, *quantiles], atol=0.006 * sd)
    low, high = (float(v.replace("−", "-")) for v in rows[0][7].split(" to "))
    np.testing.assert_allclose([low, high], [-0.9, 0.9], atol=0.02)


def test_observation_is_kept_for_the_next_report(run: Path) -> None:
    assert "posterior-table" not in page_of(run).ids
    first = page_of(run, X)
    with np.load(run / "observation.npz", allow_pickle=False) as kept:
        np.testing.assert_array_equal(kept["x"], X.astype("float32"))
    assert page_of(run).cells == first.cells
    assert page_of(run, 2 * X).cells != first.cells


@pytest.mark.parametrize(("x", "message"), [(X[:5], "shape"), (np.stack([X, X]), "one observation"), (X * np.nan, "NaN")])
def test_impossible_observation_is_refused_and_not_kept(run: Path, x: np.ndarray, message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        report(run, x, progress=silent)
    assert not (run / "observation.npz").exists()


def test_kept_observation_never_runs_code(run: Path) -> None:
    np.savez(run / "observation.npz", x=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ObservationError, match=r"observation\.npz"):
        report(run, progress=silent)


@pytest.mark.parametrize("settings", [{"draws": 10}, {"draws": True}, {"seed": -1}, {"draws": 1e4}])
def test_impossible_settings_are_refused(run: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        report(run, X, progress=silent, **settings)


# ------------------------------------------------------------------------------------------ posterior predictive


def test_predictive_is_of_the_registered_simulator(run: Path) -> None:
    page = page_of(run, X)
    assert "predictive" in page.ids
    assert "against 200 simulations" in page.text


def test_missing_simulator_says_how_to_get_the_predictive(run: Path) -> None:
    _edit(run, lambda record: record["bank"]["simulator"].update(name="nobody_s"))
    page = page_of(run, X)
    assert "predictive" not in page.ids
    assert f"sbiplat report {run} --simulator file.py:object" in page.text
    assert "posterior-table" in page.ids
    again = page_of(run, X, simulator=hostile)
    assert "predictive" in again.ids


def test_run_cannot_name_code_to_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nthing = None\n")
    spec = f"{tmp_path / 'evil.py'}:thing"
    _edit(run, lambda record: record["bank"]["simulator"].update(name=spec, spec=spec))
    assert "predictive" not in page_of(run, X).ids
    assert not (tmp_path / "ran").exists()


def test_simulator_whose_source_has_changed_is_left_out_unless_given(run: Path) -> None:
    _edit(run, lambda record: record["bank"]["simulator"].update(source_digest="0" * 64))
    page = page_of(run, X)
    assert "predictive" not in page.ids
    assert "its source differs" in page.text
    given = page_of(run, X, simulator=hostile)
    assert "predictive" in given.ids
    assert "is not, to the letter, the one that made the bank" in given.text


def test_simulator_of_another_problem_is_refused(run: Path) -> None:
    with pytest.raises(SimulatorError, match="other parameters or another shape"):
        report(run, X, simulator="two_moons", progress=silent)


def _simulator(function: Any, batched: bool = False) -> sp.Simulator:
    return sp.simulator(prior=sp.Prior({"a": sp.Normal(0, 1)}), x_shape=(3,), name="predictive_test", batched=batched)(function)


def test_the_page_says_whether_the_observation_is_of_the_simulator_s_kind(run: Path) -> None:
    assert "below 0.05" not in page_of(run, X).text, "120 pairs calibrate no test at 1 %"
    assert "misspecification: whether your observation is of the kind" in page_of(run, X).text
    sp.gate(run, progress=silent, **{**LOOSE, "unlike": 0.05})
    assert "sight" in page_of(run, X).ids
    assert "Nothing speaks against it: p = " in page_of(run, X).text
    odd = X.copy()
    odd[3, 1] = 1e6
    with pytest.warns(sp.Misspecified, match=re.escape("down[3] at time <u> = 3 = 1e+06")):
        page = page_of(run, odd)
    assert "down[3] at time <u> = 3 = 1e+06 is outside the range of all" in page.text


def test_predictive_p_values_stand_under_the_figure(run: Path) -> None:
    page = page_of(run, X, simulator=hostile, summaries={"<b>peak": np.max})
    assert "checks" in page.ids
    assert "<b>peak" in page.text
    assert "sd of down" in page_of(run, X, simulator=hostile).text


def test_simulations_that_fail_are_counted_and_left_out() -> None:
    def fragile(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if theta[0] > 1:
            raise ValueError("too large")
        return np.full(3, np.nan if theta[0] < -1 else theta[0])

    theta = np.repeat([[0.0], [2.0], [-2.0], [0.5]], 10, axis=0)
    found = simulate(_simulator(fragile), theta, 0)
    assert (found.tried, found.failed, found.rows, found.error) == (40, 20, 20, "ValueError: too large")


def test_slow_simulator_is_stopped() -> None:
    seconds = iter(np.arange(0, 1000, 10.0))
    found = simulate(_simulator(lambda theta, rng: np.zeros(3)), np.zeros((200, 1)), 0, clock=lambda: next(seconds))
    assert found.tried == 6


def test_predictive_is_the_same_for_the_same_seed() -> None:
    made = _simulator(lambda theta, rng: theta + rng.standard_normal((len(theta), 3)), batched=True)
    theta = np.zeros((60, 1))
    a, b, c = (simulate(made, theta, seed).fields["x"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert len(np.unique(a)) == a.size, "blocks have streams of their own"


# ---------------------------------------------------------------------------------------------- the other sections


def test_run_whose_bank_is_gone_still_has_a_report(run: Path) -> None:
    _edit(run, lambda record: record["bank"].update(path="/nowhere", relative_path="../nowhere"))
    assert "the bank could not be opened" in page_of(run, X).text


def test_bank_s_status_is_counted(run: Path) -> None:
    assert "2000 ok" in page_of(run).text


def test_diagnostics_of_another_gate_are_left_out(run: Path) -> None:
    data = (run / "diagnostics.npz").read_bytes()
    (run / "diagnostics.npz").write_bytes(data + b" ")
    page = page_of(run)
    assert "diagnostics.npz is not the one of the certificate" in page.text
    assert "Where the truth ranks" not in page.text


def test_run_without_epochs_still_has_a_report(run: Path) -> None:
    (run / "metrics.jsonl").write_text('[1]\n{"epoch": "<b>"}\nnonsense\n')
    assert "no record of its epochs" in page_of(run).text


# --------------------------------------------------------------------------------------------------- the figures


def test_region_levels_of_a_gaussian_are_known() -> None:
    """The smallest region with mass p of a 2-D normal is where its density exceeds (1 - p) of its peak."""
    u = np.linspace(-6, 6, 601)
    density = np.exp(-0.5 * (u[:, None] ** 2 + u**2))
    np.testing.assert_allclose(figures.highest_density_levels(density, (0.9, 0.5)), [0.1, 0.5], rtol=0.01)


def _density(points: np.ndarray, side: float) -> tuple[np.ndarray, float]:
    """The smoothed density on a square, and the area of its region of 90 %."""
    density = figures.smoothed(np.histogram2d(*points.T, figures.BINS_2D, [[-side, side]] * 2)[0])
    return density, float((density >= figures.highest_density_levels(density, (0.9,))[0]).mean()) * (2 * side) ** 2


def test_smoothing_keeps_thin_things_thin() -> None:
    """A half ring of sd 0.01 in bins of 0.03: the narrowest kernel gives 90 % a width of about 4 bins, the widest 15."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, np.pi, 10_000)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.01 * rng.standard_normal((10_000, 2))
    assert _density(ring, 1.2)[1] < np.pi * 0.03 * 6


def test_smoothing_keeps_wide_things_smooth_and_of_their_size() -> None:
    """A normal's 90 % region has the area pi 2 log 10; noise would give its profile more than the one turn that it has."""
    density, area = _density(np.random.default_rng(0).standard_normal((10_000, 2)), 4.0)
    assert area == pytest.approx(np.pi * 2 * np.log(10), rel=0.12)
    profile = density[:, figures.BINS_2D // 2]
    profile = profile[profile > 0.05 * density.max()]
    assert np.count_nonzero(np.diff(np.sign(np.diff(profile)))) == 1, "up to the peak, and down again"


@pytest.mark.parametrize(("dim", "panels"), [(1, 1), (3, 9), (20, 144)])
def test_corner_of_any_dimension(dim: int, panels: int) -> None:
    rng = np.random.default_rng(1)
    prior = rng.standard_normal((2000, dim)) * 10.0 ** np.arange(-dim, dim, 2)
    names = [f"$p_{k}$ {'long ' * 20}<b>" for k in range(dim)]
    bounds = (np.full(dim, -np.inf), np.full(dim, np.inf))
    figure = figures.corner(0.1 * prior[:1000], prior, names, ["\ud800\n$"] * dim, bounds)
    assert len(figure.axes) == panels
    if dim <= 3:
        assert figures.image(figure, raster=True).source.startswith("data:image/png;base64,")


def test_corner_of_a_posterior_that_is_a_point() -> None:
    prior = np.random.default_rng(2).uniform(0, 1, (500, 2))
    figure = figures.corner(np.full((200, 2), 0.5), prior, ("a", "b"), ("", ""), (np.zeros(2), np.ones(2)))
    assert figures.image(figure).width > 0


def test_reader_s_own_matplotlib_settings_do_not_reach_the_page() -> None:
    import matplotlib

    def drawn() -> str:
        return figures.image(figures.rank_histograms(["TARP"], np.linspace(0, 1, 200)[:, None])).source

    usual = drawn()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "none"}):
        assert drawn() == usual
        assert matplotlib.rcParams["font.size"] == 30


def _panels(shape: Any, transform: str = "none", **declared: Any) -> tuple[list[Any], list[str], np.ndarray]:
    spec = ObservationSpec.declare(shape, transform=transform, **declared)
    rng = np.random.default_rng(3)
    x = {name: np.exp(rng.standard_normal((201, *s))) for name, s in spec.shapes.items()}
    shown, notes = predictive.panels(spec, {k: v[0] for k, v in x.items()}, {k: v[1:] for k, v in x.items()})
    assert figures.observed(shown).axes
    return shown, notes, np.concatenate([v[0].ravel() for v in x.values()])


@pytest.mark.parametrize(("shape", "kinds"), [
    ((), [figures.Dots]), ((1,), [figures.Dots]), ((40,), [figures.Dots]), ((41,), [figures.Series]),
    ((30, 2), [figures.Series] * 2), ((2, 30), [figures.Series] * 2), ((16, 16), [figures.Picture]),
    ((3, 16, 16), [figures.Picture]), ((16, 16, 3), [figures.Picture]), ((2, 3, 4), [figures.Series]),
    ({"a": (3,), "img": (16, 16), "s": (100,)}, [figures.Dots, figures.Picture, figures.Series]),
])
def test_x_of_any_shape_is_shown(shape: Any, kinds: list[type]) -> None:
    assert [type(panel) for panel in _panels(shape)[0]] == kinds


def test_many_features_say_what_is_shown() -> None:
    shown, notes, data = _panels((10_000,))
    assert notes == ["every 10th of 10000 values is shown"]
    np.testing.assert_array_equal(shown[0].data, data[::10])
    assert _panels((50, 100), labels=[f"c{k}" for k in range(100)])[1] == ["the first 12 of 100 columns are shown"]


def test_labels_axis_and_unit_are_on_the_panels() -> None:
    shown, _, _ = _panels((5, 2), labels=("hare", "lynx"), axis=("year", range(1900, 1905)), unit="pelts", transform="log")
    assert [(p.xlabel, p.ylabel, p.scale) for p in shown] == [("year", "hare [pelts]", "log"), ("year", "lynx [pelts]", "log")]
    np.testing.assert_array_equal(shown[0].x, np.arange(1900, 1905))


def test_zero_on_a_log_scale_is_drawn_at_its_foot() -> None:
    spec = ObservationSpec.declare((50,), transform="log")
    shown, _ = predictive.panels(spec, {"x": np.zeros(50)}, {"x": np.ones((20, 50))})
    assert shown[0].scale == "log"
    assert (shown[0].data == 0.5).all()


def test_ninety_percent_band_holds_ninety_percent_of_like_data() -> None:
    """4000 features, 200 simulations: the share has an sd of about 0.005, and quantiles of 200 narrow the band by 0.01."""
    rng = np.random.default_rng(4)
    spec = ObservationSpec.declare((1000, 4), labels=list("abcd"))
    share = [predictive.share_inside(predictive.panels(spec, {"x": shift + rng.standard_normal((1000, 4))},
                                                       {"x": rng.standard_normal((200, 1000, 4))})[0]) for shift in (0, 3)]
    assert share[0] == pytest.approx(0.89, abs=0.02)
    assert share[1] < 0.2, "data that the simulator does not make lie outside"


@pytest.mark.parametrize(("value", "error", "text"), [
    (0.53712, 0.1331, "0.537"), (-0.00001, 0.2, "0.000"), (-1234.56, 45.6, "−1234.6"), (123456.0, 4567.0, "123460"),
    (3.2e-9, 4.1e-10, "3.200e−9"), (6.02214e23, 3.1e21, "6.0221e+23"), (7.0, 0.0, "7"),
])
def test_figures_have_the_digits_that_their_error_supports(value: float, error: float, text: str) -> None:
    assert to_digits(value, error).replace("e−0", "e−") == text


def _edit(run: Path, change: Any) -> None:
    record = json.loads((run / "run.json").read_text())
    change(record)
    (run / "run.json").write_text(json.dumps(record))


def test_an_angle_is_not_drawn_in_logarithms_and_a_scale_is() -> None:
    draws = np.exp(np.random.default_rng(0).normal(0.0, 1.5, 4000)).clip(1e-3, 6.0)
    for support, log in (((0.0, 2 * np.pi), False), ((0.0, np.inf), True), ((1e-3, 10.0), True)):
        assert _Coordinate.of("a", "rad", draws, draws, support).log is log
