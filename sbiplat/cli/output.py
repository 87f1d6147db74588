"""What the commands share: their options, and how they print."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sbiplat.errors import Misspecified, Unreliable

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
Seed = Annotated[int, typer.Option(help="Seed of all randomness of this command.")]
MaybeSeed = Annotated[int | None, typer.Option(help="Seed of all randomness of this command; by default 0.")]
Embedding = Annotated[str | None, typer.Option(help="file.py:Class of your own embedding, where the run was trained with one.")]
Signals = Annotated[str | None, typer.Option("--simulator", help="The simulator of a bank of signals, or of a symmetry, where it is not "
                                     "installed.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting as key=value; may be given again.")]
Config = Annotated[Path | None, typer.Option(help="TOML file of settings.")]
BankPath = Annotated[Path, typer.Argument(metavar="BANK", help="A bank: its directory, or a packed .h5 file.")]
CertificatePath = Annotated[Path, typer.Argument(metavar="FILE", help="A certificate.json, or a run's directory.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")]


def say(text: str = "") -> None:
    """Print to standard output."""
    print(text, flush=True)  # noqa: T201 - the command line's own output


def warn(text: str) -> None:
    """Print a warning to standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """sbiplat's own warnings (an observation unlike the bank, weights that are not to be relied on), each as one line."""
    ordinary = warnings.showwarning

    def told(message: Any, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, Misspecified | Unreliable):
            warn(str(message))
        else:
            ordinary(message, category, *rest, **named)

    with warnings.catch_warnings():
        for own in (Misspecified, Unreliable):
            warnings.simplefilter("always", own)
        warnings.showwarning = told
        yield


def show(as_json: bool, value: dict[str, Any], text: str) -> None:
    """Print a result: one JSON object for machines, or text for people."""
    say(json.dumps(value) if as_json else text)


def counts(status: dict[str, int]) -> str:
    """How many rows have which status."""
    return ", ".join(f"{v} {k}" for k, v in status.items() if v)


def write_draws(posterior: Any, x: Any, theta: Any, out: Path, n: int, seed: int, as_json: bool) -> None:
    """Write draws to a file, and print their means and sds."""
    from sbiplat.posteriors.export import write_draws

    facts = posterior.facts
    write_draws(out, posterior.prior, *posterior.x.batch(x), theta, seed, facts)
    flat = theta.reshape(-1, theta.shape[-1])
    _told(posterior, facts, theta, flat.mean(0), flat.std(0), out, n, seed, as_json)


def write_weighted(weighted: Any, out: Path, as_json: bool) -> None:
    """Write draws with importance weights to a file, and print their weighted means and sds, and what the weights are worth."""
    weighted.write(out)
    theta, facts = weighted.theta, weighted.facts
    flat, weights = theta.reshape(-1, theta.shape[-1]), weighted.weights.reshape(-1)
    mean = weights @ flat / weights.sum()
    sd = (weights @ (flat - mean) ** 2 / weights.sum()) ** 0.5
    figures = {k: _json(v) for k, v in facts.items() if k.startswith("importance")}
    _told(weighted.posterior, facts, theta, mean, sd, out, theta.shape[-2], weighted.seed, as_json, figures, [weighted.text()])


def _json(value: Any) -> Any:
    """A figure, or an array of them, as JSON, which has no infinity."""
    if hasattr(value, "tolist"):
        return [_json(v) for v in value.tolist()]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _told(posterior: Any, facts: dict[str, Any], theta: Any, mean: Any, sd: Any, out: Path, n: int, seed: int, as_json: bool,
          more: dict[str, Any] | None = None, lines: Sequence[str] = ()) -> None:
    """Print what was drawn."""
    rows = [f"{name:16} {m:12.5g} +- {s:.3g} {unit}".rstrip()
            for name, unit, m, s in zip(posterior.prior.names, posterior.prior.units, mean, sd, strict=True)]
    summary = {"out": str(out), "n": n, "seed": seed, "certified": facts["certified"] == "yes",
               **{k: v for k, v in facts.items() if k.startswith("misspecification")}, **(more or {}),
               "mean": mean.tolist(), "sd": sd.tolist()}
    show(as_json, summary, "\n".join([*(rows if theta.ndim == 2 else []), *lines, f"{out}: draws of shape {theta.shape}"]))
