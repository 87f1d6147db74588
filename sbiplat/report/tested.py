"""What the gate measured, as sections of the page: coverage, where in x and in the prior it fails, and robustness.

Curves and maps stand in RUN/diagnostics.npz, which the certificate binds; other figures in the certificate itself.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sbiplat import files
from sbiplat.diagnostics.fragility import HARMLESS
from sbiplat.gate.certificate import Certificate
from sbiplat.report import figures
from sbiplat.report.figures import Map, Robust
from sbiplat.runs import Run

Array = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]
DAMAGED = "diagnostics.npz is damaged"
MOST_AXES, MOST_ROWS = 4, 16
MOST_BYTES = 2**30  # of all arrays together
CHANCE = 0.05  # that any cell of a map is marked where all is well


def diagnostics(run: Run, certificate: Certificate) -> dict[str, NDArray[Any]]:
    """The arrays of RUN/diagnostics.npz; raises ValueError where they are not those of the certificate."""
    path = run.path / "diagnostics.npz"
    if not path.is_file():
        raise ValueError(f"there is no {path.name}")
    if files.digest_file(path) != certificate.content["digests"].get("diagnostics"):
        raise ValueError(f"{path.name} is not the one of the certificate")
    with zipfile.ZipFile(path) as raw:
        if sum(item.file_size for item in raw.infolist()) > MOST_BYTES:
            raise ValueError(f"{path.name} would take over {MOST_BYTES / 1e9:.1g} GB")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def array(arrays: Arrays, name: str, *shape: int | None) -> Array:
    """Numbers of a shape, None for any length; raises ValueError where they are not there, or are of another."""
    found = arrays.get(name)
    if found is None or found.dtype.kind not in "fiu" or found.ndim != len(shape):
        raise ValueError(DAMAGED)
    if any(want is not None and want != have for want, have in zip(shape, found.shape, strict=True)):
        raise ValueError(DAMAGED)
    return found.astype(float)


def texts(arrays: Arrays, name: str) -> list[str]:
    """Names, in a list."""
    found = arrays.get(name)
    if found is None or found.dtype.kind != "U" or found.ndim != 1 or not len(found):
        raise ValueError(DAMAGED)
    return [str(text) for text in found]


def coverage(arrays: Arrays) -> dict[str, Any]:
    """Curves and ranks of the joint test and of what departs most; raises ValueError for damaged arrays."""
    names, levels = texts(arrays, "names"), array(arrays, "levels", None)
    ranks = array(arrays, "ranks", None, len(names))
    curves = {key: array(arrays, key, len(names), len(levels))
              for base in ("ecp", "central") for key in (base, f"{base}_low", f"{base}_high")}
    worst = np.argsort(-np.abs(curves["ecp"] - levels).max(1), kind="stable")
    shown = sorted({0, *worst[:figures.MOST_PANELS - 1].tolist()})
    parameters = [k for k in shown if not names[k].startswith("TARP")]

    def drawn(key: str, which: list[int], xlabel: str, ylabel: str) -> figures.Image:
        data = (curves[f"{key}{end}"][which] for end in ("", "_low", "_high"))
        return figures.image(figures.coverage_curves([_short(names[k]) for k in which], levels, *data, xlabel, ylabel))

    return {
        "why": "", "left_out": len(names) - len(shown), "pairs": len(ranks),
        "ecp": drawn("ecp", shown, "credibility level α", "expected coverage"),
        "central": drawn("central", parameters, "stated probability of the central region", "how often the truth was in it"),
        "ranks": figures.image(figures.rank_histograms([_short(names[k]) for k in shown], ranks[:, shown])),
    }


def places(arrays: Arrays, names: list[str]) -> dict[str, Any] | None:
    """Heat maps of coverage by x and by theta; None where the gate made none. names: the parameters. Raises ValueError."""
    by_x = {k: v for k, v in arrays.items() if k.startswith("local_")}
    by_theta = {k: v for k, v in arrays.items() if k.startswith("regions_")}
    if not by_x and not by_theta:
        return None
    pairs = len(array(arrays, "ranks", None, None))
    return {"why": "", "by_x": _by_x(arrays, pairs) if by_x else None, "by_theta": _by_theta(arrays, names, pairs) if by_theta else None}


def _by_x(arrays: Arrays, pairs: int) -> dict[str, Any]:
    """Bias and spread along the functions of x where they stray most; each is a mean of pairs / 10 ranks, of sd sqrt(10 / (12 pairs))."""
    sets, axes = texts(arrays, "local_names"), texts(arrays, "local_axes")
    bias, spread = (array(arrays, f"local_{key}", len(axes), None, len(sets)) for key in ("bias", "spread"))
    tenths = bias.shape[1]
    edges = array(arrays, "local_edges", len(axes), tenths + 1)
    if spread.shape != bias.shape or not np.isfinite([bias, spread]).all() or not tenths or set(sets) == {"HPD"}:
        raise ValueError(DAMAGED)
    parameters = np.array([k for k, name in enumerate(sets) if name != "HPD"])  # its ranks have no low and high
    both = np.maximum(np.abs(bias), np.abs(spread))[..., parameters]
    along = np.argsort(-both.max((1, 2)), kind="stable")[:MOST_AXES]
    rows = np.sort(parameters[np.argsort(-both.max((0, 1)), kind="stable")[:MOST_ROWS]])
    chance = _threshold(2 * both.size) * np.sqrt(tenths / (12 * max(pairs, 1)))
    panels = []
    for a in along:
        even = bool((np.diff(edges[a]) > 0).all())  # of a feature with few values the tenths are not of one size
        for what, values in (("bias", bias), ("width", spread)):
            part = values[a][:, rows].T
            panels.append(Map(f"{what} along {axes[a]}", part, np.full(part.shape, chance if even else np.inf), edges[a]))
    drawn = figures.maps(panels, [_short(sets[k]) for k in rows], "departure", 2, "value of the function of x that is named above each map")
    return {"figure": figures.image(drawn), "axes": len(axes), "shown": len(along), "left_out": len(parameters) - len(rows),
            "marked": int(sum(panel.far.sum() for panel in panels)), "most": float(both.max())}


def _by_theta(arrays: Arrays, names: list[str], pairs: int) -> dict[str, Any]:
    """Truths found in each tenth of the prior, less those that the posteriors state."""
    found = array(arrays, "regions_found", len(names), None)
    stated = array(arrays, "regions_stated", *found.shape)
    if not np.isfinite([found, stated]).all() or not found.shape[1]:
        raise ValueError(DAMAGED)
    gap = found - stated
    rows = np.sort(np.argsort(-np.abs(gap).max(1), kind="stable")[:MOST_ROWS])
    error = np.sqrt(np.clip(stated * (1 - stated), 1e-9, None) / max(pairs, 1))
    panel = Map("share of truths found, less the share stated", gap[rows], _threshold(gap.size) * error[rows])
    drawn = figures.maps([panel], [names[k] for k in rows], "found − stated", 1, "tenth of the prior")
    return {"figure": figures.image(drawn), "left_out": len(names) - len(rows), "marked": int(panel.far.sum()),
            "most": float(np.abs(gap).max())}


def _threshold(cells: int) -> float:
    return float(stats.norm.isf(CHANCE / 2 / cells))


def _short(name: str) -> str:
    return name.removeprefix("SBC ").removeprefix("function ")


def robustness(arrays: Arrays, measured: Any) -> dict[str, Any]:
    """KL and coverage against eps. measured: figures["robustness"]. Raises ValueError for what is damaged."""
    if isinstance(measured, Mapping) and "not_tested" in measured:
        return {"why": f"It was not tested: {measured['not_tested']}.", "figure": None}
    eps = array(arrays, "attack_eps", None)
    worst = array(arrays, "attack_worst", len(eps), None)
    noise, search = (array(arrays, f"attack_{key}", *worst.shape) for key in ("noise", "search"))
    try:
        told = measured["eps"]
        cover = [f["coverage"] for f in told]
        nominal = np.array([c["nominal"] for c in cover[0]], float)
        wanted = np.array([[c["in_proportion"] for c in by_level] for by_level in cover], float)
        attacked, noisy = (_covered([[c[key] for c in by_level] for by_level in cover]) for key in ("attacked", "noise"))
        features = float(told[0]["features"])
        rows = [{"eps": float(f["eps"]), "worst": _finite(f["worst_kl"]), "noise": _finite(f["noise_kl"]), "excess": float(f["excess"]),
                 "refused": float(f["refused"])} for f in told]
    except (KeyError, TypeError, IndexError):
        raise ValueError("the certificate's figures of robustness are damaged") from None
    if wanted.shape != (len(eps), len(nominal)) or not worst.size or not (eps > 0).all() or not np.isfinite([worst, noise]).all():
        raise ValueError(DAMAGED)
    found = Robust(eps, worst, noise, search, features, HARMLESS, nominal, attacked, noisy, wanted)
    return {"why": "", "figure": figures.image(figures.robustness(found)), "observations": worst.shape[1], "features": features,
            "rows": rows, "harmless": HARMLESS, "norm": str(measured.get("norm", ""))}


def _covered(shares: list[list[Any]]) -> Array:
    """(E, A, D); NaN where the sampler refused all."""
    dim = max((len(values) for by_level in shares for values in by_level), default=0)
    return np.array([[values or [np.nan] * max(dim, 1) for values in by_level] for by_level in shares], float)


def _finite(values: Any) -> list[float]:
    low, middle, high = values
    return [float(low), float(middle), float(high)]
