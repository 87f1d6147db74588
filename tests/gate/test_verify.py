"""An outsider's check: a certificate holds in another place, and fails after one byte of weights, bank or certificate is changed."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import sbiplat as sp
from sbiplat import cli, files
from sbiplat.bank.bank import Bank
from sbiplat.errors import Uncertified, UserError
from sbiplat.gate import schema, signature
from sbiplat.gate.certificate import Certificate, hashed
from sbiplat.gate.verify import sign, worst
from sbiplat.posteriors.of_run import from_run
from sbiplat.progress import silent

BIN = Path(sys.executable).parent


@pytest.fixture
def command(clone, monkeypatch, capsys):
    """A command in this process, in the clone's folder: (exit code, standard output, standard error)."""
    def run(*words):
        monkeypatch.chdir(clone)
        monkeypatch.setattr(sys, "argv", ["sbiplat", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


def outcomes(found):
    return {c.name: c.outcome for c in found.checks}


@pytest.fixture
def clone(line_run, line_bank, tmp_path):
    """Run and bank, copied as one would send them: nothing in their old place is asked."""
    shutil.copytree(line_run.path, tmp_path / "run")
    shutil.copytree(line_bank.path, tmp_path / "bank")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["bank"].update(path="/gone", relative_path="../bank")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    return tmp_path


def change(path, edit):
    """Edit a certificate and give it the hash of what it then says, as one would who means to deceive."""
    content = json.loads(path.read_text())
    edit(content)
    content["sha256"] = hashed(content)
    path.write_text(json.dumps(content))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def offset_in_bank(bank):
    """A segment, and where in it the first x stands."""
    path = sorted((bank / "segments").glob("*.h5"))[0]
    with h5py.File(path) as file:
        return path, file["x"].id.get_offset() + 3


# -------------------------------------------------------------------------------------------------- holds and fails


def test_a_copied_certificate_holds_in_another_place(clone):
    found = sp.verify(clone / "run", progress=silent)
    assert outcomes(found) == {"form": "holds", "sha256": "holds", "signature": "unchecked", "run": "holds", "diagnostics": "holds",
                               "bank": "holds", "code": "holds"}
    assert found.exit_code == 0


def test_a_certificate_alone_says_what_could_not_be_checked(clone, tmp_path):
    shutil.copy(clone / "run" / "certificate.json", tmp_path / "sent.json")
    found = sp.verify(tmp_path / "sent.json", progress=silent)
    assert {k for k, v in outcomes(found).items() if v == "unchecked"} == {"signature", "run", "bank"}
    assert found.exit_code == 0
    assert "unchecked: signature, run, bank" in found.text()
    found = sp.verify(tmp_path / "sent.json", bank=clone / "bank", progress=silent)
    assert outcomes(found)["bank"] == "holds"
    found = sp.verify(tmp_path / "sent.json", run=clone / "run", progress=silent)
    assert outcomes(found)["run"] == "holds"


def break_weights(clone):
    flip(clone / "run" / "weights.safetensors", -3)


def break_bank(clone):
    flip(*offset_in_bank(clone / "bank"))


def break_diagnostics(clone):
    flip(clone / "run" / "diagnostics.npz", 200)


def break_certificate(clone):
    path = clone / "run" / "certificate.json"
    path.write_bytes(path.read_bytes().replace(b'"gain": 1', b'"gain": 2'))


def break_json(clone):
    flip(clone / "run" / "certificate.json", 0)


def break_run(clone):
    path = clone / "run" / "run.json"
    path.write_text(path.read_text().replace('"learning_rate"', '"learning_rate_"', 1))


DAMAGES = [(break_weights, "run"), (break_bank, "bank"), (break_certificate, "sha256"), (break_diagnostics, "diagnostics"),
           (break_json, "form"), (break_run, "run")]


@pytest.mark.parametrize(("damage", "check"), DAMAGES)
def test_one_changed_byte_fails_and_is_named(clone, damage, check):
    before = {p: p.read_bytes() for p in clone.rglob("*") if p.is_file()}
    damage(clone)
    assert sum(p.read_bytes() != data for p, data in before.items()) == 1
    found = sp.verify(clone / "run", progress=silent)
    assert [c.name for c in found.failed] == [check]
    assert found.exit_code == 4


@pytest.mark.parametrize(("damage", "check"), DAMAGES[:3])
def test_the_command_in_a_process_of_its_own_exits_4_where_a_byte_was_changed(clone, damage, check):
    damage(clone)
    done = subprocess.run([BIN / "sbiplat", "certificate", "verify", "run", "--json"], capture_output=True, text=True, cwd=clone, timeout=120)
    assert done.returncode == 4, done.stderr
    told = json.loads(done.stdout)
    assert [c["name"] for c in told["checks"] if c["outcome"] == "fails"] == [check]
    assert told["holds"] is False
    assert "Traceback" not in done.stderr


def test_the_banks_own_hashes_are_not_believed(clone):
    """A changed row under its old hash: the digest of the stored hashes is as before, and that of the bytes is not."""
    said = json.loads((clone / "run" / "certificate.json").read_text())["digests"]["bank"]
    assert Bank.open(clone / "bank").digest == Bank.open(clone / "bank").digest_of_bytes() == said
    flip(*offset_in_bank(clone / "bank"))
    assert Bank.open(clone / "bank").digest == said
    assert Bank.open(clone / "bank").digest_of_bytes() != said


def test_a_certificate_that_names_another_simulator_than_the_bank_fails(clone):
    change(clone / "run" / "certificate.json", lambda c: c["simulator"].update(name="lime"))
    assert "names another simulator" in {c.name: c.statement for c in sp.verify(clone / "run", progress=silent).failed}["bank"]


def test_the_commands_tell_that_it_holds_and_show_it(command):
    code, said, _ = command("certificate", "verify", "run")
    assert code == 0
    assert "run/certificate.json: holds (unchecked: signature), and says: certified (standard)" in said
    code, said, _ = command("certificate", "show", "run")
    assert code == 0
    assert "coverage TARP" in said
    assert json.loads(command("certificate", "show", "run", "--json")[1])["level"] == "standard"
    assert json.loads(command("certificate", "schema")[1])["title"] == "CertificateForm"


@pytest.mark.parametrize(("words", "says"), [
    (["verify", "gone"], "no certificate at gone"), (["verify", "bank"], "has no certificate.json"),
    (["verify", "run", "--bank", "gone"], "no bank at gone"), (["verify", "run", "--run", "gone"], "no run at gone"),
    (["verify", "run", "--public-key", "gone"], "no key file at gone"), (["verify", "run", "--tolerance", "-1"], "tolerance must be"),
    (["sign", "run", "--key", "gone"], "no key file at gone"),
])
def test_a_users_mistake_is_one_line_and_exit_2(command, words, says):
    code, out, told = command("certificate", *words)
    assert code == 2, out + told
    assert says in told
    assert told.count("\n") == 1


def test_a_refusal_that_holds_is_no_certificate(clone):
    sp.gate(clone / "run", information=50.0, progress=silent)
    found = sp.verify(clone / "run", progress=silent)
    assert found.holds
    assert found.exit_code == 3
    assert "REFUSED by information" in found.text()


# ------------------------------------------------------------------------------------------------------------ again


def test_the_gate_run_again_from_the_seeds_finds_the_same_to_the_last_bit(clone):
    found = sp.verify(clone / "run", again=True, progress=silent)
    assert outcomes(found)["again"] == "holds"
    assert "to the last bit" in found.checks[-1].statement


def test_a_figure_that_was_made_up_is_found_by_running_again(clone):
    """Its author gave the certificate a right hash, so nothing else can see it."""
    change(clone / "run" / "certificate.json", lambda c: c["figures"]["information"].update(gain=c["figures"]["information"]["gain"] + 1e-6))
    assert sp.verify(clone / "run", progress=silent).holds
    found = sp.verify(clone / "run", again=True, progress=silent)
    assert [c.name for c in found.failed] == ["again"]
    assert "information.gain" in found.failed[0].statement
    assert sp.verify(clone / "run", again=True, tolerance=1e-3, progress=silent).holds


def test_on_another_machine_figures_may_differ_within_the_tolerance_and_no_more(clone):
    path = clone / "run" / "certificate.json"
    for shift, holds in ((1e-4, True), (0.1, False)):
        change(path, lambda c, by=shift: (c["machine"].update(processor="another"),
                                          c["figures"]["information"].update(gain=c["figures"]["information"]["gain"] + by)))
        assert sp.verify(clone / "run", again=True, progress=silent).holds == holds


def test_a_verdict_that_was_made_up_is_found_by_running_again(clone):
    sp.gate(clone / "run", information=50.0, progress=silent)

    def pardon(content):
        content["passed"] = True
        for criterion in content["criteria"]:
            criterion["passed"] = True

    change(clone / "run" / "certificate.json", pardon)
    assert sp.verify(clone / "run", progress=silent).exit_code == 0
    assert "decides otherwise on information" in sp.verify(clone / "run", again=True, progress=silent).failed[0].statement


def test_the_worst_difference_is_found():
    assert worst({"a": [1.0, 2.0], "b": {"c": 100.0}}, {"a": [1.0, 2.5], "b": {"c": 101.0}}) == ("a", 0.25)
    assert worst({"a": 1.0}, {"a": 1.0}) == ("a", 0.0)
    assert worst({"a": 1.0}, {"b": 1.0})[1] == worst({"a": [1]}, {"a": [1, 2]})[1] == worst({"a": True}, {"a": 1.5})[1] == np.inf


def test_other_code_is_said_and_voids_nothing(clone):
    change(clone / "run" / "certificate.json", lambda c: (c["digests"].update(code="0" * 64), c["versions"].update(torch="1.0")))
    found = sp.verify(clone / "run", progress=silent)
    assert outcomes(found)["code"] == "differs"
    assert found.exit_code == 0
    assert "the code of sbiplat has changed; torch 1.0 became" in sp.load(clone / "run").provenance["since_gate"]


def test_the_digest_of_the_code_is_of_every_source_file(monkeypatch, tmp_path):
    from sbiplat import source

    shutil.copytree(Path(source.__file__).parent, tmp_path / "sbiplat", ignore=shutil.ignore_patterns("__pycache__"))
    here = source.code_digest()
    monkeypatch.setattr(source, "__file__", str(tmp_path / "sbiplat" / "source.py"))
    assert source.code_digest.__wrapped__() == here
    flip(tmp_path / "sbiplat" / "diagnostics" / "coverage.py", 10)
    assert source.code_digest.__wrapped__() != here


# ------------------------------------------------------------------------------------------------------- signatures


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    pytest.importorskip("cryptography")
    place = tmp_path_factory.mktemp("keys")
    signature.keygen(place / "site.key")
    signature.keygen(place / "other.key")
    return place


def test_a_signed_certificate_names_its_key(clone, keys):
    plain = Certificate.of_file(clone / "run" / "certificate.json")
    certificate, by = sign(clone / "run", keys / "site.key")
    assert certificate.sha256 == plain.sha256, "a signature changes nothing of what it signs"
    found = sp.verify(clone / "run", public_key=keys / "site.key.pub", progress=silent)
    assert found.holds
    assert by in {c.name: c.statement for c in found.checks}["signature"]
    assert by.startswith("SHA256:")
    assert sp.load(clone / "run", public_key=keys / "site.key.pub").provenance["signed_by"] == by


def test_a_signature_of_another_key_or_none_fails_where_one_was_asked_for(clone, keys):
    assert "is not signed" in sp.verify(clone / "run", public_key=keys / "site.key.pub", progress=silent).failed[0].statement
    sign(clone / "run", keys / "other.key")
    assert "signed by another key" in sp.verify(clone / "run", public_key=keys / "site.key.pub", progress=silent).failed[0].statement
    with pytest.raises(Uncertified, match="signed by another key"):
        sp.load(clone / "run", public_key=keys / "site.key.pub")


def test_a_figure_changed_after_signing_fails_though_its_hash_is_right(clone, keys):
    sign(clone / "run", keys / "site.key")
    change(clone / "run" / "certificate.json", lambda c: c["figures"]["information"].update(gain=9.0))
    found = sp.verify(clone / "run", progress=silent)
    assert outcomes(found)["sha256"] == "holds"
    assert [c.name for c in found.failed] == ["signature"]


def test_a_signature_moved_to_another_certificate_fails(clone, keys):
    sign(clone / "run", keys / "site.key")
    stolen = json.loads((clone / "run" / "certificate.json").read_text())["signature"]
    sp.gate(clone / "run", seed=5, progress=silent)
    change(clone / "run" / "certificate.json", lambda c: c.update(signature=stolen))
    assert [c.name for c in sp.verify(clone / "run", progress=silent).failed] == ["signature"]


def test_the_gate_signs_and_the_commands_do(command, keys):
    assert command("gate", "run", "--n", 300, "--key", keys / "site.key")[0] == 0
    assert command("certificate", "verify", "run", "--public-key", keys / "site.key.pub")[0] == 0
    assert json.loads(command("certificate", "sign", "run", "--key", keys / "other.key", "--json")[1])["signed_by"].startswith("SHA256:")
    assert command("certificate", "verify", "run", "--public-key", keys / "site.key.pub")[0] == 4


def test_openssl_and_ssh_agree(clone, keys, tmp_path):
    """The documented form, checked by other programs: the message, the key and its fingerprint."""
    import base64

    certificate, by = sign(clone / "run", keys / "site.key")
    (tmp_path / "message").write_bytes(b"sbiplat certificate " + certificate.sha256.encode())
    (tmp_path / "signature").write_bytes(base64.b64decode(certificate.content["signature"]["signature"]))
    if shutil.which("openssl"):
        checked = subprocess.run(["openssl", "pkeyutl", "-verify", "-inkey", keys / "site.key", "-rawin", "-in", tmp_path / "message",
                                  "-sigfile", tmp_path / "signature"], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    if shutil.which("ssh-keygen"):
        assert by in subprocess.run(["ssh-keygen", "-lf", keys / "site.key.pub"], capture_output=True, text=True).stdout
    if not shutil.which("openssl") and not shutil.which("ssh-keygen"):
        pytest.skip("neither openssl nor ssh-keygen is here")


def test_a_key_is_its_owners_and_is_not_replaced(keys):
    assert stat.S_IMODE((keys / "site.key").stat().st_mode) == 0o600
    before = (keys / "site.key").read_bytes()
    with pytest.raises(UserError, match="there already"):
        signature.keygen(keys / "site.key")
    assert (keys / "site.key").read_bytes() == before


def test_keys_of_ssh_and_of_pem_are_read_with_passphrase_and_without(keys, tmp_path, monkeypatch):
    from cryptography.hazmat.primitives import serialization as s

    key = signature.read_private(keys / "site.key")
    public = signature.read_public(keys / "site.key.pub")
    (tmp_path / "ssh").write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption()))
    (tmp_path / "locked").write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"sesame")))
    (tmp_path / "pem.pub").write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    assert signature.read_public(tmp_path / "pem.pub") == public
    assert signature.signed({"sha256": "0"}, signature.read_private(tmp_path / "ssh"))["signature"]["public_key"] == public
    with pytest.raises(UserError, match="put its passphrase into SBIPLAT_KEY_PASSPHRASE"):
        signature.read_private(tmp_path / "locked")
    monkeypatch.setenv("SBIPLAT_KEY_PASSPHRASE", "wrong")
    with pytest.raises(UserError, match="is no key that can be read"):
        signature.read_private(tmp_path / "locked")
    with pytest.raises(UserError, match="has no passphrase"):
        signature.read_private(keys / "site.key")
    monkeypatch.setenv("SBIPLAT_KEY_PASSPHRASE", "sesame")
    assert signature.signed({"sha256": "0"}, signature.read_private(tmp_path / "locked"))["signature"]["public_key"] == public


