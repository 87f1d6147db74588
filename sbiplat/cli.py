"""The commands: thin, one function a command. What is slow to import is imported inside the command that needs it.

Exit codes: 0 done; 2 a user's mistake, told in one line; 3 refused by the gate; 4 uncertified; 130 stopped by a signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

# One thread a process unless the user says otherwise, and idle ones asleep: set before numpy and torch start their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from sbiplat.errors import SettingError, UserError
from sbiplat.files import is_disk_full
from sbiplat.launch import launched_rank, launched_ranks

REFUSED = 3
STOPPED = 130
CHECK_SECONDS = 10.0
MOST_PROBLEMS = 50

app = typer.Typer(
    name="sbiplat", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="From a registered simulator to a posterior that has been tested.\n\n"
         "Any command: --debug shows the traceback behind a one-line error.",
)
bank_app = typer.Typer(name="bank", help="Look into a bank, verify and mend it, or pack it into one file.")
app.add_typer(bank_app)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
Seed = Annotated[int, typer.Option(help="Seed of all randomness of this command.")]
MaybeSeed = Annotated[int | None, typer.Option(help="Seed of all randomness of this command; by default 0.")]
Embedding = Annotated[str | None, typer.Option(help="file.py:Class of your own embedding, where the run was trained with one.")]
Signals = Annotated[str | None, typer.Option("--simulator", help="The simulator of a bank of signals, where it is not installed.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting as key=value; may be given again.")]
Config = Annotated[Path | None, typer.Option(help="TOML file of settings.")]
BankPath = Annotated[Path, typer.Argument(metavar="BANK", help="A bank: its directory, or a packed .h5 file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")]


def say(text: str = "") -> None:
    """Print to standard output."""
    print(text, flush=True)  # noqa: T201 - the command line's own output


def warn(text: str) -> None:
    """Print a warning to standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)  # noqa: T201


def show(as_json: bool, value: dict[str, Any], text: str) -> None:
    """Print a result: one JSON object for machines, or text for people."""
    say(json.dumps(value) if as_json else text)


def _settings(config: Path | None, table: str, assignments: list[str] | None, **options: Any) -> dict[str, Any]:
    """Settings of a TOML file (its table of that name, or the whole file), of --set, and of the command's own options that were given."""
    from sbiplat.settings import parse_assignments, read_toml

    values = read_toml(config) if config else {}
    values = values.get(table, {k: v for k, v in values.items() if not isinstance(v, dict)})
    if not isinstance(values, dict):
        raise SettingError(f"{config}: [{table}] must be a table of settings, got {table} = {values!r}")
    values = {**values, **parse_assignments(assignments or [])}
    for name in ("run", "bank", "out", "simulator", "progress"):
        if name in values:
            raise SettingError(f"{name} is no setting; the command itself takes it (see sbiplat {table} --help)")
    return {**values, **{k: v for k, v in options.items() if v is not None}}


# ------------------------------------------------------------------------------------------------------ simulators


@app.command(epilog="Example: sbiplat simulators two_moons")
def simulators(
    name: Annotated[str | None, typer.Argument(help="A simulator: a name, file.py:object or module:object.")] = None,
    rows: Annotated[int, typer.Option(help="Rows that the contract check runs.")] = 64,
    time_limit: Annotated[float | None, typer.Option(help="Seconds a row may take; by default the simulator's own, or 10.")] = None,
    as_json: Json = False,
) -> None:
    """List the registered simulators; with NAME, show its card and check its contract."""
    from sbiplat.bank.sandbox import check_apart
    from sbiplat.simulator import available, check, resolve

    if name is None:
        found = available()
        show(as_json, found, "\n".join(f"{k:20} {v}" for k, v in sorted(found.items())) or "none registered")
        return
    simulator = resolve(name)
    if simulator.parallel:  # MPI cannot be forked
        result = check(simulator, rows)
    else:
        result = check_apart(simulator, rows, time_limit or simulator.time_limit or CHECK_SECONDS)
    card = {
        "name": simulator.name, "summary": simulator.summary, "citation": simulator.citation, "batched": simulator.batched,
        "source": simulator.spec, "source_digest": simulator.source_digest(),
        "prior": simulator.prior.to_json(), "x": simulator.x.to_json(),
        "signal": simulator.signal.to_json() if simulator.observe else None,
        "tractable": [k for k in ("log_likelihood", "posterior_log_prob", "posterior_sampler") if getattr(simulator, k)],
        "check": asdict(result) if result else None,
    }
    show(as_json, card, _card_text(card))


