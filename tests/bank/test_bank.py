"""Banks: their content is a function of the header; they resume, extend, pack, and refuse what is not theirs."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from farm_simulators import PRIOR, batchwise, rowwise

import sbiplat as sp
from sbiplat.bank import bank as bank_room
from sbiplat.bank import index, segment
from sbiplat.bank.bank import Bank
from sbiplat.bank.fill import simulate
from sbiplat.bank.layout import STATUS, Header, pieces
from sbiplat.errors import BankError, SettingError, SimulatorError
from sbiplat.progress import Progress, silent


def fill(simulator, n, out, seed=1, **settings):
    return simulate(simulator, n, seed, out, **{"workers": 1, "progress": silent, **settings})


def named(function, name="rowwise", **settings):
    return sp.simulator(**{"prior": PRIOR, "x_shape": (2,), "name": name, **settings})(function)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Several segments: it was extended twice."""
    out = tmp_path_factory.mktemp("bank") / "b"
    for n in (100, 150, 333):
        made = fill(rowwise, n, out)
    return made


def test_a_row_is_a_function_of_seed_block_and_row(bank):
    block, row = divmod(200, bank.header.block_size)
    rng = np.random.default_rng(np.random.SeedSequence(1, spawn_key=(block, row)))
    np.testing.assert_array_equal(bank.theta[200], PRIOR.sample_each([rng])[0])


def test_a_block_of_a_batched_bank_is_a_function_of_seed_and_block(tmp_path):
    made = fill(batchwise, 700, tmp_path / "b", block_size=256)
    rng = np.random.default_rng(np.random.SeedSequence(1, spawn_key=(1,)))
    theta = PRIOR.sample(rng, 256)
    np.testing.assert_array_equal(made.theta[256:512], theta)
    np.testing.assert_array_equal(made.x[256:512], batchwise(theta, rng).astype(np.float32))


@pytest.mark.parametrize("simulator", [rowwise, batchwise], ids=["scalar", "batched"])
@pytest.mark.parametrize("settings", [{}, {"block_size": 37}], ids=["default blocks", "blocks of 37"])
def test_an_extended_bank_is_the_one_made_in_one_go(simulator, settings, tmp_path):
    whole = fill(simulator, 1100, tmp_path / "whole", **settings)
    for n in (1, 40, 700, 1100):
        grown = fill(simulator, n, tmp_path / "grown", **settings)
    assert grown.digest == whole.digest
    assert not grown.verify()
    assert grown.first(700).digest == fill(simulator, 700, tmp_path / "part", **settings).digest


def test_the_digest_tells_every_bit(bank, tmp_path):
    others = {fill(rowwise, 333, tmp_path / "seed", seed=2).digest, fill(rowwise, 333, tmp_path / "size", block_size=10).digest,
              bank.first(332).digest, bank.digest}
    assert len(others) == 4


def test_failed_rows_are_kept_with_their_status_and_message(bank):
    counts = bank.status_counts()
    assert counts["raised"] == pytest.approx(33, abs=25)
    assert counts["non-finite"] == pytest.approx(30, abs=25)
    assert sum(counts.values()) == bank.rows
    failed = bank.status == STATUS["raised"]
    assert np.isnan(bank.x["trace"][failed]).all()
    assert np.isfinite(bank.x["trace"][bank.status == STATUS["ok"]]).all()
    assert bank.info()["first_failures"] == [
        {"row": int(np.flatnonzero(failed)[0]), "message": "ValueError: unlucky row", "rows_alike": int(failed.sum())}]


def test_a_batched_simulator_that_raises_marks_its_block(tmp_path):
    def sometimes(theta, rng):
        if rng.random() < 0.5:
            raise SystemExit("enough")
        return theta

    made = fill(named(sometimes, batched=True), 64, tmp_path / "b", block_size=8, checked=False)
    by_block = made.status.reshape(8, 8)
    assert set(by_block.min(1)) == set(by_block.max(1)) == {STATUS["ok"], STATUS["raised"]}


@pytest.mark.parametrize("rows", [slice(0, 1), slice(99, 101), slice(140, 333), slice(0, 333), slice(64, 64)])
def test_read_gives_just_the_rows(bank, rows):
    got = bank.read(rows.start, rows.stop)
    np.testing.assert_array_equal(got["theta"], bank.theta[rows])
    np.testing.assert_array_equal(got["x/trace"], bank.x["trace"][rows])


def test_at_gives_rows_in_the_order_asked(bank):
    rows = np.array([332, 0, 100, 99, 0, 151])
    np.testing.assert_array_equal(bank.at(rows)["x/count"], bank.x["count"][rows])
    assert len(bank.at(np.zeros(0, np.int64))["theta"]) == 0
    with pytest.raises(IndexError):
        bank.at(np.array([333]))