@pytest.mark.parametrize("text", [
    b"", b"nonsense", b"\x00\xff" * 100, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
    b"ssh-ed25519 AAAA", b"ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQ==", b"A" * 10**6,
])
def test_a_damaged_or_odd_key_is_one_line(keys, tmp_path, text):
    (tmp_path / "key").write_bytes(text)
    for read in (signature.read_private, signature.read_public):
        with pytest.raises(signature.KeyFileError) as error:
            read(tmp_path / "key")
        assert "\n" not in str(error.value)


def test_keys_of_another_kind_and_in_the_wrong_place_are_one_line(keys, tmp_path):
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "ec").write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    (tmp_path / "ec.pub").write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(UserError, match="is no Ed25519 key"):
        signature.read_private(tmp_path / "ec")
    with pytest.raises(UserError, match="is no Ed25519 key"):
        signature.read_public(tmp_path / "ec.pub")
    with pytest.raises(UserError, match="must stay secret"):
        signature.read_public(keys / "site.key")
    with pytest.raises(UserError, match="holds no private key"):
        signature.read_private(keys / "site.key.pub")


@pytest.mark.parametrize("stored", [
    {"algorithm": "ed25519", "public_key": "ssh-ed25519 AAAA", "signature": "A" * 86 + "=="},
    {"algorithm": "ed25519", "public_key": "ssh-ed25519 " + "A" * 68, "signature": "A" * 86 + "=="},
])
def test_an_odd_signature_fails_in_one_line(clone, keys, stored):
    change(clone / "run" / "certificate.json", lambda c: c.update(signature=stored))
    found = sp.verify(clone / "run", progress=silent)
    assert [c.name for c in found.failed] == ["signature"]


