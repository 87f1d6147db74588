"""`sbiplat bank ...`: look into banks, verify and mend them, pack, draw and ask them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbiplat.cli.output import BankPath, Json, Seed, counts, say, show, warn, write_draws

MOST_PROBLEMS = 50

bank_app = typer.Typer(name="bank", help="Look into a bank, verify and mend it, or pack it into one file.")


@bank_app.command("info", epilog="Example: sbiplat bank info moons.bank")
def bank_info(bank: BankPath, as_json: Json = False) -> None:
    """What a bank holds: rows, status, digest, size, first failures."""
    from sbiplat.bank.bank import Bank
    from sbiplat.bank.sight import look, where_failed

    opened = Bank.open(bank)
    where = where_failed(look(opened), opened.header.prior.names)
    info = {**opened.info(), "failures_where": where}
    lines = [f"{k:20} {counts(v) if k == 'status' else v}" for k, v in info.items() if k not in ("first_failures", "failures_where")]
    lines += [f"{f['status']}: {f['rows']} rows, most of them with {f['parameter']} from {f['range'][0]:.4g} to {f['range'][1]:.4g} (good "
              f"rows: {f['range_ok'][0]:.4g} to {f['range_ok'][1]:.4g}; apart by {f['apart']:.2f})" for f in where]
    lines += [f"row {f['row']} failed: {f['message']}" + (f" (and {f['rows_alike'] - 1} alike)" if f["rows_alike"] > 1 else "")
              for f in info["first_failures"]]
    show(as_json, info, "\n".join(lines))


@bank_app.command("verify", epilog="Example: sbiplat bank verify moons.bank")
def bank_verify(
    bank: BankPath,
    repair: Annotated[bool, typer.Option("--repair", help="Set damaged segments aside and simulate what is missing.")] = False,
    simulator: Annotated[str | None, typer.Option(help="The bank's simulator, for --repair, where it is not installed.")] = None,
    workers: Annotated[int | None, typer.Option(help="Local processes for --repair.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds a row may take, for --repair: as the bank was made.")] = None,
    isolate: Annotated[bool, typer.Option(help="Run the simulator in child processes, for --repair.")] = True,
    as_json: Json = False,
) -> None:
    """Read every byte of a bank and hold it against its hashes; exit 2 where something is wrong."""
    from sbiplat.bank import care
    from sbiplat.bank.bank import Bank
    from sbiplat.errors import BankError
    from sbiplat.progress import Progress

    if repair:
        opened, mended = care.repair(bank, simulator, workers=workers, time_limit=time_limit, isolate=isolate)
        lines = [f"mended: {str(p).partition('; ')[0]}" for p in mended]
        lines.append(f"{bank}: all {opened.rows} rows are there; digest {opened.digest}")
        show(as_json, {"mended": [str(p) for p in mended], "digest": opened.digest}, "\n".join(lines))
        return
    found = care.survey(bank, Progress.auto()).problems if bank.is_dir() else Bank.open(bank).verify(Progress.auto())
    problems = [str(p) for p in found]
    if problems:
        for line in problems[:-1][:MOST_PROBLEMS] if not as_json else []:
            say(line)
        more = f" (and {len(problems) - 1} more{', above' if len(problems) <= MOST_PROBLEMS else ''})" if len(problems) > 1 else ""
        error = BankError(problems[-1] + more)
        error.details = {"problems": problems, "digest": None}
        raise error
    opened = Bank.open(bank)
    show(as_json, {"problems": [], "digest": opened.digest}, f"{bank}: all {opened.rows} rows match their hashes; digest {opened.digest}")


@bank_app.command("pack", epilog="Example: sbiplat bank pack moons.bank --out moons.h5")
def bank_pack(
    bank: BankPath,
    out: Annotated[Path | None, typer.Option(help="The file; by default BANK with the suffix .h5.")] = None,
    as_json: Json = False,
) -> None:
    """Copy a bank into one ordinary, self-contained .h5 file."""
    from sbiplat.bank.bank import Bank
    from sbiplat.progress import Progress

    opened = Bank.open(bank)
    path = opened.pack(out or bank.with_suffix(".h5"), Progress.auto())
    show(as_json, {"path": str(path), "digest": opened.digest}, f"{path}: {opened.rows} rows, digest {opened.digest}")


@bank_app.command("plot", epilog="Example: sbiplat bank plot moons.bank --out moons.png")
def bank_plot(
    bank: BankPath,
    out: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")],
    as_json: Json = False,
) -> None:
    """Draw how often rows failed, and how long they took, over each parameter."""
    from sbiplat.bank.bank import Bank
    from sbiplat.report.bank_figure import draw

    show(as_json, {"path": str(draw(Bank.open(bank), out))}, str(out))


@bank_app.command("query", epilog="Example: sbiplat bank query moons.bank --observation x.npy --n 1000 --out nearest.nc")
def bank_query(
    bank: BankPath,
    observation: Annotated[Path, typer.Option(help=".npy, .npz, .csv or .h5 of one observation or a batch.")],
    n: Annotated[int, typer.Option(help="Draws for each observation.")],
    out: Annotated[Path, typer.Option(help=".nc (ArviZ), .h5 or .csv")],
    keep: Annotated[float, typer.Option(help="Share of the bank's rows that is kept; at least 100 rows.")] = 0.01,
    adjust: Annotated[bool, typer.Option(help="Move the kept rows by regression.")] = True,
    summaries: Annotated[Path | None, typer.Option(help="A run whose contexts serve as summaries in place of x.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """A first answer without training: the bank's rows nearest to the observation (regression-adjusted ABC)."""
    from sbiplat.bank.bank import Bank
    from sbiplat.observation import read_observation
    from sbiplat.posteriors.export import check_target
    from sbiplat.posteriors.nearest import nearest

    check_target(out)
    opened = Bank.open(bank)
    posterior = nearest(opened, keep=keep, adjust=adjust, summaries=summaries)
    warn(f"uncertified: {posterior.provenance['refusal']}")
    x = read_observation(observation, opened.header.x)
    write_draws(posterior, x, posterior.sample(x, n, seed=seed), out, n, seed, as_json)


@bank_app.command("compact", epilog="Example: sbiplat bank compact moons.bank")
def bank_compact(bank: BankPath, as_json: Json = False) -> None:
    """Merge the small segments that many restarts left into ones of about 64 MB; the digest stays."""
    from sbiplat.bank import care
    from sbiplat.bank.bank import Bank
    from sbiplat.progress import Progress

    before = len(Bank.open(bank).segments)
    made = care.compact(bank, Progress.auto())
    count = len(made.segments)
    show(as_json, {"segments_before": before, "segments": count, "digest": made.digest if made.complete else None},
         f"{bank}: {before} segments became {count}" + (f"; digest {made.digest}" if made.complete else ""))