def _card_text(card: dict[str, Any]) -> str:
    lines = [card["name"], f"  {card['summary']}"] + ([f"  {card['citation']}"] if card["citation"] else [])
    laws = card["prior"].get("independent")
    lines.append("parameters")
    for k, (name, unit) in enumerate(zip(card["prior"]["names"], card["prior"]["units"], strict=True)):
        law = laws[k] if laws else {}
        inside = ", ".join(f"{a}={b:g}" for a, b in law.items() if a not in ("law", "unit") and b is not None)
        text = f"{law['law']}({inside})" if laws else f"joint law: {next(k for k in card['prior'] if k not in ('names', 'units'))}"
        lines.append(f"  {name:16} {text}{' ' + unit if unit else ''}")
    x = card["x"]
    shapes = tuple(x["shapes"]["x"]) if x["plain"] else {k: tuple(v) for k, v in x["shapes"].items()}
    lines.append(f"x  {shapes} {x['dtype']}" + (f", transform {x['transform']}" if set(x["transform"].values()) != {"none"} else ""))
    if card["signal"]:
        lines.append(f"signal  {card['signal']['shapes']}: banks hold it, and observe makes x of it in every epoch")
    lines.append(f"tractable  {', '.join(card['tractable']) or 'nothing declared'}")
    result = card["check"]
    if result is None:
        lines.append("check broken off: its rows took longer than the time limit; give a longer --time-limit, or fewer --rows")
        return "\n".join(lines)
    lines.append(f"check passed on {result['rows']} rows: {result['finite']:.1%} finite, {result['raised']:.1%} raised"
                 + (f" ({result['first_error']})" if result["first_error"] else ""))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- banks


@app.command(epilog="Example: sbiplat simulate two_moons --n 20000 --seed 1 --out moons.bank")
def simulate(
    sim: Annotated[str, typer.Argument(metavar="SIM", help="A name, file.py:object or module:object.")],
    n: Annotated[int, typer.Option(help="Rows of the bank. A larger n extends a bank.")],
    seed: Annotated[int, typer.Option(help="Seed of the bank.")],
    out: Annotated[Path, typer.Option(help="The bank's directory. An unfinished bank is resumed.")],
    workers: Annotated[int | None, typer.Option(help="Local processes; by default one a core. Under mpiexec the ranks count.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Rows of a block; part of what the content depends on.")] = None,
    checked: Annotated[bool, typer.Option("--check/--no-check", help="Run a few rows against the contract before a new bank.")] = True,
    time_limit: Annotated[float | None, typer.Option(help="Seconds a row (of a batched simulator: a block) may take.")] = None,
    recycle: Annotated[int | None, typer.Option(help="Blocks after which a simulator's process is replaced, if it leaks memory.")] = None,
    isolate: Annotated[bool, typer.Option(help="Run the simulator in child processes, which may crash or hang.")] = True,
    ranks_per_simulation: Annotated[int, typer.Option(help="MPI ranks that simulate a row together, for parallel simulators.")] = 1,
    as_json: Json = False,
) -> None:
    """Fill a bank with simulations; resumes and extends. `mpiexec -n R sbiplat simulate ...` uses R ranks."""
    from sbiplat.bank import fill
    from sbiplat.bank.farm import mpi_world

    made = fill.simulate(sim, n, seed, out, workers=workers, block_size=block_size, checked=checked, time_limit=time_limit,
                         recycle=recycle, isolate=isolate, ranks_per_simulation=ranks_per_simulation)
    comm = mpi_world()
    if comm is None or comm.Get_rank() == 0:
        info = made.info()
        show(as_json, info, f"{out}: {made.rows} rows, {_counts(info['status'])}; digest {made.digest}")


def _counts(status: dict[str, int]) -> str:
    return ", ".join(f"{v} {k}" for k, v in status.items() if v)


@bank_app.command("info", epilog="Example: sbiplat bank info moons.bank")
def bank_info(bank: BankPath, as_json: Json = False) -> None:
    """What a bank holds: rows, status, digest, size, first failures."""
    from sbiplat.bank.bank import Bank
    from sbiplat.bank.sight import look, where_failed

    opened = Bank.open(bank)
    where = where_failed(look(opened), opened.header.prior.names)
    info = {**opened.info(), "failures_where": where}
    lines = [f"{k:20} {_counts(v) if k == 'status' else v}" for k, v in info.items() if k not in ("first_failures", "failures_where")]
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
    _write_draws(posterior, x, posterior.sample(x, n, seed=seed), out, n, seed, as_json)


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


# ------------------------------------------------------------------------------------------------- train and gate