# ------------------------------------------------------------------------------------------------------ the schema


def test_the_published_schema_is_the_one_that_is_held_against():
    path = Path(schema.__file__).with_name("schema.json")
    assert path.read_text() == schema.published(), "write sbiplat.gate.schema.published() into schema.json"


@pytest.mark.parametrize(("edit", "place"), [
    (lambda c: c.pop("level"), "level"), (lambda c: c.update(level="best"), "level"), (lambda c: c.update(more=1), "more"),
    (lambda c: c["criteria"][0].update(passed="yes"), "criteria.0.passed"), (lambda c: c["digests"].update(weights="short"), "digests.weights"),
    (lambda c: c["criteria"].clear(), "criteria"), (lambda c: c["valid_for"].update(observations=5), "valid_for.observations"),
    (lambda c: c.update(passed=False), "its verdict does not agree"), (lambda c: c["seeds"].update(gate=-1), "seeds.gate"), (lambda c: c.update(figures=[]), "figures"),
    (lambda c: c.update(signature={"algorithm": "rsa"}), "signature"), (lambda c: c.update(format_version=1), "certificate format 1"),
    (lambda c: c.update(format_version=[[[]]] * 1000), "certificate format"), (lambda c: c.update(created="today"), "created"),
])
def test_what_is_not_of_the_published_form_is_one_line_that_names_the_place(clone, edit, place):
    change(clone / "run" / "certificate.json", edit)
    with pytest.raises(Uncertified, match=place) as error:
        sp.load(clone / "run")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"format_version": 2, "figures": ' + "[" * 900 + "]" * 900 + "}", '{"x": ' + "9" * 5000 + "}"])
def test_hostile_json_is_one_line(clone, text):
    (clone / "run" / "certificate.json").write_text(text)
    with pytest.raises(Uncertified) as error:
        sp.load(clone / "run")
    assert "\n" not in str(error.value)
    assert sp.verify(clone / "run", progress=silent).exit_code == 4


def test_a_name_given_twice_is_refused(tmp_path):
    """Python would read the last and another program perhaps the first: {"passed": false, "passed": true}."""
    (tmp_path / "c.json").write_text('{"passed": false, "passed": true}')
    with pytest.raises(Uncertified, match="has 'passed' twice"):
        Certificate.of_file(tmp_path / "c.json")


def test_the_canonical_form_is_the_documented_one():
    value = {"b": [1, 2.0, 1e-05, 0.1, 1e16, 123456789.125, True, None], "a": {"µ": "x\n\u2028", "A": -0.0}}
    assert files.canonical(value) == (b'{"a":{"A":-0.0,"\\u00b5":"x\\n\\u2028"},"b":[1,2.0,1e-05,0.1,1e+16,123456789.125,true,null]}')


# ----------------------------------------------------------------------------------------------------------- levels


def test_a_draft_that_passes_opens_no_door(clone, command):
    (clone / "run" / "certificate.json").unlink()
    draft = sp.gate(clone / "run", level="draft", progress=silent)
    assert draft.passed
    assert draft.figures["pairs"] == 200
    assert not draft.certifies
    with pytest.raises(Uncertified, match=r"has passed a draft only \(200 pairs\).*for the standard level"):
        sp.load(clone / "run")
    assert sp.load(clone / "run", allow_uncertified=True).provenance["certified"] == "no"
    assert sp.verify(clone / "run", progress=silent).exit_code == 4
    code, said, _ = command("gate", "run", "--level", "draft")
    assert code == 0
    assert "passed as a draft, which certifies nothing" in said
    assert command("gate", "run")[0] == 0
    assert sp.load(clone / "run").provenance["level"] == "standard"


def test_a_draft_replaces_no_certificate_that_holds(clone):
    before = [(clone / "run" / name).read_bytes() for name in ("certificate.json", "diagnostics.npz")]
    assert sp.gate(clone / "run", level="draft", progress=silent).level == "draft"
    assert [(clone / "run" / name).read_bytes() for name in ("certificate.json", "diagnostics.npz")] == before
    change(clone / "run" / "certificate.json", lambda c: c["digests"].update(weights="0" * 64))
    sp.gate(clone / "run", level="draft", progress=silent)
    assert Certificate.of_file(clone / "run" / "certificate.json").level == "draft", "one that does not hold is replaced"


def test_a_publication_wants_its_pairs(clone):
    """The bank has 600 held-out rows: they certify at the standard level and not for a publication."""
    before = (clone / "run" / "certificate.json").read_bytes()
    with pytest.raises(UserError, match=r"level publication needs 5000 held-out pairs, and .* has 600: nothing was done"):
        sp.gate(clone / "run", level="publication", progress=silent)
    assert (clone / "run" / "certificate.json").read_bytes() == before
    own = sp.gate(clone / "run", level="publication", least_pairs=300, n=300, progress=silent)
    assert own.passed
    assert "least_pairs = 300 (usually 5000)" in own.own_thresholds


def test_an_unknown_level_is_one_line(clone):
    with pytest.raises(UserError, match="level = 'best': expected one of draft, standard, publication"):
        sp.gate(clone / "run", level="best", progress=silent)


# --------------------------------------------------------------------------------------------------------- validity


def test_what_is_changed_after_the_gate_is_said(line_bank, tmp_path):
    """Another prior, or several observations: the certificate is not theirs, and their draws say so."""
    run = sp.train(line_bank, "nle", out=tmp_path / "run", progress=silent, flow="gaussian", max_epochs=1, batch_size=256)
    posterior = from_run(run, certified="yes", certificate="0" * 64)
    other = posterior.with_prior(sp.Prior({"slope": sp.Normal(1.0, 1.0), "offset": sp.Normal(0.0, 1.0)}))
    assert (other.provenance["certified"], other.provenance["certificate"]) == ("no", None)
    assert "prior was changed" in other.provenance["refusal"]
    assert posterior.iid(3).provenance["certified"] == "no"


def test_what_it_is_valid_for_is_in_it(clone):
    content = json.loads((clone / "run" / "certificate.json").read_text())
    assert content["valid_for"] == {"observations": 1, "parameters": ["slope", "offset"], "device": "cpu"}
    assert content["counts"] == {"bank_rows": 6000, "held_out_rows": 600, "left_out_rows": 0}


def test_another_device_is_said(clone):
    change(clone / "run" / "certificate.json", lambda c: c["valid_for"].update(device="cuda"))
    assert sp.load(clone / "run").provenance["since_gate"] == "the gate was on cuda, this is on cpu"
