"""The gate's work over ranks and workers: the same figures to the last bit, and one line where one of them fails."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sbiplat as sp
from sbiplat.diagnostics.spread import Spread
from sbiplat.errors import SettingError, UserError
from sbiplat.progress import silent

BIN = Path(sys.executable).parent
GATE = """
import os
import sys
import sbiplat as sp
from sbiplat.bank.farm import mpi_world
from sbiplat.progress import silent
rank = mpi_world().Get_rank()
{extra}
try:
    os.write(1, f"{{rank}} {{sp.gate(sys.argv[1], progress=silent).sha256}}\\n".encode())
except sp.UserError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def run_copy(line_run, tmp_path):
    shutil.copytree(line_run.path, tmp_path / "run")
    return tmp_path / "run"


def told(content):
    return {k: v for k, v in content.items() if k not in ("created", "cost", "sha256", "machine")}


def on_ranks(count, *words, cwd):
    return subprocess.run([BIN / "mpiexec", "-n", str(count), *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_find_the_same_figures_to_the_last_bit(run_copy, line_run, workers):
    made = sp.gate(run_copy, workers=workers, progress=silent).content
    assert told(made) == told(json.loads((line_run.path / "certificate.json").read_text()))
    assert made["cost"]["processes"] == workers


@pytest.mark.parametrize("ranks", [3])
def test_ranks_find_the_same_figures_to_the_last_bit(run_copy, line_run, ranks):
    done = on_ranks(ranks, BIN / "sbiplat", "gate", run_copy, "--json", cwd=run_copy)
    assert done.returncode == 0, done.stderr
    made = json.loads((run_copy / "certificate.json").read_text())
    assert told(made) == told(json.loads((line_run.path / "certificate.json").read_text()))
    assert made["cost"]["processes"] == ranks
    assert json.loads(done.stdout) == made, "one rank speaks for all"


def test_every_rank_gets_the_same_certificate(run_copy):
    done = on_ranks(2, sys.executable, "-c", GATE.format(extra=""), run_copy, cwd=run_copy)
    assert done.returncode == 0, done.stderr
    made = dict(line.split() for line in done.stdout.splitlines())
    assert set(made) == {"0", "1"}
    assert made["0"] == made["1"] == sp.Certificate.read(sp.Run.open(run_copy)).sha256


def test_a_refusal_on_ranks_exits_3(run_copy):
    done = on_ranks(2, BIN / "sbiplat", "gate", run_copy, "--set", "information=50", cwd=run_copy)
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("REFUSED by information") == 1


def test_a_mistake_on_ranks_is_one_line(run_copy):
    done = on_ranks(2, BIN / "sbiplat", "gate", run_copy, "--set", "pair=3", cwd=run_copy)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "did you mean pairs" in done.stderr


@pytest.mark.parametrize(("error", "code"), [("RuntimeError('the disk of node 2 is gone')", 1), ("sp.UserError('node 2 has no key')", 2)])
def test_an_error_on_one_rank_ends_the_job_with_its_message(run_copy, error, code):
    extra = f"""
from sbiplat.posteriors.direct import DirectSampler
def broken(self, *a): raise {error}
if rank == 1:
    DirectSampler.sample = broken
"""
    before = (run_copy / "certificate.json").read_bytes()
    start = time.monotonic()
    done = on_ranks(3, sys.executable, "-c", GATE.format(extra=extra), run_copy, cwd=run_copy)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("node 2") == 1
    assert time.monotonic() - start < 60, "nobody waits for it"
    assert (run_copy / "certificate.json").read_bytes() == before


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_come_in_order_and_each_task_is_told_of(workers):
    done = []
    assert Spread(workers=workers).map(lambda k: k * k, 5, done.append) == [0, 1, 4, 9, 16]
    assert done == [0, 1, 2, 3, 4]


def test_an_error_in_a_worker_is_raised_here():
    def fail(k):
        if k == 3:
            raise UserError("task 3 cannot be done")
        return k

    with pytest.raises(UserError, match="task 3 cannot be done"):
        Spread(workers=2).map(fail, 5)


def test_a_killed_worker_is_one_line():
    with pytest.raises(UserError, match="a worker process was killed"):
        Spread(workers=2).map(lambda k: os._exit(9) if k == 1 else k, 4)


def test_workers_need_a_number_one_thread_and_the_cpu(run_copy, monkeypatch):
    with pytest.raises(SettingError, match="workers must be a whole number"):
        sp.gate(run_copy, workers=0, progress=silent)
    with pytest.raises(SettingError, match="processes on the cpu"):
        sp.gate(run_copy, workers=2, device="cuda", progress=silent)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    with pytest.raises(SettingError, match="one thread each, and this one has 4"):
        sp.gate(run_copy, workers=2, progress=silent)
