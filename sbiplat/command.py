"""Simulators that are programs: an external command, registered as a simulator.

    ising = sp.command_simulator(
        ["./ising", "params.in"],
        name="ising",
        prior=sp.Prior({"beta": sp.Uniform(0.2, 0.6)}),
        inputs={"params.in": "beta {beta}\\nseed {seed}\\n"},      # files written for each row
        output="magnetisation.txt",
        x_shape=(100,),
        time_limit=60,
    )

Each row runs in an empty working folder of its own. In the command's words and in the input files, `{name}` is a parameter
(format specs work: `{beta:.6f}`; without one it has 17 digits, all of a double), `{seed}` a whole number from the row's
stream, below 2^31, and `{{`, `}}` are braces. x is read from `output`: "stdout", or a file by its suffix: .npy; .h5:/dataset; .csv;
anything else as text, numbers between blanks. A dict of outputs gives a dict of arrays.

The program must take all its randomness from `{seed}`. The bank's identity has the digest of the program file and of `files`;
what these load in turn it cannot know.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import signal
import string
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.errors import SimulatorError
from sbiplat.observation import ObservationSpec
from sbiplat.prior import Prior
from sbiplat.simulator import Simulator, simulator

_SEED = "seed"
MOST_OUTPUT = 2**28


class CommandError(RuntimeError):
    """A command that failed: what it ended with and the last line that it wrote."""


@dataclass(frozen=True)
class Command:
    """A program as a function (theta, rng) -> x. See the module's docstring."""

    words: tuple[str, ...]
    parameters: tuple[str, ...]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    plain: bool
    files: Mapping[str, Path]
    environment: Mapping[str, str]
    exit_codes: tuple[int, ...]
    program: Path
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    def source_parts(self) -> tuple[Any, ...]:
        """What decides x: for the digest of the simulator's code. Not the place of the program on this machine."""
        return ("command", self.words, self.parameters, dict(self.inputs), dict(self.outputs), dict(self.environment),
                self.exit_codes, dict(self.digests))

    def __call__(self, theta: NDArray[np.float64], rng: np.random.Generator) -> Any:
        values = {**dict(zip(self.parameters, theta.tolist(), strict=True)), _SEED: int(rng.integers(2**31))}
        folder = Path(tempfile.mkdtemp(prefix="row-", dir=os.environ.get("SBIPLAT_SCRATCH")))
        try:
            for name, place in self.files.items():
                (folder / name).symlink_to(place)
            for name, text in self.inputs.items():
                (folder / name).write_text(_filled(text, values), encoding="utf-8")
            stdout = self._run(folder, [str(self.program), *(_filled(word, values) for word in self.words[1:])])
            x = {name: _shaped(_read(where, folder, stdout), self.shapes.get(name, ())) for name, where in self.outputs.items()}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return x["x"] if self.plain else x

    def _run(self, folder: Path, words: list[str]) -> bytes:
        with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as output:  # files: what it leaves running may hold them open
            done = subprocess.run(
                words, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, check=False,
                env={**os.environ, **self.environment}, preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
            if done.returncode not in self.exit_codes:
                errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4096))
                said = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
                code = done.returncode
                how = f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
                raise CommandError(f"{self.words[0]} failed ({how})" + (f": {said[-1][:200]}" if said else ""))
            if output.seek(0, os.SEEK_END) > MOST_OUTPUT:
                raise CommandError(f"{self.words[0]} wrote more than {MOST_OUTPUT / 1e6:.0f} MB to its standard output")
            output.seek(0)
            return output.read()


