"""The format of a bank: what stands in its directory and what each name means.

    BANK/bank.json               the header: what the content depends on, and how many rows are wanted
    BANK/segments/FIRST-STOP.h5  rows FIRST..STOP-1, immutable, each a run of blocks (see segment.py)
    BANK/bank.h5                 the index: virtual datasets /theta, /x or /x/<name>, /status over all segments
    BANK/lock                    held by the one process that fills the bank

Row r stands in block r // block_size. A scalar simulator's row draws from SeedSequence(seed, spawn_key=(block, row in
block)); a batched one draws a whole block from SeedSequence(seed, spawn_key=(block,)). So the content is a function of
the header alone. A batched bank always simulates whole blocks and shows the first `rows` of them; a scalar bank
simulates just the rows that were asked for, and a later extension adds the rest of the last block.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sbiplat import files
from sbiplat.errors import BankError, PriorError, SimulatorError, UserError
from sbiplat.observation import ObservationSpec
from sbiplat.prior import Prior
from sbiplat.simulator import Simulator, available, resolve

FORMAT_VERSION = 1
STATUS = {"ok": 0, "non-finite": 1, "raised": 2, "timed-out": 3, "crashed": 4}
MISSING = 255  # what the index shows where a segment is absent
MAX_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Header:
    """All that a bank's content depends on, and the number of rows wanted.

    simulator: its name, how to find it again (`spec`) and the digest of its source. spec and versions are for people;
    `identity` leaves them out.
    """

    simulator: dict[str, str]
    batched: bool
    prior: Prior
    x: ObservationSpec
    seed: int
    block_size: int
    rows: int
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    signals: bool = False  # x is a signal, of which the simulator's `observe` makes observations

    @classmethod
    def of(cls, simulator: Simulator, seed: int, rows: int, block_size: int | None) -> Header:
        if block_size is None:
            largest = max(1, MAX_BLOCK_BYTES // simulator.signal.row_bytes)
            block_size = min(1024 if simulator.batched else 64, largest)
        return cls(
            {"name": simulator.name, "spec": simulator.spec, "source_digest": simulator.source_digest()},
            simulator.batched, simulator.prior, simulator.signal, int(seed), int(block_size), int(rows),
            versions(), files.now(), simulator.observe is not None,
        )

    def identity(self) -> dict[str, Any]:
        """What must agree for two sets of rows to belong to one bank."""
        return {
            "format_version": FORMAT_VERSION, "simulator": self.simulator["name"],
            "source_digest": self.simulator["source_digest"], "batched": self.batched, "prior": self.prior.to_json(),
            "x": {k: v for k, v in self.x.to_json().items() if k in ("shapes", "plain", "dtype")},
            "seed": self.seed, "block_size": self.block_size, **({"signals": True} if self.signals else {}),
        }

    @property
    def uid(self) -> str:
        """The digest of the identity: written into every segment, so that a foreign one is seen."""
        return files.digest_of(self.identity())

    @property
    def stored_rows(self) -> int:
        """Rows that segments hold once the bank is complete: whole blocks where the simulator is batched."""
        return -(-self.rows // self.block_size) * self.block_size if self.batched else self.rows

    def with_rows(self, rows: int) -> Header:
        return replace(self, rows=int(rows))

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION, "simulator": self.simulator, "batched": self.batched,
            "prior": self.prior.to_json(), "x": self.x.to_json(), "seed": self.seed, "block_size": self.block_size,
            "rows": self.rows, "versions": self.versions, "created": self.created, "signals": self.signals,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: Path) -> Header:
        if data.get("format_version") != FORMAT_VERSION:
            raise BankError(f"{where} is of bank format {data.get('format_version')!r}, this sbiplat reads {FORMAT_VERSION}; "
                            "simulate again, or use the sbiplat that made it")
        try:
            simulator = {k: str(data["simulator"][k]) for k in ("name", "spec", "source_digest")}
            numbers = {k: data[k] for k in ("seed", "block_size", "rows")}
            if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in numbers.values()):
                raise ValueError("seed, block_size and rows must be whole numbers")
            if numbers["block_size"] < 1 or numbers["rows"] < 1:
                raise ValueError("block_size and rows must be positive")
            return cls(simulator, bool(data["batched"]), Prior.from_json(data["prior"]), ObservationSpec.from_json(data["x"]),
                       **numbers, versions={str(k): str(v) for k, v in data["versions"].items()}, created=str(data["created"]),
                       signals=bool(data.get("signals", False)))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, PriorError, SimulatorError) as error:
            raise BankError(f"{where} is damaged: {str(error) if isinstance(error, UserError) else repr(error)}") from None

    def check_same(self, other: Header, where: Path) -> None:
        """Refuse to add rows of `other` to the bank of this header, saying what differs and the mend."""
        if self.signals != other.signals:
            what = "signals, and the simulator has no observe now" if self.signals else "x itself, and the simulator has an observe now"
            raise BankError(f"{where} holds {what}; give the new bank another --out")
        mine, theirs = self.identity(), other.identity()
        mends = {
            "simulator": "give the bank another --out",
            "source_digest": "the simulator's code has changed since; give the new bank another --out",
            "prior": "the prior has changed since; give the new bank another --out",
            "x": "the shape of x has changed since; give the new bank another --out",
            "batched": "the simulator's form has changed since; give the new bank another --out",
            "seed": f"use --seed {self.seed}, or another --out",
            "block_size": f"use --block-size {self.block_size}, or another --out",
        }
        for key, mend in mends.items():
            if mine[key] != theirs[key]:
                shown = f" {mine[key]!r}, not {theirs[key]!r}" if key in ("simulator", "seed", "block_size") else ""
                raise BankError(f"{where} was made with another {key.replace('_', ' ')}{shown and ':'}{shown}; {mend}")


def simulator_of(header: Header, path: Path, given: Simulator | str | None, command: str) -> Simulator:
    """The bank's simulator: the one given, or the one registered here under its name: what a bank names is never run.

    command: what a user would type, for the message. Raises SimulatorError, or BankError where it is not the bank's.
    """
    name = header.simulator["name"]
    if given is None and (":" in name or name not in available()):
        raise SimulatorError(f"no simulator is registered here as {name!r}; name it: {command} --simulator file.py:object")
    made = resolve(given if given is not None else name)
    header.check_same(Header.of(made, header.seed, header.rows, header.block_size), path)
    return made


def versions() -> dict[str, str]:
    """The versions that a figure may depend on, for the record; nothing is imported to find them."""
    found = {"python": platform.python_version()}
    for package in ("sbiplat", "numpy", "scipy", "h5py", "torch", "zuko", "nflows"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def streams(header: Header, first: int, stop: int) -> list[np.random.Generator]:
    """The generators of rows first..stop-1 of one block: one a row, or the block's only one where it is batched."""
    block, offset = divmod(first, header.block_size)
    keys = [(block,)] if header.batched else [(block, row) for row in range(offset, offset + stop - first)]
    return [np.random.default_rng(np.random.SeedSequence(header.seed, spawn_key=key)) for key in keys]


def pieces(first: int, stop: int, block_size: int) -> list[tuple[int, int]]:
    """The row ranges into which block boundaries cut first..stop."""
    cuts = [first, *range((first // block_size + 1) * block_size, stop, block_size), stop]
    return list(pairwise(cuts))


def default_rows_per_segment(header: Header, target_bytes: int = 64 * 2**20) -> int:
    """Rows of whole blocks that come to about `target_bytes`."""
    return max(1, target_bytes // (row_bytes(header) * header.block_size)) * header.block_size


def row_bytes(header: Header) -> int:
    """Bytes of one row: theta, x and status."""
    return header.x.row_bytes + 8 * header.prior.dim + 1