def test_reading_touches_only_the_segments_of_its_rows(bank, monkeypatch):
    touched = []
    real = Bank._slab_into
    monkeypatch.setattr(Bank, "_slab_into", lambda self, part, *rest: touched.append(part) or real(self, part, *rest))
    bank.read(130, 140)
    assert [(part.segment.first, part.segment.stop) for part in touched] == [(128, 150)]


def test_pieces_cut_at_block_boundaries():
    assert pieces(5, 23, 10) == [(5, 10), (10, 20), (20, 23)]
    assert pieces(10, 20, 10) == [(10, 20)]


# ----------------------------------------------------------------------------------------------------- one file for all


def test_the_index_is_the_bank_for_plain_h5py_from_anywhere(bank, tmp_path):
    code = "import h5py, sys; f = h5py.File(sys.argv[1]); print(*(f[k][:].tobytes().hex() for k in ('theta', 'x/trace')))"
    out = subprocess.run([sys.executable, "-c", code, bank.path / "bank.h5"], check=True, capture_output=True, text=True,
                         cwd=tmp_path).stdout.split()
    assert out == [bank.theta.tobytes().hex(), bank.x["trace"].tobytes().hex()]


def test_a_packed_bank_is_the_same_bank_in_one_file(bank, tmp_path):
    packed = Bank.open(bank.pack(tmp_path / "p.h5"))
    assert packed.digest == bank.digest
    assert not packed.verify()
    assert packed.status_counts() == bank.status_counts()
    np.testing.assert_array_equal(packed.read(10, 300)["x/count"], bank.read(10, 300)["x/count"])
    with h5py.File(tmp_path / "p.h5") as file:
        np.testing.assert_array_equal(file["theta"][:], bank.theta)


def test_a_packed_batched_bank_that_ends_inside_a_block_is_the_same(tmp_path):
    made = fill(batchwise, 300, tmp_path / "b", block_size=128)
    packed = Bank.open(made.pack(tmp_path / "p.h5"))
    assert packed.digest == made.digest
    assert not packed.verify()


def test_a_packed_bank_cannot_be_extended_and_says_so(bank, tmp_path):
    path = bank.pack(tmp_path / "p.h5")
    with pytest.raises(BankError, match="is a file, and a bank grows in a directory"):
        fill(rowwise, 400, path)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("change", "why"), [
    (dict(seed=2), r"another seed: 1, not 2; use --seed 1"),
    (dict(block_size=10), "another block size: 64, not 10; use --block-size 64"),
    (dict(simulator=named(lambda theta, rng: theta, name="else")), "another simulator: 'rowwise', not 'else'"),
    (dict(simulator=named(lambda theta, rng: theta)), "the simulator's code has changed"),
    (dict(simulator=named(rowwise.function, prior={"a": sp.Uniform(0, 2), "b": PRIOR.law.marginals[1]})),
     "the prior has changed"),
    (dict(simulator=named(rowwise.function, x_shape={"trace": (4,), "count": ()})), "the shape of x has changed"),
    (dict(simulator=named(rowwise.function, batched=True, x_shape={"trace": (3,), "count": ()}, dtype="float64")),
     "form has changed"),
])
def test_rows_of_another_header_are_refused_with_the_mend(change, why, bank):
    before = bank.digest
    with pytest.raises(BankError, match=why):
        fill(**{"simulator": rowwise, "n": 400, "out": bank.path, "checked": False, **change})
    assert Bank.open(bank.path).digest == before


@pytest.mark.parametrize(("settings", "why"), [
    (dict(n=0), "n must be a whole number of at least 1"), (dict(n=2.5), "got 2.5"), (dict(n=True), "got True"),
    (dict(seed=-1), "seed must be"),
    (dict(workers=0), "workers must be"), (dict(block_size=0), "block_size must be"),
])
def test_a_setting_that_cannot_be_is_refused(settings, why, tmp_path):
    with pytest.raises(SettingError, match=why):
        fill(**{"simulator": rowwise, "n": 10, "out": tmp_path / "b", **settings})


def test_a_smaller_n_keeps_the_larger_bank_and_says_so(bank):
    lines = []

    class Told(Progress):
        def say(self, line):
            lines.append(line)

    assert fill(rowwise, 50, bank.path, progress=Told()).rows == 333
    assert lines == [f"{bank.path} has 333 rows already; all are kept (--n 50 asks for fewer)"]


