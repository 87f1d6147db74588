"""Damage: whatever happens to a bank's files, the answer is a BankError in one line, and never wrong rows or run code."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sbiplat as sp
from sbiplat.bank import care, segment
from sbiplat.bank.bank import Bank
from sbiplat.bank.fill import simulate
from sbiplat.errors import BankError
from sbiplat.progress import silent


@sp.simulator(prior=sp.Prior({"a": sp.Uniform(0, 1), "b": sp.Normal(0, 1)}), x_shape=(8,), batched=True, name="damaged")
def model(theta, rng):
    return theta[:, :1] + rng.standard_normal((len(theta), 8))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    out = tmp_path_factory.mktemp("sound") / "b"
    for n in (512, 1024):
        made = simulate(model, n, 1, out, workers=1, block_size=128, progress=silent)
    return made


@pytest.fixture
def bank(sound, tmp_path):
    """A copy of the bank, without the index that remembers where its data lay."""
    shutil.copytree(sound.path, tmp_path / "b")
    (tmp_path / "b" / "bank.h5").unlink()
    return tmp_path / "b"


def first_segment(bank):
    return min((bank / "segments").iterdir())


def told(path, use=lambda bank: bank.digest):
    """The one line of the BankError that opening or using the bank raises."""
    with pytest.raises(BankError) as error:
        use(Bank.open(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def replace_dataset(path, name, **made):
    with h5py.File(path, "r+") as file:
        data = file[name][()]
        del file[name]
        file.create_dataset(name, **{"data": data, **made})


def relink(path, name, link):
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = link


# --------------------------------------------------------------------------------------------------------- segments


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_data_is_found_by_verify(share, bit, bank):
    opened = Bank.open(bank)
    part = opened._opened[0]
    widths = {"theta": 16, "x": 32, "status": 1}
    name = ["theta", "x", "status"][int(share * 3)]
    at = part.offsets[name] + int(share * len(part.segment) * widths[name])
    content = bytearray(part.segment.path.read_bytes())
    content[at] ^= 1 << bit
    part.segment.path.write_bytes(content)
    problems = Bank.open(bank).verify()
    content[at] ^= 1 << bit
    part.segment.path.write_bytes(content)
    assert len(problems) == 1
    assert "do not match their SHA-256" in str(problems[0])
    assert not Bank.open(bank).verify()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_garbling_of_a_segment_is_an_error_or_a_problem_or_harmless(data, sound, bank):
    path = first_segment(bank)
    content = path.read_bytes()
    garbled = bytearray(content)
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        garbled[at] = data.draw(st.integers(0, 255))
    path.write_bytes(garbled)
    line = ""
    try:
        opened = Bank.open(bank)
        harmless = not opened.verify()
        if harmless:
            assert np.array_equal(opened.read(0, 1024)["x"], sound.read(0, 1024)["x"])
        opened.info()
    except BankError as error:
        line = str(error)
    finally:
        path.write_bytes(content)
    assert "\n" not in line


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_segment_is_refused_by_name(share, bank):
    path = first_segment(bank)
    os.truncate(path, int(path.stat().st_size * share))
    assert path.name in told(bank)


def test_a_segment_cut_short_after_opening_is_refused(bank):
    opened = Bank.open(bank)
    os.truncate(first_segment(bank), 3000)
    with pytest.raises(BankError, match="is cut short"):
        opened.read(0, 1024)


def test_a_missing_segment_is_told_with_the_command_that_fills_it(bank):
    first_segment(bank).unlink()
    assert "lacks 512 of its 1024 rows (first rows 0 to 511); run the same `sbiplat simulate damaged" in told(bank)


def test_a_renamed_segment_is_refused(bank):
    first_segment(bank).rename(bank / "segments" / "000000002048-000000002560.h5")
    assert "it was renamed" in told(bank)


def test_a_segment_of_another_bank_is_refused(bank, tmp_path):
    other = simulate(model, 512, 2, tmp_path / "other", workers=1, block_size=128, progress=silent)
    shutil.copy(first_segment(other.path), first_segment(bank))
    assert "belongs to another bank" in told(bank)


def test_files_that_are_no_segments_are_left_alone(bank, sound):
    for name in ("notes.txt", ".tmp-000000000000-000000000512.h5-77", "000000000000-000000000512.h5.bak",
                 "000000000512-000000000512.h5"):
        (bank / "segments" / name).write_text("x")
    assert Bank.open(bank).digest == sound.digest


SECRET = np.arange(512.0 * 8).reshape(512, 8).astype("f4")


@pytest.mark.parametrize("link", ["external", "soft", "virtual", "raw"])
def test_data_that_lie_elsewhere_are_not_followed(link, bank, tmp_path):
    path, secret = first_segment(bank), tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = SECRET
    (tmp_path / "raw").write_bytes(SECRET.tobytes())
    if link == "virtual":
        layout = h5py.VirtualLayout((512, 8), "f4")
        layout[:] = h5py.VirtualSource(str(secret), "x", (512, 8), "f4")
        with h5py.File(path, "r+") as file:
            del file["x"]
            file.create_virtual_dataset("x", layout)
    elif link == "raw":
        replace_dataset(path, "x", data=None, shape=(512, 8), dtype="f4", external=[(str(tmp_path / "raw"), 0, SECRET.nbytes)])
    else:
        relink(path, "x", h5py.ExternalLink(str(secret), "/x") if link == "external" else h5py.SoftLink("/theta"))
    message = told(bank)
    assert "has no x of its own" in message or "is not stored in one piece" in message


@pytest.mark.parametrize(("name", "made", "why"), [
    ("x", dict(data=None, shape=(10**9, 8), dtype="f4"), r"x is float32 (1000000000, 8), expected float32 (512, 8)"),
    ("x", dict(chunks=(64, 8)), "not stored in one piece"), ("x", dict(dtype="f8"), "x is float64 (512, 8), expected float32"),
    ("theta", dict(dtype=">f8"), "theta is >f8"), ("status", dict(dtype="i1"), "status is int8"),
    ("block_sha256", dict(data=np.zeros((3, 32), "u1")), "block_sha256 is uint8 (3, 32)"),
    ("x", dict(data=None, shape=(512, 8), dtype="f4"), "not stored in one piece"), ("x", dict(data=b"text"), "x is object ()"),
])
def test_a_dataset_of_another_form_is_refused_with_both_forms(name, made, why, bank):
    replace_dataset(first_segment(bank), name, **made)
    assert why in told(bank)


@pytest.mark.parametrize("shape", [(10**15,), (2**40, 2**20), (512, 10**12)])
def test_a_gigantic_declared_shape_allocates_nothing(shape, bank):
    with h5py.File(first_segment(bank), "r+") as file:
        del file["x"]
        file.create_dataset("x", shape, "f4")
    assert "x is float32" in told(bank)


def test_groups_that_hold_themselves_do_not_hang(bank, sound):
    with h5py.File(first_segment(bank), "r+") as file:
        file["loop"] = file["/"]
        file["failures"] = file["/"]
    assert Bank.open(bank).digest == sound.digest
    assert not care.survey(bank).problems
    assert Bank.open(bank).info()["rows"] == 1024


@pytest.mark.parametrize(("attribute", "value"),
                         [("bank_uid", [1, 2]), ("first_row", "a"), ("first_row", [1, 2]), ("first_row", np.inf)])
def test_attributes_of_another_type_are_refused(attribute, value, bank):
    with h5py.File(first_segment(bank), "r+") as file:
        file.attrs[attribute] = value
    assert "segments" in told(bank)


def test_bad_messages_and_times_cost_nothing_but_themselves(bank, sound):
    path = first_segment(bank)
    with h5py.File(path, "r+") as file:
        del file["seconds"]
        file["seconds"] = h5py.SoftLink("/nowhere")
        file["failures"] = np.zeros(3)
    opened = Bank.open(bank)
    assert opened.info()["first_failures"] == []
    assert opened.digest == sound.digest


# ------------------------------------------------------------------------------------------------------------ header


def edit(change):
    def write(path):
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return write


GARBAGE = {
    "empty": lambda p: p.write_text(""), "binary": lambda p: p.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda p: p.write_text("[1]"),
    "deep": lambda p: p.write_text("[" * 100_000), "deep in the prior": lambda p: p.write_text(p.read_text().replace(
        '"independent": [', '"independent": [' + "[" * 900 + "]" * 900 + ",", 1)),
        "a directory": lambda p: (p.unlink(), p.mkdir()),
    "another version": edit(lambda v: v.update(format_version=2)), "no version": edit(lambda v: v.pop("format_version")),
    "rows as text": edit(lambda v: v.update(rows="many")), "no rows": edit(lambda v: v.update(rows=0)),
    "huge rows": edit(lambda v: v.update(rows=2**70)), "negative seed": edit(lambda v: v.update(seed=-1)),
    "true blocks": edit(lambda v: v.update(block_size=True)), "no prior": edit(lambda v: v.pop("prior")),
    "prior of nothing": edit(lambda v: v["prior"].update(independent=[])),
    "prior of numbers": edit(lambda v: v.update(prior=3)),
    "simulator as list": edit(lambda v: v.update(simulator=[])), "x as text": edit(lambda v: v.update(x="x")),
    "x of nothing": edit(lambda v: v["x"].update(shapes={})),
    "huge x": edit(lambda v: v["x"].update(shapes={"x": [10**12, 10**12]})),
    "another x": edit(lambda v: v["x"].update(shapes={"x": [9]})), "versions as list": edit(lambda v: v.update(versions=[])),
    "another seed": edit(lambda v: v.update(seed=2)),
    "a huge number": edit(lambda v: v["prior"]["independent"][0].update(low=10**400)),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_garbled_header_is_one_line(kind, bank):
    GARBAGE[kind](bank / "bank.json")
    message = told(bank)
    assert str(bank) in message


def test_rows_beyond_all_segments_are_missing_rows(bank):
    edit(lambda v: v.update(rows=2**60))(bank / "bank.json")
    opened = Bank.open(bank)
    assert opened.present == 1024
    assert "lacks" in told(bank)


# ------------------------------------------------------------------------------------------------------ a packed bank


@pytest.fixture
def packed(sound, tmp_path):
    return sound.pack(tmp_path / "p.h5")


@pytest.mark.parametrize("content", [b"", b"text", b"\x89HDF\r\n\x1a\n" + bytes(200)])
def test_a_file_that_is_no_packed_bank_is_one_line(content, tmp_path):
    (tmp_path / "p.h5").write_bytes(content)
    assert "is not a packed bank" in told(tmp_path / "p.h5")


@pytest.mark.parametrize("header", [b"[1]", b"3", b"{", b"[" * 60_000, b"\xff\xfe", "text", 7.0, [1.0, 2.0]])
def test_a_packed_header_of_garbage_is_one_line(header, packed):
    replace_dataset(packed, "header", data=np.bytes_(header) if isinstance(header, bytes) else header)
    assert "p.h5" in told(packed)


def test_a_packed_header_elsewhere_is_not_followed(packed, tmp_path):
    shutil.copy(packed, tmp_path / "q.h5")
    relink(packed, "header", h5py.ExternalLink(str(tmp_path / "q.h5"), "/header"))
    assert "is not a packed bank" in told(packed)


def test_a_flipped_byte_in_a_packed_bank_is_found(packed):
    opened = Bank.open(packed)
    with Path(packed).open("r+b") as file:
        file.seek(opened._opened[0].offsets["x"] + 1000)
        file.write(b"\x55\xaa")
    assert "do not match their SHA-256" in str(Bank.open(packed).verify()[0])


def test_a_damaged_segment_is_mended_as_the_message_says(bank, sound):
    path = first_segment(bank)
    path.write_bytes(path.read_bytes()[:700])
    assert f"`sbiplat bank verify {bank} --repair`" in told(bank)
    mended, problems = care.repair(bank, model, workers=1, progress=silent)
    assert mended.digest == sound.digest
    assert str(problems[0]).startswith(str(path))


# ------------------------------------------------------------------------------------------------------------ repair


def flip(path, share=0.5):
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 0x10
    path.write_bytes(data)


WOUNDS = {
    "flipped": flip, "cut": lambda p: p.write_bytes(p.read_bytes()[:-9000]), "emptied": lambda p: p.write_bytes(b""),
    "gone": Path.unlink, "renamed": lambda p: p.rename(p.with_name(p.name.replace("000512", "000384"))),
    "a link to nowhere": lambda p: (p.unlink(), p.symlink_to("/nowhere")), "a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("wound", WOUNDS)
@pytest.mark.parametrize("indexed", [True, False])
def test_repair_gives_the_same_bank(wound, indexed, sound, tmp_path):
    shutil.copytree(sound.path, tmp_path / "b")
    if not indexed:
        (tmp_path / "b" / "bank.h5").unlink()
    WOUNDS[wound](first_segment(tmp_path / "b"))
    assert care.survey(tmp_path / "b").problems
    mended, problems = care.repair(tmp_path / "b", model, workers=1, progress=silent)
    assert problems
    assert mended.digest == sound.digest
    assert not care.survey(tmp_path / "b").problems


def test_survey_finds_every_problem_at_once(sound, tmp_path):
    shutil.copytree(sound.path, tmp_path / "b")
    for k, path in enumerate(sorted((tmp_path / "b" / "segments").glob("0*.h5"))):
        (flip, lambda p: p.write_bytes(b"text"))[k](path)
    found = care.survey(tmp_path / "b")
    assert len(found.bad) == 2
    assert {str(p).rpartition(": ")[2] for p in found.problems} >= {"rows 0 to 1023 are missing"}


def test_segments_that_contradict_each_other_are_told_and_mended(sound, tmp_path):
    """Two files hold the same rows, each with hashes that fit: one is not what the simulator makes."""
    shutil.copytree(sound.path, tmp_path / "b")
    folder = tmp_path / "b" / "segments"
    data = sound.read(0, 128)
    data["theta"][3, 0] += 1e-9
    rows = segment.Rows(0, data["theta"], {"x": data["x"]}, data["status"], np.zeros(128, np.float32))
    segment.commit(folder, sound.header, rows)
    assert "rows 0 to 127 differ from those in" in str(care.survey(tmp_path / "b").problems[0])
    assert care.repair(tmp_path / "b", model, workers=1, progress=silent)[0].digest == sound.digest


def test_repair_tells_when_the_simulator_makes_other_rows_now(sound, tmp_path):
    shutil.copytree(sound.path, tmp_path / "b")
    first_segment(tmp_path / "b").unlink()
    moved = dataclasses.replace(model, function=lambda theta, rng: model.function(theta, rng) + 1e-3)
    object.__setattr__(moved, "source_digest", model.source_digest)
    with pytest.raises(BankError, match="came out otherwise"):
        care.repair(tmp_path / "b", moved, workers=1, progress=silent)


@pytest.mark.parametrize("workers", [(1, 3), (3, 1)])
def test_repair_tells_it_however_the_rows_were_cut_and_however_often_it_is_asked(workers, tmp_path, monkeypatch):
    shift = [0.0]

    def shifted(theta, rng):
        return theta[0] + shift[0] + rng.standard_normal(8)

    made = sp.simulator(prior=model.prior, x_shape=(8,), name="shifted")(shifted)
    monkeypatch.setattr(sp.Simulator, "source_digest", lambda self: "0" * 64)
    bank = simulate(made, 64, 1, tmp_path / "b", workers=workers[0], progress=silent)
    first_segment(bank.path).unlink()
    shift[0] = 1.0
    for _ in range(2):
        with pytest.raises(BankError, match="came out otherwise"):
            care.repair(bank.path, made, workers=workers[1], progress=silent)
    (bank.path / "bank.h5.before-repair").unlink()
    assert care.repair(bank.path, made, workers=1, progress=silent)[0].complete


def test_a_packed_bank_is_neither_mended_nor_compacted_and_says_so(sound, tmp_path):
    packed = sound.pack(tmp_path / "b.h5")
    for does in (care.compact, care.repair):
        with pytest.raises(BankError, match="packed bank"):
            does(packed)


def test_a_segment_that_was_compacted_away_is_one_line(tmp_path):
    for n in (128, 256):
        bank = simulate(model, n, 1, tmp_path / "b", workers=1, block_size=128, progress=silent)
    care.compact(tmp_path / "b")
    with pytest.raises(BankError, match="has gone since the bank was opened"):
        bank.read(0, 200)


def test_repair_never_runs_code_that_the_bank_names(sound, tmp_path):
    shutil.copytree(sound.path, tmp_path / "b")
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    header = json.loads((tmp_path / "b" / "bank.json").read_text())
    header["simulator"].update(name=f"{tmp_path / 'trap.py'}:x", spec=f"{tmp_path / 'trap.py'}:x")
    (tmp_path / "b" / "bank.json").write_text(json.dumps(header))
    with pytest.raises(sp.UserError, match="--simulator"):
        care.repair(tmp_path / "b", progress=silent)
    assert not (tmp_path / "sprung").exists()


# ----------------------------------------------------------------------------------------------------------- compact


@pytest.mark.parametrize("simulator", ["batched", "scalar"])
def test_compact_merges_and_keeps_the_bank(simulator, tmp_path, monkeypatch):
    def rowwise(theta, rng):
        if theta[0] < 0.1:
            raise ValueError("low")
        return theta[0] + rng.standard_normal(8)

    made = model if simulator == "batched" else sp.simulator(prior=model.prior, x_shape=(8,), name="rowwise")(rowwise)
    for n in (100, 130, 333, 700, 1000):
        bank = simulate(made, n, 1, tmp_path / "b", workers=1, block_size=64, progress=silent)
    before = bank.info()
    monkeypatch.setattr(care, "default_rows_per_segment", lambda header: 512)
    after = care.compact(tmp_path / "b").info()
    assert before["segments"] > 3
    assert after["segments"] <= 3
    assert {k: after[k] for k in ("digest", "status", "first_failures")} == {k: before[k] for k in ("digest", "status", "first_failures")}
    assert after["simulation_seconds"] == pytest.approx(before["simulation_seconds"])
    assert not care.survey(tmp_path / "b").problems


def test_a_compact_that_is_killed_loses_nothing(tmp_path, monkeypatch):
    for n in (128, 256, 384, 512):
        bank = simulate(model, n, 1, tmp_path / "b", workers=1, block_size=128, progress=silent)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            care.compact(tmp_path / "b")
    assert Bank.open(tmp_path / "b").digest == bank.digest
    assert care.compact(tmp_path / "b").digest == bank.digest
    assert len(Bank.open(tmp_path / "b").segments) == 1


def test_compact_does_not_launder_damage(sound, tmp_path):
    shutil.copytree(sound.path, tmp_path / "b")
    flip(first_segment(tmp_path / "b"), 0.6)
    with pytest.raises(BankError, match="SHA-256"):
        care.compact(tmp_path / "b")


def test_a_renamed_segment_is_told_and_set_aside(tmp_path):
    bank = sp.simulate("two_moons", 512, 1, tmp_path / "b", workers=1, progress=silent)
    segment = next((tmp_path / "b" / "segments").iterdir())
    segment.rename(segment.with_name("foo.h5"))
    (segment.parent / ".nfs0001").write_bytes(b"a file system's own")
    wrong = [str(p) for p in care.survey(tmp_path / "b").problems]
    assert any("foo.h5" in line and "renamed" in line for line in wrong)
    assert any("rows 0 to 511 are missing" in line for line in wrong)
    assert not any(".nfs" in line for line in wrong)
    assert care.repair(tmp_path / "b", progress=silent)[0].digest == bank.digest
    assert not care.survey(tmp_path / "b").problems


@pytest.mark.parametrize("words", [["bank", "plot", "b", "--out", "no/a.png"], ["bank", "pack", "b", "--out", "no/a.h5"]])
def test_a_file_in_a_folder_that_is_not_there_is_one_line(words, tmp_path):
    sp.simulate("two_moons", 64, 1, tmp_path / "b", workers=1, progress=silent)
    result = subprocess.run([sys.executable, "-m", "sbiplat", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "there is no folder no" in result.stderr
    assert len(result.stderr.splitlines()) == 1
