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

from sbiplat.cli.bank import bank_app
from sbiplat.cli.certificate import certificate_app, verdict_lines
from sbiplat.cli.output import (
    BankPath,
    Config,
    Embedding,
    Json,
    MaybeSeed,
    RunPath,
    Seed,
    Set,
    Signals,
    counts,
    say,
    show,
    warn,
    warnings_in_a_line,
    write_draws,
    write_weighted,
)
from sbiplat.cli.simulators import simulators
from sbiplat.errors import SettingError, UserError
from sbiplat.files import is_disk_full
from sbiplat.launch import launched_rank, launched_ranks

REFUSED = 3
STOPPED = 130

app = typer.Typer(
    name="sbiplat", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="From a registered simulator to a posterior that has been tested.\n\n"
         "Any command: --debug shows the traceback behind a one-line error.",
)
app.add_typer(bank_app)
app.add_typer(certificate_app)
app.command(epilog="Example: sbiplat simulators two_moons")(simulators)


def _settings(config: Path | None, table: str, assignments: list[str] | None, **options: Any) -> dict[str, Any]:
    """Settings of a TOML file (its table of that name, or the whole file), of --set, and of the command's own options that were given."""
    from sbiplat.settings import parse_assignments, read_toml

    values = read_toml(config) if config else {}
    values = values.get(table, {k: v for k, v in values.items() if not isinstance(v, dict)})
    if not isinstance(values, dict):
        raise SettingError(f"{config}: [{table}] must be a table of settings, got {table} = {values!r}")
    values = {**values, **parse_assignments(assignments or [])}
    for name in ("run", "bank", "out", "simulator", "progress", "trials", "search", "key", "workers"):
        if name in values:
            raise SettingError(f"{name} is no setting; the command itself takes it (see sbiplat {table} --help)")
    return {**values, **{k: v for k, v in options.items() if v is not None}}


def _search_table(config: Path | None) -> dict[str, Any] | None:
    """The table [search] of a TOML file, if there is one."""
    from sbiplat.settings import read_toml

    table = read_toml(config).get("search") if config else None
    if table is not None and not isinstance(table, dict):
        raise SettingError(f"{config}: [search] must be a table, got search = {table!r}")
    return table


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
        show(as_json, info, f"{out}: {made.rows} rows, {counts(info['status'])}; digest {made.digest}")


# ------------------------------------------------------------------------------------------------- train and gate


@app.command(epilog="Example: sbiplat train moons.bank --estimator npe --out moons.run --set flow=maf --set max_epochs=50; "
                    "sbiplat train moons.bank --out tuned.run --tune 20 --set flow=nsf")
def train(
    bank: BankPath,
    out: Annotated[Path, typer.Option(help="The run's directory. An unfinished run is resumed.")],
    estimator: Annotated[str | None, typer.Option(help="The estimator; by default npe.")] = None,
    config: Config = None,
    assignments: Set = None,
    seed: MaybeSeed = None,
    simulator: Signals = None,
    defend: Annotated[list[str] | None, typer.Option(help="Train against changes of x: slab:SHARE, fisher:WEIGHT, noise:SCALE or "
                                                     "adversarial:EPS; may be given again.")] = None,
    tune: Annotated[int | None, typer.Option(help="Search settings by so many trials, and keep the best one's run; what --config and --set "
                                             "give is not searched. A table [search] in the config replaces the search space.")] = None,
    as_json: Json = False,
) -> None:
    """Train an estimator on a bank; resumes. With --tune, first find its settings."""
    settings = _settings(config, "train", assignments, estimator=estimator, seed=seed, defend=defend or None)
    if tune is None:
        from sbiplat.training.trainer import train as train_run

        run = train_run(bank, out=out, simulator=simulator, **settings)
    else:
        from sbiplat.training.tune import tune as search_settings

        run = search_settings(bank, out=out, simulator=simulator, trials=tune, search=_search_table(config), **settings)
    outcome, found = run.record["outcome"], run.record.get("tune")
    told = f"trial {found['trial'] + 1} of {found['trials']} ({found['pruned']} given up early): " + ", ".join(
        f"{k} = {json.dumps(v)}" for k, v in found["settings"].items()) + f"; in {out / 'tuned.toml'}\n" if found else ""
    show(as_json, {"run": str(out), "weights_digest": run.weights_digest, "bank_digest": run.bank_digest, **outcome,
                   **({"tune": found} if found else {})},
         f"{told}{out}: validation loss {outcome['validation_loss']:.4f} in epoch {outcome['best_epoch']}, {outcome['seconds']:.0f} s; "
         f"next: sbiplat gate {out}" + (f" --simulator {simulator}" if simulator else ""))