@app.command(epilog="Example: sbiplat train moons.bank --estimator npe --out moons.run --set flow=maf --set max_epochs=50")
def train(
    bank: BankPath,
    out: Annotated[Path, typer.Option(help="The run's directory. An unfinished run is resumed.")],
    estimator: Annotated[str | None, typer.Option(help="The estimator; by default npe.")] = None,
    config: Config = None,
    assignments: Set = None,
    seed: MaybeSeed = None,
    simulator: Signals = None,
    as_json: Json = False,
) -> None:
    """Train an estimator on a bank; resumes."""
    from sbiplat.training.trainer import train as train_run

    run = train_run(bank, out=out, simulator=simulator, **_settings(config, "train", assignments, estimator=estimator, seed=seed))
    outcome = run.record["outcome"]
    show(as_json, {"run": str(out), "weights_digest": run.weights_digest, "bank_digest": run.bank_digest, **outcome},
         f"{out}: validation loss {outcome['validation_loss']:.4f} in epoch {outcome['best_epoch']}, {outcome['seconds']:.0f} s; "
         f"next: sbiplat gate {out}")


@app.command(epilog="Example: sbiplat gate moons.run --n 1000")
def gate(
    run: RunPath,
    n: Annotated[int | None, typer.Option(help="Held-out pairs; by default 1000, or as many as there are.")] = None,
    seed: MaybeSeed = None,
    bank: Annotated[Path | None, typer.Option(help="The bank, where it has been moved.")] = None,
    config: Config = None,
    assignments: Set = None,
    embedding: Embedding = None,
    simulator: Signals = None,
    as_json: Json = False,
) -> None:
    """Test a run on held-out pairs and write its certificate; exit 0 certified, 3 refused."""
    from sbiplat.gate.certificate import gate as gate_run
    from sbiplat.nets.embeddings import register

    if embedding:
        register(embedding)
    certificate = gate_run(run, bank=bank, simulator=simulator, **_settings(config, "gate", assignments, n=n, seed=seed))
    show(as_json, dict(certificate.content), "\n".join(_verdict_lines(certificate)))
    if not certificate.passed:
        raise typer.Exit(REFUSED)


def _verdict_lines(certificate: Any) -> list[str]:
    lines = [f"{'passed ' if c.passed else 'REFUSED'}  {c.name:24} {c.statement}" + (f"; {c.mend}" if c.mend else "")
             for c in certificate.criteria]
    lines.append(f"not tested yet: {', '.join(certificate.content['not_tested'])}")
    verdict = "certified" if certificate.passed else f"REFUSED by {', '.join(c.name for c in certificate.failed)}"
    return [*lines, f"{certificate.run_path}: {verdict}; certificate {certificate.sha256}"]


# -------------------------------------------------------------------------------------------------- use and report


@app.command(epilog="Example: sbiplat sample moons.run --observation x.npy --n 10000 --out draws.csv")
def sample(
    run: RunPath,
    observation: Annotated[Path, typer.Option(help=".npy, .npz, .csv or .h5 of one observation or a batch.")],
    n: Annotated[int, typer.Option(help="Draws for each observation.")],
    out: Annotated[Path, typer.Option(help=".nc (ArviZ), .h5 or .csv")],
    seed: Seed = 0,
    allow_uncertified: Annotated[
        bool, typer.Option("--allow-uncertified", help="Draw from a posterior that the gate has not passed.")
    ] = False,
    embedding: Embedding = None,
    as_json: Json = False,
) -> None:
    """Draw from a certified posterior; exit 4 if it is not certified."""
    from sbiplat.gate.certificate import load
    from sbiplat.observation import read_observation
    from sbiplat.posteriors.export import check_target
    from sbiplat.runs import Run

    check_target(out)
    opened = Run.open(run)
    posterior = load(opened, allow_uncertified=allow_uncertified, embedding=embedding)
    if posterior.provenance["certified"] == "no":
        warn(f"uncertified: {posterior.provenance['refusal']}")
    if posterior.provenance.get("own_thresholds"):
        warn(f"certified by thresholds that were changed: {posterior.provenance['own_thresholds']}")
    x = read_observation(observation, opened.x)
    theta = posterior.sample(x, n, seed=seed)
    _write_draws(posterior, x, theta, out, n, seed, as_json)


