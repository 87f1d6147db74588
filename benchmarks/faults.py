r"""The long campaign of faults: banks are killed at random moments, by many means, resumed, and compared with the undisturbed one.

Each run: a bank is begun with 1 to 3 local workers or 2, 3 or 5 MPI ranks; at random moments one of its processes (the command, a worker,
a rank, a simulator's own process, mpiexec) or all of them get SIGKILL, SIGTERM or SIGINT, up to three times, each time resumed by
the same command on another number of workers; then, in some, a segment is damaged and repaired. The last digest is held against
that of a bank that nothing disturbed. The simulators: one that raises and gives NaN, one that is batched, one that crashes.

    python benchmarks/faults.py --runs 60
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import Cells, table

import sbiplat as sp

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
SIMULATORS = {"faulty": 3000, "batch": 400_000, "crashing": 600}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LIMIT = 120


def command(name: str, out: Path, how: str) -> list[str]:
    simulator = f"{HERE / 'fault_simulators.py'}:{name}"
    words = [str(BIN / "sbiplat"), "simulate", simulator, "--n", str(SIMULATORS[name]), "--seed", "1", "--out",
             str(out), "--no-check"]
    kind, count = how.split()
    return [str(BIN / "mpiexec"), "-n", count, *words] if kind == "ranks" else [*words, "--workers", count]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def family(pid: int) -> list[int]:
    """A process and all that came of it, in the order of their birth."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
            parents[int(entry.parent.name)] = int(fields[1])
        except (OSError, IndexError):
            continue
    found = [pid]
    for one in found:
        found += [p for p, parent in parents.items() if parent == one]
    return found


def disturb(process: subprocess.Popen[bytes], rng: random.Random) -> str:
    """Send one signal to one of the processes or to all; says what was done."""
    time.sleep(rng.uniform(0.4, 3.0))
    if process.poll() is not None:
        return "too late"
    members = family(process.pid)
    number = rng.choice(SIGNALS)
    victims = members if rng.random() < 0.3 else [rng.choice(members)]
    for victim in victims:
        try:
            os.kill(victim, number)
        except ProcessLookupError:
            continue
    return f"{number.name} to {'all' if len(victims) > 1 else 'the command' if victims[0] == process.pid else 'one below'}"


def one_run(k: int, sound: dict[str, str]) -> dict[str, Any]:
    rng = random.Random(k)
    name = rng.choice(list(SIMULATORS))
    folder = Path(tempfile.mkdtemp())
    out, done, broken = folder / "b", [], ""
    try:
        for _ in range(rng.randint(1, 3)):
            how = rng.choice(["workers 1", "workers 2", "workers 3", "ranks 2", "ranks 3", "ranks 5"])
            process = start(command(name, out, how))
            what = disturb(process, rng)
            try:
                process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                broken = f"{how}, {what}: hangs"
                for victim in family(process.pid):
                    os.kill(victim, signal.SIGKILL)
                process.communicate()
            done.append(f"{how}: {what}")
        end = time.monotonic() + LIMIT
        while True:  # as a user would: the same command until it is through
            last = start(command(name, out, "workers 2"))
            _, error = last.communicate(timeout=LIMIT)
            if last.returncode == 0 or b"is filling" not in error or time.monotonic() > end:
                break
        if last.returncode:
            broken = broken or error.decode(errors="replace").strip()[-200:]
        elif rng.random() < 0.5:
            path = rng.choice(sorted((out / "segments").glob("0*.h5")))
            data = bytearray(path.read_bytes())
            damage = rng.choice(["flip", "cut", "gone"])
            if damage == "flip":
                data[rng.randrange(2048, len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data if damage == "flip" else data[:rng.randrange(len(data))])
            if damage == "gone":
                path.unlink()
            words = [str(BIN / "sbiplat"), "bank", "verify", str(out), "--repair", "--simulator", f"{HERE / 'fault_simulators.py'}:{name}"]
            mended = subprocess.run(words, capture_output=True, timeout=LIMIT, check=False)
            done.append(f"segment {damage}, repaired")
            if mended.returncode:
                broken = mended.stderr.decode(errors="replace").strip()[-200:]
        digest = "" if broken else sp.Bank.open(out).digest
        return {"simulator": name, "done": done, "same": digest == sound[name], "broken": broken}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=60)
    runs = parser.parse_args().runs
    cells = Cells("faults")

    def undisturbed(name: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(command(name, Path(folder) / "b", "workers 1"), check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            return sp.Bank.open(Path(folder) / "b").digest

    sound = {name: cells.measure(f"undisturbed {name}", lambda name=name: undisturbed(name)) for name in SIMULATORS}
    results = [cells.measure(f"run {k}", lambda k=k: one_run(k, sound)) for k in range(runs)]
    kinds = Counter(text.partition(": ")[2] or text for r in results for text in r["done"])
    print(table([[kind, count] for kind, count in sorted(kinds.items())], ["what was done", "times"]))
    print(f"\n{sum(r['same'] for r in results)} of {len(results)} banks have the digest of the undisturbed one")
    for k, result in enumerate(results):
        if not result["same"]:
            print(f"run {k}: {result}")
    sys.exit(0 if all(r["same"] for r in results) else 1)


if __name__ == "__main__":
    main()