@app.command(epilog="Example: sbiplat gate moons.run --n 1000")
def gate(
    run: RunPath,
    n: Annotated[int | None, typer.Option(help="Held-out pairs; by default 1000, or as many as there are.")] = None,
    level: Annotated[str | None, typer.Option(help="draft (200 pairs; certifies nothing), standard, or publication (5000 pairs).")] = None,
    seed: MaybeSeed = None,
    bank: Annotated[Path | None, typer.Option(help="The bank, where it has been moved.")] = None,
    config: Config = None,
    assignments: Set = None,
    embedding: Embedding = None,
    simulator: Signals = None,
    key: Annotated[Path | None, typer.Option(help="File of an Ed25519 private key that signs the certificate.")] = None,
    workers: Annotated[int, typer.Option(help="Local processes. Under mpiexec the ranks count.")] = 1,
    as_json: Json = False,
) -> None:
    """Test a run on held-out pairs and write its certificate; exit 0 passed, 3 refused. `mpiexec -n R sbiplat gate ...` uses R ranks."""
    from sbiplat.gate.examine import gate as gate_run
    from sbiplat.nets.embeddings import register

    if embedding:
        register(embedding)
    certificate = gate_run(run, bank=bank, simulator=simulator, key=key, workers=workers,
                           **_settings(config, "gate", assignments, n=n, seed=seed, level=level))
    if launched_rank() == 0:
        show(as_json, dict(certificate.content), "\n".join(verdict_lines(certificate)))
    if not certificate.passed:
        raise typer.Exit(REFUSED)


@app.command("learning-curve", epilog="Example: sbiplat learning-curve moons.run")
def learning_curve(
    run: RunPath,
    bank: Annotated[Path | None, typer.Option(help="The bank, where it has been moved.")] = None,
    embedding: Embedding = None,
    simulator: Signals = None,
    as_json: Json = False,
) -> None:
    """Say how many simulations would do: train again on a quarter and a half of the bank; resumes."""
    from sbiplat.gate.learning import learning_curve as measure
    from sbiplat.nets.embeddings import register

    if embedding:
        register(embedding)
    curve = measure(run, bank=bank, simulator=simulator)
    lines = ["held-out log-density of theta in R^D, on the same rows:"]
    lines += [f"{rows:>12,} rows  {value:.4f} nats" for rows, value in zip(curve.rows, curve.log_density, strict=True)]
    show(as_json, {**asdict(curve), "statement": curve.statement}, "\n".join([*lines, f"{run}: {curve.statement}"]))


@app.command(epilog="Example: sbiplat recalibrate moons.run --out moons-recalibrated.run")
def recalibrate(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="The new run's directory.")],
    bank: Annotated[Path | None, typer.Option(help="The bank, where it has been moved.")] = None,
    embedding: Embedding = None,
    simulator: Signals = None,
    as_json: Json = False,
) -> None:
    """Make a run whose draws are stretched until its validation rows get uniform ranks; gate it like any other."""
    from sbiplat.gate.recalibrate import recalibrate as make
    from sbiplat.nets.embeddings import register

    if embedding:
        register(embedding)
    made = make(run, out=out, bank=bank, simulator=simulator)
    show(as_json, {"run": str(out), "pairs": made.record["recalibration"]["pairs"]}, f"{out}: recalibrated; next: {made.gate_command}")


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
    refuse_misspecified: Annotated[
        bool, typer.Option("--refuse-misspecified", help="Exit 4 and write nothing, where the observation is unlike the simulations.")
    ] = False,
    importance: Annotated[
        bool, typer.Option("--importance", help="Add the weights, by the simulator's log_likelihood, that make the draws exact.")
    ] = False,
    pin: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: hold a parameter fixed, and draw the others given it, with weights; repeatable.")
    ] = None,
    prior: Annotated[
        str | None, typer.Option(help="Another prior, file.py:object or module:object: draws under it, with weights.")
    ] = None,
    simulator: Annotated[str | None, typer.Option(help="The simulator, for --importance or a symmetry of your own, if it is not "
                                                  "installed.")] = None,
    embedding: Embedding = None,
    as_json: Json = False,
) -> None:
    """Draw from a certified posterior; exit 4 if it is not certified. An observation that is unlike the simulations is warned of."""
    from sbiplat.gate.door import load
    from sbiplat.observation import read_observation
    from sbiplat.posteriors.export import check_target
    from sbiplat.posteriors.importance import likelihood_of, simulator_of_run
    from sbiplat.runs import Run
    from sbiplat.settings import parse_assignments
    from sbiplat.simulator import resolve_prior

    check_target(out)
    pinned = parse_assignments(pin or [], "--pin", "t0=0.1")
    if len(pinned) < len(pin or []):
        raise SettingError("--pin names a parameter twice; pin it once")
    other = resolve_prior(prior) if prior is not None else None
    opened = Run.open(run)
    posterior = load(opened, allow_uncertified=allow_uncertified, refuse_misspecified=refuse_misspecified, embedding=embedding,
                     simulator=simulator)
    if posterior.provenance["certified"] == "no":
        warn(f"uncertified: {posterior.provenance['refusal']}")
    if posterior.provenance.get("own_thresholds"):
        warn(f"certified by thresholds that were changed: {posterior.provenance['own_thresholds']}")
    if posterior.provenance.get("since_gate"):
        warn(f"changed since the gate: {posterior.provenance['since_gate']}")
    x = read_observation(observation, opened.x)
    if importance or pinned or other is not None:
        likelihood = None
        if importance:
            likelihood = likelihood_of(simulator_of_run(opened, simulator, f"sbiplat sample {run} --importance"), posterior)
        with warnings_in_a_line():
            weighted = posterior.importance(x, n, log_likelihood=likelihood, prior=other, pinned=pinned, seed=seed)
        write_weighted(weighted, out, as_json)
        return
    with warnings_in_a_line():
        theta = posterior.sample(x, n, seed=seed)
    write_draws(posterior, x, theta, out, n, seed, as_json)