def _write_draws(posterior: Any, x: Any, theta: Any, out: Path, n: int, seed: int, as_json: bool) -> None:
    from sbiplat.posteriors.export import write_draws

    write_draws(out, posterior.prior, *posterior.x.batch(x), theta, seed, posterior.facts)
    rows = [f"{name:16} {theta[..., k].mean():12.5g} +- {theta[..., k].std():.3g} {unit}".rstrip()
            for k, (name, unit) in enumerate(zip(posterior.prior.names, posterior.prior.units, strict=True))]
    summary = {"out": str(out), "n": n, "seed": seed, "certified": posterior.provenance["certified"] == "yes",
               "mean": theta.reshape(-1, theta.shape[-1]).mean(0).tolist(), "sd": theta.reshape(-1, theta.shape[-1]).std(0).tolist()}
    show(as_json, summary, "\n".join([*(rows if theta.ndim == 2 else []), f"{out}: draws of shape {theta.shape}"]))


@app.command(epilog="Example: sbiplat report moons.run --observation x.npy")
def report(
    run: RunPath,
    observation: Annotated[Path | None, typer.Option(help="The observation to show; remembered in the run.")] = None,
    simulator: Annotated[str | None, typer.Option(help="The simulator, for the posterior predictive, where it is not installed.")] = None,
    seed: Seed = 0,
    embedding: Embedding = None,
    as_json: Json = False,
) -> None:
    """Write RUN/report.html."""
    from sbiplat.observation import read_observation
    from sbiplat.report.page import report as write_report
    from sbiplat.runs import Run

    opened = Run.open(run)
    x = read_observation(observation, opened.x) if observation else None
    path = write_report(opened, x, simulator=simulator, seed=seed, embedding=embedding)
    show(as_json, {"report": str(path)}, str(path))


@app.command(epilog="Example: sbiplat run workflows/predator_prey.toml")
def run(
    workflow: Annotated[Path, typer.Argument(metavar="WORKFLOW.toml", help="What to simulate, train, gate and report.")],
    as_json: Json = False,
) -> None:
    """Simulate, train, gate, sample and report; finished stages are skipped; exit 3 if the gate refuses."""
    from sbiplat.workflow import run_workflow

    result = run_workflow(workflow, say=lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
    show(as_json, result.to_json(), result.text())
    if not result.passed:
        raise typer.Exit(REFUSED)


# ------------------------------------------------------------------------------------------------------------ main


def main() -> NoReturn:
    """Run a command; a user's mistake is one line on standard error and an exit code, without a traceback."""
    debug = "--debug" in sys.argv or bool(os.environ.get("SBIPLAT_DEBUG"))
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    if arguments in ([], ["bank"]):
        arguments.append("--help")
    _prepare_streams()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt if launched_ranks() == 1 else _end_rank)
    try:
        code = app(arguments, standalone_mode=False)
        if code == STOPPED:  # typer's own answer to a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.stdout.flush()
    except UserError as error:
        if debug:
            traceback.print_exc()
        _fail(str(error), error.exit_code, error.details)
    except KeyboardInterrupt:
        _fail(_STOPPED, STOPPED)
    except BrokenPipeError:  # the reader of a pipe has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "format_message"):  # wrong words on the command line; typer brings its own copy of click
            command = " ".join(["sbiplat", *(a for a in arguments[:2] if a in _COMMANDS)])
            _fail(f"{error.format_message()} (see {command} --help)", 2)
        if type(error).__name__ == "Abort":
            _fail(_STOPPED, STOPPED)
        if is_disk_full(error):
            _fail(f"the disk is full ({error}); free some space and run the same command again", 2)
        raise
    sys.exit(code if isinstance(code, int) else 0)


_STOPPED = "stopped; what was committed is kept, and the same command goes on from there"


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _end_rank(number: int, frame: Any) -> None:
    """Die of the signal: a rank that exits by itself before all are joined leaves the others waiting for it for ever.

    A launcher ends the job when a rank is killed. While rows are simulated the farm takes these signals, and stops cleanly.
    """
    with suppress(OSError):
        os.write(2, f"error: {_STOPPED}\n".encode())
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _prepare_streams() -> None:
    """Streams that take any text: a closed one is the null device, and what an encoding lacks is escaped."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


_COMMANDS = ("simulators", "simulate", "bank", "info", "verify", "pack", "compact", "plot", "query", "train", "gate",
             "sample", "report", "run")


def _fail(line: str, code: int, details: dict[str, Any] | None = None) -> NoReturn:
    """One line on standard error; with --json, one object on standard output too."""
    if launched_rank() == 0 or code == 1:
        if "--json" in sys.argv:
            say(json.dumps({"error": line, "exit_code": code, **(details or {})}))
        print("error: " + " ".join(line.split("\n")), file=sys.stderr, flush=True)  # noqa: T201
    sys.exit(code)