@pytest.mark.parametrize("broken", [named(lambda theta, rng: theta[:1]), "no_such_simulator"], ids=["breach", "unknown"])
def test_a_bank_that_never_began_leaves_nothing(broken, tmp_path):
    with pytest.raises(SimulatorError):
        fill(broken, 10, tmp_path / "deep" / "b")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(BankError, match="holds other files and is no bank"):
        fill(rowwise, 10, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(sp.UserError, match="cannot be written"):
        fill(rowwise, 10, tmp_path / "file" / "b")


def test_what_is_no_bank_says_how_to_make_one(tmp_path):
    with pytest.raises(BankError, match=r"no bank at .*; make one with `sbiplat simulate"):
        Bank.open(tmp_path / "nowhere")
    with pytest.raises(BankError, match=r"no bank.json \(is this a bank\?\)"):
        Bank.open(tmp_path)


def test_an_incomplete_bank_opens_and_says_what_is_missing(bank, tmp_path):
    fill(rowwise, 200, tmp_path / "b")
    fill(rowwise, 333, tmp_path / "b")
    for path in (tmp_path / "b" / "segments").iterdir():
        if int(path.name[:12]) >= 200:
            path.unlink()
    half = Bank.open(tmp_path / "b")
    assert (half.complete, half.present, half.gaps) == (False, 200, [(200, 333)])
    assert half.info()["digest"] is None
    with pytest.raises(BankError,
                       match=r"lacks 133 of its 333 rows .*; run the same `sbiplat simulate rowwise --n 333 --seed 1"):
        half.digest  # noqa: B018
    assert [str(p) for p in half.verify()] == [f"{tmp_path / 'b'}: rows 200 to 332 are missing"]
    assert fill(rowwise, 333, tmp_path / "b").digest == bank.digest


def test_segments_that_overlap_are_read_once(bank, tmp_path):
    made = fill(rowwise, 333, tmp_path / "b")
    part = made.read(64, 128)
    rows = segment.Rows(64, part["theta"], {k: part[f"x/{k}"] for k in ("trace", "count")}, part["status"],
                        np.zeros(64, np.float32))
    segment.commit(tmp_path / "b" / "segments", made.header, rows)
    assert Bank.open(tmp_path / "b").digest == bank.digest


# -------------------------------------------------------------------------------------------------------- the index


def test_the_index_spares_opening_the_segments(bank, monkeypatch):
    monkeypatch.setattr(segment, "inspect", lambda *_: pytest.fail("a segment was opened"))
    assert Bank.open(bank.path).digest == bank.digest


def garble(path, name):
    with h5py.File(path, "r+") as file:
        values = file[f"segments/{name}"][()]
        del file[f"segments/{name}"]
        if name == "offsets":
            file[f"segments/{name}"] = np.full_like(values, 2**60)
        elif name == "block_sha256":
            file[f"segments/{name}"] = values[:1]
        elif name == "stop":
            file[f"segments/{name}"] = np.full_like(values, 2**62)
        elif name == "bytes":
            file[f"segments/{name}"] = h5py.ExternalLink("nowhere.h5", "/x")


@pytest.mark.parametrize("how", ["offsets", "block_sha256", "stop", "bytes", "first", "empty", "text", "gone", "stale"])
def test_a_bad_index_is_ignored(how, bank, tmp_path):
    old = fill(rowwise, 333, tmp_path / "b", block_size=16).path / "bank.h5"
    fill(rowwise, 100, tmp_path / "c")
    path = fill(rowwise, 333, tmp_path / "c").path / "bank.h5"
    if how in ("empty", "text"):
        path.write_bytes(b"" if how == "empty" else b"\x89HDF\r\n\x1a\n" + b"garbage" * 99)
    elif how == "gone":
        path.unlink()
    elif how == "stale":
        path.write_bytes(old.read_bytes())
    else:
        garble(path, how)
    again = Bank.open(tmp_path / "c")
    assert again.digest == bank.digest
    assert not again.verify()


def test_cover_names_gaps_and_never_a_row_twice():
    def opened(first, stop):
        return segment.Opened(segment.Segment(Path(), first, stop), {}, np.zeros((0, 32), np.uint8))

    parts, gaps = index.cover([opened(0, 10), opened(5, 8), opened(6, 20), opened(30, 40), opened(90, 99)], 50)
    assert [(a, b) for _, a, b in parts] == [(0, 10), (10, 20), (30, 40)]
    assert gaps == [(20, 30), (40, 50)]


def test_the_header_comes_back_from_json(bank):
    header = Header.from_json(json.loads((bank.path / "bank.json").read_text()), bank.path)
    assert header == bank.header
    assert header.uid == bank.header.uid


def test_kinds_of_failure_stay_few_whatever_is_raised():
    kinds = bank_room.FailureKinds()
    kinds.add({7: "ValueError: a = 0.25 is low", 3: "ValueError: a = -1e-3 is low", 9: "KeyError: rare"})
    assert kinds.first() == [{"row": 3, "message": "ValueError: a = -1e-3 is low", "rows_alike": 2}, {"row": 9, "message": "KeyError: rare", "rows_alike": 1}]
    kinds.add({row: f"E: {'x' * row}" for row in range(10, 2 * bank_room.MOST_KINDS)})
    assert len(kinds._kinds) <= bank_room.MOST_KINDS + 1