@app.command(epilog="Example: sbiplat report moons.run --observation x.npy")
def report(
    run: RunPath,
    observation: Annotated[Path | None, typer.Option(help="The observation to show; remembered in the run.")] = None,
    simulator: Annotated[str | None, typer.Option(help="The simulator, for the posterior predictive, where it is not installed.")] = None,
    seed: Seed = 0,
    embedding: Embedding = None,
    summaries: Annotated[str | None, typer.Option(help="file.py:object, a dict of functions of x, for predictive p-values.")] = None,
    as_json: Json = False,
) -> None:
    """Write RUN/report.html."""
    from sbiplat.diagnostics.predictive import summaries_from
    from sbiplat.observation import read_observation
    from sbiplat.report.page import report as write_report
    from sbiplat.runs import Run

    opened = Run.open(run)
    x = read_observation(observation, opened.x) if observation else None
    named = summaries_from(summaries) if summaries else None
    with warnings_in_a_line():
        path = write_report(opened, x, simulator=simulator, seed=seed, embedding=embedding, summaries=named)
    show(as_json, {"report": str(path)}, str(path))


@app.command(epilog="Example: sbiplat run workflows/predator_prey.toml")
def run(
    workflow: Annotated[Path, typer.Argument(metavar="WORKFLOW.toml", help="What to simulate, train, gate and report.")],
    as_json: Json = False,
) -> None:
    """Simulate, train, gate, sample and report; finished stages are skipped; exit 3 if the gate refuses."""
    from sbiplat.workflow import run_workflow

    with warnings_in_a_line():
        result = run_workflow(workflow, say=lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
    show(as_json, result.to_json(), result.text())
    if not result.passed:
        raise typer.Exit(REFUSED)


# ------------------------------------------------------------------------------------------------------------ main


def main() -> NoReturn:
    """Run a command; a user's mistake is one line on standard error and an exit code, without a traceback."""
    debug = "--debug" in sys.argv or bool(os.environ.get("SBIPLAT_DEBUG"))
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    if arguments in ([], ["bank"], ["certificate"]):
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
        _fail(_stopped(arguments), STOPPED)
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
            _fail(_stopped(arguments), STOPPED)
        if is_disk_full(error):
            _fail(f"the disk is full ({error}); free some space and run the same command again", 2)
        raise
    sys.exit(code if isinstance(code, int) else 0)


_STOPPED = "stopped; what was committed is kept, and the same command goes on from there"
_RESUME = ("simulate", "train", "learning-curve", "run", "bank")


def _stopped(arguments: list[str]) -> str:
    return _STOPPED if arguments and arguments[0] in _RESUME else "stopped; nothing was written, and the same command begins anew"


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
             "learning-curve", "recalibrate", "certificate", "show", "sign", "keygen", "schema", "sample", "report", "run")


def _fail(line: str, code: int, details: dict[str, Any] | None = None) -> NoReturn:
    """One line on standard error; with --json, one object on standard output too."""
    if launched_rank() == 0 or code == 1:
        if "--json" in sys.argv:
            say(json.dumps({"error": line, "exit_code": code, **(details or {})}))
        print("error: " + " ".join(line.split("\n")), file=sys.stderr, flush=True)  # noqa: T201
    sys.exit(code)
