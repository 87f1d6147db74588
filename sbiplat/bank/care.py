"""The care of a bank: find all that is wrong with it, make damaged rows again, merge small segments.

`survey` looks at every file, also where `Bank.open` would stop at the first bad one. `repair` sets bad segments aside and
simulates their rows again; the index remembers the hashes of what stood there, so that it is known to be the same.
`compact` merges what many restarts left in pieces. Both hold the bank's lock, and a kill at any moment loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbiplat import files
from sbiplat.bank import fill, index, segment
from sbiplat.bank.bank import Bank, Problem, read_header
from sbiplat.bank.layout import Header, default_rows_per_segment, pieces, simulator_of
from sbiplat.bank.segment import Opened, Rows, Segment, dataset_names
from sbiplat.errors import BankError
from sbiplat.progress import Progress, silent
from sbiplat.simulator import Simulator


@dataclass(frozen=True)
class Survey:
    """What stands in a bank's directory: sound segments, bad ones with what is wrong, and problems of the whole."""

    header: Header
    sound: list[Opened]
    bad: dict[Path, str]
    problems: list[Problem]


def survey(path: Path, progress: Progress = silent) -> Survey:
    """Read every byte of every segment. Raises BankError only where the bank's header itself cannot be read."""
    header = read_header(path)
    found = segment.listing(path / "segments")
    sound: list[Opened] = []
    bad: dict[Path, str] = {}
    with progress.task("verify", len(found)) as advance:
        for item in found:
            try:
                opened = segment.inspect(item, header)
                wrong = Bank(path, header, [opened]).verify_segments()
                if wrong:
                    bad[item.path] = wrong[0].what + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
                else:
                    sound.append(opened)
            except BankError as error:
                bad[item.path] = str(error).removeprefix(f"{item.path} ")
            advance(1)
    bad |= {p: "is no segment by its name; it may be one that was renamed" for p in segment.strangers(path / "segments")}
    bad |= {p: why for p, why in _contradictions(header, sound).items() if p not in bad}
    sound = [o for o in sound if o.segment.path not in bad]
    gaps = index.cover(sound, header.rows)[1]
    problems = [Problem(str(p), what) for p, what in bad.items()]
    problems += [Problem(str(path), f"rows {first} to {stop - 1} are missing") for first, stop in gaps]
    return Survey(header, sound, bad, problems)


def _contradictions(header: Header, sound: list[Opened]) -> dict[Path, str]:
    """Segments that hold the same rows with other content: one of them is not what the simulator makes. Both are named."""
    seen: dict[tuple[int, int], tuple[bytes, Path]] = {}
    found: dict[Path, str] = {}
    for item in sound:
        for span, digest in _hashes(header, item):
            value, other = seen.setdefault(span, (digest, item.segment.path))
            if value != digest:
                found[item.segment.path] = f"rows {span[0]} to {span[1] - 1} differ from those in {other.name}"
                found[other] = f"rows {span[0]} to {span[1] - 1} differ from those in {item.segment.path.name}"
    return found


def _hashes(header: Header, item: Opened) -> Iterator[tuple[tuple[int, int], bytes]]:
    spans = pieces(item.segment.first, item.segment.stop, header.block_size)
    yield from ((span, digest.tobytes()) for span, digest in zip(spans, item.block_sha256, strict=True))


