"""The watch: every observation is held against the bank before its posterior is sampled, by the test that the gate has calibrated."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat import files
from sbiplat.diagnostics.distance import Space
from sbiplat.diagnostics.misspecification import Misspecification, Reference, Tails
from sbiplat.errors import Misspecified, Uncertified
from sbiplat.gate.certificate import Certificate
from sbiplat.gate.misspecification import NAME, PREFIX
from sbiplat.observation import Fields
from sbiplat.runs import Run

MOST_BYTES, MOST_BYTES_A_FEATURE = 2**28, 512


class Watch:
    """What looks at every observation before it is sampled. facts: of the last one, for files of draws. refuse: whether an observation
    that is unlike the bank is refused, not only told of."""

    def __init__(self, reference: Reference, refuse: bool = False) -> None:
        self.reference, self.refuse = reference, refuse
        self.facts: dict[str, Any] = {}

    def look(self, x: Fields, sampler: Any) -> Misspecification:
        """Hold observations against the bank."""
        return self.reference.look(x, sampler)

    def warning(self, x: Fields, sampler: Any) -> Misspecified | None:
        """The warning to give, if any; raises Uncertified where it refuses."""
        found = self.look(x, sampler)
        self.facts = found.facts()
        if not found.unusual:
            return None
        if self.refuse:
            raise Uncertified(f"the certificate does not speak of such data: {found.text()}")
        return Misspecified(found.text())


def watch_of(run: Run, certificate: Certificate, refuse: bool = False) -> Watch | None:
    """The test that the gate has calibrated; None where it has not. Raises Uncertified where its file is not that of the certificate."""
    figures = certificate.figures.get(NAME)
    if figures is None:
        return None
    path, again = run.path / "diagnostics.npz", f"run `{run.gate_command}` again"
    try:
        if files.digest_file(path) != certificate.content["digests"].get("diagnostics"):
            raise Uncertified(f"{path} is not the one of the certificate; {again}")
        with np.load(path, allow_pickle=False) as archive:
            wanted = [item for item in archive.zip.infolist() if item.filename.startswith(PREFIX)]
            if sum(item.file_size for item in wanted) > MOST_BYTES + MOST_BYTES_A_FEATURE * run.x.size:
                raise ValueError("it is too large")
            arrays = {name: archive[name] for name in archive.files if name.startswith(PREFIX)}
        return Watch(reference_from(arrays, figures, run), refuse)
    except (OSError, ValueError, KeyError, TypeError, EOFError, OverflowError, MemoryError, AttributeError, zipfile.BadZipFile,
            zlib.error) as problem:
        line = (str(problem) or repr(problem)).splitlines()[0]
        raise Uncertified(f"{path} cannot be read ({line}); {again}") from None


def reference_from(arrays: Mapping[str, NDArray[Any]], figures: Mapping[str, Any], run: Run) -> Reference:
    """The inverse of `misspecification.arrays_of`; raises ValueError, KeyError or TypeError where something is not as it was written."""
    def of(name: str, kinds: str, *shape: int) -> NDArray[Any]:
        found = arrays[f"{PREFIX}{name}"]
        fits = len(shape) == found.ndim and all(want in (-1, have) for want, have in zip(shape, found.shape, strict=True))
        if found.dtype.kind not in kinds or not fits or not np.isfinite(found).all():
            raise ValueError(f"its {name} is damaged")
        return found

    size, spaces, kept = run.x.size, {}, {}
    for name in figures["spaces"]:
        width = of(f"{name}_loc", "f", size if name == "x" else -1).shape[0]
        count = of(f"{name}_variances", "f", -1).shape[0]
        spaces[str(name)] = Space(
            of(f"{name}_loc", "f", width), of(f"{name}_scale", "f", width), of(f"{name}_mean", "f", width),
            of(f"{name}_basis", "f", width, count), of(f"{name}_variances", "f", count), float(of(f"{name}_rest", "f")),
            of(f"{name}_rows", "f", -1, count))
        kept[str(name)] = of(f"{name}_kept", "f", -1, count)
    ranks = of("ranks", "iu", -1)
    kinds = 2 * len(spaces) + 1
    made = Reference(run.x, spaces, Tails(ranks, of("table", "f", len(ranks), size), int(figures["rows"])), of("units", "f", kinds, 2),
                     of("held_out", "f", -1, kinds), kept, float(figures["level"]), int(figures["seed"]))
    widths = [made.units[:, 1], *(v for s in spaces.values() for v in (s.scale, s.variances))]
    if not all((v > 0).all() for v in widths) or not (np.diff(ranks) > 0).all() or not 0 <= ranks[0] <= ranks[-1] < made.tails.rows:
        raise ValueError("its units or ranks are damaged")
    if not (0 < made.level <= 0.5 and 0 <= made.seed < 2**62 and made.tails.rows < 2**48):
        raise ValueError("its level, seed or number of rows is none")
    if not len(made.held_out) or not all(len(s.rows) for s in spaces.values()) or "x" not in spaces:
        raise ValueError("it has no rows")
    return made