def command_simulator(
    command: Sequence[str], *, name: str, prior: Prior | Mapping[str, Any], x_shape: Any, output: str | Mapping[str, str],
    inputs: Mapping[str, str] | None = None, files: Sequence[str | Path] = (), environment: Mapping[str, str] | None = None,
    exit_codes: Sequence[int] = (0,), folder: str | Path | None = None, summary: str = "", **declared: Any,
) -> Simulator:
    """Register an external command as a simulator; see the module's docstring.

    command: the program and its words; a program with a slash is found from `folder`, by default that of the calling file,
    others on the PATH. inputs: name -> template of files to write. files: to be linked into each working folder. exit_codes:
    those that mean success. declared: further arguments of `sp.simulator`, such as time_limit, dtype and x_transform.
    Raises SimulatorError where the program or a file is missing, or a template names what is no parameter.
    """
    if not isinstance(prior, Prior):
        prior = Prior(prior)
    if isinstance(command, str) or not command or not all(isinstance(w, str) for w in command):
        raise SimulatorError(f"command simulator {name!r}: give the command as a list of words, such as ['./program', '{{a}}']")
    if _SEED in prior.names:
        raise SimulatorError(f"command simulator {name!r}: no parameter may be called seed, which stands for the row's own; rename it")
    here = sys._getframe(1).f_globals.get("__file__")
    base = Path(folder or (Path(here).parent if here else ".")).resolve()
    plain = isinstance(output, str)
    outputs = {"x": str(output)} if plain else {str(k): str(v) for k, v in dict(output).items()}
    linked = {Path(f).name: Path(os.path.abspath(base / f)) for f in files}
    program = _program(command[0], base, name)
    for place in linked.values():
        if not place.is_file():
            raise SimulatorError(f"command simulator {name!r}: there is no file {place}")
    templates = {str(k): str(v) for k, v in (inputs or {}).items()}
    for place in (*templates, *(o.partition(":/")[0] for o in outputs.values())):
        if place != "stdout" and (Path(place).is_absolute() or ".." in Path(place).parts or Path(place).name != place):
            raise SimulatorError(f"command simulator {name!r}: {place!r} must be the name of a file in the working folder")
    taken = [*templates, *(Path(f).name for f in files), *{o.partition(":/")[0] for o in outputs.values()}]
    for twice in {n for n in taken if taken.count(n) > 1 and n != "stdout"}:
        raise SimulatorError(f"command simulator {name!r}: {twice!r} stands for two of the files, inputs and outputs; rename one")
    for text in (*command[1:], *templates.values()):
        _check_template(text, prior.names, name)
    made = Command(
        tuple(command), prior.names, templates, outputs, plain, linked, dict(environment or {}), tuple(int(c) for c in exit_codes), program,
        dict(ObservationSpec.declare(declared.get("signal_shape") or x_shape).shapes),
        {k: hashlib.sha256(p.read_bytes()).hexdigest() for k, p in (("program", program), *((f"file/{n}", p) for n, p in linked.items()))},
    )
    return simulator(prior=prior, x_shape=x_shape, name=name, summary=summary or f"The program {Path(command[0]).name}.", **declared)(made)


def _program(word: str, base: Path, name: str) -> Path:
    found = os.path.abspath(base / word) if "/" in word else shutil.which(word)  # not through links: a link may be what it goes by
    if found is None or not Path(found).is_file():
        raise SimulatorError(f"command simulator {name!r}: there is no program {found or word}; compile it first, or give folder=")
    if not os.access(found, os.X_OK):
        raise SimulatorError(f"command simulator {name!r}: {found} may not be executed; chmod +x it")
    return Path(found)


def _check_template(text: str, parameters: Sequence[str], name: str) -> None:
    try:
        _filled(text, {**dict.fromkeys(parameters, 0.5), _SEED: 1})
    except KeyError as error:
        raise SimulatorError(f"command simulator {name!r}: {{{error.args[0]}}} in {text[:60]!r} is neither a parameter "
                             f"({', '.join(parameters)}) nor seed; write {{{{ and }}}} for braces") from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise SimulatorError(f"command simulator {name!r}: template {text[:60]!r}: {error}; write {{{{ and }}}} for braces") from None


class _Formatter(string.Formatter):
    """`{name}` and `{name:spec}` only: no attributes and no items."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        return kwargs[field_name], field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        return format(value, format_spec) if format_spec else repr(value)


def _filled(text: str, values: Mapping[str, Any]) -> str:
    return _Formatter().vformat(text, (), values)


def _read(where: str, folder: Path, stdout: bytes) -> Any:
    if where == "stdout":
        return _numbers(stdout.decode(errors="replace"), "stdout")
    file, _, dataset = where.partition(":/")
    path = folder / file
    if not path.is_file():
        raise CommandError(f"it wrote no {file}")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if suffix in (".h5", ".hdf5"):
        import h5py

        with h5py.File(path, "r") as opened:
            names = [dataset] if dataset else list(opened)
            if len(names) != 1 or not isinstance(opened.get(names[0]), h5py.Dataset):
                raise CommandError(f"{file} holds {', '.join(opened) or 'nothing'}; name the dataset as {file}:/NAME")
            return opened[names[0]][()]
    text = path.read_text(encoding="utf-8", errors="replace")
    return _numbers(text.replace(",", " ") if suffix == ".csv" else text, file)


def _numbers(text: str, what: str) -> NDArray[np.float64]:
    """Numbers between blanks, a row a line; a first line of names, and what follows a #, are left out."""
    lines = [line.split("#")[0].split() for line in text.splitlines()]
    rows = [line for line in lines if line]
    if rows and not any(map(_is_number, rows[0])):
        rows = rows[1:]
    if not rows:
        raise CommandError(f"{what} holds no numbers")
    if len({len(row) for row in rows}) > 1:
        raise CommandError(f"{what} has lines of different length")
    try:
        table = np.array(rows, float)
    except ValueError as error:
        raise CommandError(f"{what}: {error}") from None
    return table[0, 0] if table.size == 1 else table.reshape(-1) if 1 in table.shape else table


def _shaped(value: Any, shape: tuple[int, ...]) -> Any:
    """The value with the declared shape's axes of length 1, which text cannot show."""
    array = np.asarray(value)
    same = [s for s in array.shape if s != 1] == [s for s in shape if s != 1]
    return array.reshape(shape) if same else array


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a program without its row is of no use