def repair(
    path: str | Path, simulator: Simulator | str | None = None, *, workers: int | None = None, progress: Progress | None = None,
    **limits: Any,
) -> tuple[Bank, list[Problem]]:
    """Set damaged segments aside and simulate what is missing; returns the bank and what was wrong.

    simulator: it need be given only where it has no registered name, since opening a bank never runs code that the bank
    names. Raises BankError where the rows that are made are not those that stood there.
    """
    path, progress = Path(path), progress or Progress.auto()
    _refuse_packed(path, "repaired")
    header = read_header(path)
    made = simulator_of(header, path, simulator, f"sbiplat bank verify {path} --repair")
    with files.locked(path, BankError(f"another process is filling {path}; wait for it, or stop it first")):
        found = survey(path, progress)
        for bad in found.bad:
            _set_aside(bad)
        before = path / "bank.h5.before-repair"  # stays until the new rows have been held against it
        if not before.exists() and (path / "bank.h5").exists():
            (path / "bank.h5").rename(before)
        (path / "bank.h5").unlink(missing_ok=True)  # it would vouch for the new files with the old hashes
        remembered = index.read(before, header)
    bank = fill.simulate(made, header.rows, header.seed, path, workers=workers, block_size=header.block_size, checked=False,
                         progress=progress, **limits)
    now = dict(span for item in bank.segments for span in _hashes(header, item))
    for (first, stop, _), (_, hashes) in remembered.items():
        for (a, b), digest in _hashes(header, Opened(Segment(path, first, stop), {}, hashes)):
            fresh = now.get((a, b)) or (bank.digest_of_rows(a, b) if b <= bank.rows else digest)
            if fresh != digest:
                raise BankError(f"rows {a} to {b - 1} of {path} came out otherwise than they stood there before: simulator "
                                f"{made.name!r}, or a library or file that it uses, has changed; the damaged files are kept beside them "
                                f"(to accept the new rows, delete {before})")
    before.unlink(missing_ok=True)
    return bank, found.problems


def _refuse_packed(path: Path, what: str) -> None:
    if path.is_file():
        raise BankError(f"{path} is a packed bank, which cannot be {what}; mend the bank's directory and pack it again")


def _set_aside(path: Path) -> None:
    """Rename, so that nobody reads it and nothing is lost."""
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(target)


def compact(path: str | Path, progress: Progress = silent) -> Bank:
    """Merge small neighbouring segments into ones of about 64 MB; the digest stays."""
    path = Path(path)
    _refuse_packed(path, "compacted")
    with files.locked(path, BankError(f"another process is filling {path}; wait for it, or stop it first")):
        bank = Bank.open(path)
        header = bank.header
        before = bank.digest if bank.complete else None
        parts = index.cover(bank.segments, header.stored_rows)[0]
        useful = {item.segment.path for item, _, _ in parts}
        groups = list(_groups(parts, default_rows_per_segment(header)))
        with progress.task("compact", len(groups)) as advance:
            for group in groups:
                if len(group) > 1:
                    _merge(path / "segments", header, bank, group)
                advance(1)
        for item in bank.segments:  # those that others hold whole
            if item.segment.path not in useful:
                item.segment.path.unlink()
        fill.write_index(path, header)
        bank = Bank.open(path)
        if before is not None and bank.digest != before:
            raise BankError(f"{path} has another digest after it was compacted; run `sbiplat bank verify {path}`")
        return bank


def _groups(parts: index.Cover, limit: int) -> Iterator[index.Cover]:
    """Runs of neighbouring parts that come to at most `limit` rows."""
    group: index.Cover = []
    for part in parts:
        if group and (part[1] != group[-1][2] or part[2] - group[0][1] > limit):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _merge(folder: Path, header: Header, bank: Bank, group: index.Cover) -> None:
    names = dataset_names(header)
    rows = []
    for item, first, stop in group:
        whole = Bank(bank.path, header, [item])
        wrong = whole.verify_segments()
        if wrong:
            raise BankError(f"{wrong[0]}")
        data = whole.slab(item, first, stop)
        seconds, messages = segment.facts(item.segment)
        skip = first - item.segment.first
        seconds = seconds[skip:skip + stop - first] if len(seconds) else segment.no_seconds(stop - first)
        rows.append(Rows(first, data["theta"], {k: data[ds] for k, ds in names.items()}, data["status"], seconds,
                         {r: m for r, m in messages.items() if first <= r < stop}))
    made = segment.commit(folder, header, Rows.join(rows))
    for item, _, _ in group:
        if item.segment.path != made.path:
            item.segment.path.unlink()
