"""`sbiplat certificate ...`: show a certificate, check it as an outsider, sign it, and make keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sbiplat.cli.output import CertificatePath, Embedding, Json, Signals, say, show
from sbiplat.launch import launched_rank

certificate_app = typer.Typer(name="certificate", help="Show a certificate, check it as an outsider, sign it, or make a key.")


def verdict_lines(certificate: Any) -> list[str]:
    """Every criterion with its verdict, what was not tested, and the conclusion."""
    lines = [f"{'passed ' if c.passed else 'REFUSED'}  {c.name:24} {c.statement}" + (f"; {c.mend}" if c.mend else "")
             for c in certificate.criteria]
    for k, finding in enumerate(certificate.content["diagnosis"], 1):
        lines.append(f"finding {k}: {finding['defect']}; {finding['mend']}" + (f"\n    {finding['command']}" if finding["command"] else ""))
    if certificate.content["not_tested"]:
        lines.append(f"not tested: {', '.join(certificate.content['not_tested'])}")
    return [*lines, f"{certificate.run_path}: {certificate.verdict}; certificate {certificate.sha256}"]


@certificate_app.command("show", epilog="Example: sbiplat certificate show moons.run")
def show_certificate(path: CertificatePath, as_json: Json = False) -> None:
    """What a certificate says; nothing is checked but its form."""
    from sbiplat.gate.certificate import Certificate
    from sbiplat.gate.verify import file_of

    certificate = Certificate.of_file(file_of(path))
    content = certificate.content
    about = {
        "level": content["level"], "created": f"{content['created']}, in {content['cost']['seconds']:g} s on "
        f"{content['cost']['processes']} x {content['machine']['processor']}",
        "simulator": content["simulator"].get("name"), "estimator": content["estimator"],
        **({"chain": certificate.chain} if certificate.chain else {}),
        "parameters": ", ".join(content["valid_for"]["parameters"]), "thresholds": certificate.own_thresholds or "those of the level",
        "signed by": content["signature"]["public_key"] if content.get("signature") else "nobody",
        **{f"{k} rows": v for k, v in ((k.removesuffix("_rows").replace("_", " "), v) for k, v in content["counts"].items())},
        **{f"seed of {k}": v for k, v in content["seeds"].items()}, **{f"digest of {k}": v for k, v in content["digests"].items()},
        **{f"version of {k}": v for k, v in content["versions"].items()},
    }
    show(as_json, dict(content), "\n".join([*(f"{k:24} {v}" for k, v in about.items()), *verdict_lines(certificate)]))


@certificate_app.command("verify", epilog="Example: sbiplat certificate verify certificate.json --run moons.run --bank moons.bank")
def verify_certificate(
    path: CertificatePath,
    run: Annotated[Path | None, typer.Option(help="The run, where the certificate does not lie in it.")] = None,
    bank: Annotated[Path | None, typer.Option(help="The bank, where it has been moved.")] = None,
    public_key: Annotated[Path | None, typer.Option(help="File of the public key that must have signed it.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Run the gate again from the seeds, and compare.")] = False,
    tolerance: Annotated[float | None, typer.Option(help="Of figures, with --again; by default 0 on the same machine and code, else 0.01.")
                         ] = None,
    workers: Annotated[int, typer.Option(help="Local processes, with --again.")] = 1,
    embedding: Embedding = None,
    simulator: Signals = None,
    as_json: Json = False,
) -> None:
    """Check all that is at hand, byte by byte; exit 0 holds and certified, 3 holds and refused, 4 does not hold or only a draft."""
    from sbiplat.gate.verify import verify

    found = verify(path, run=run, bank=bank, public_key=public_key, again=again, tolerance=tolerance, simulator=simulator,
                   embedding=embedding, workers=workers)
    if launched_rank() == 0:
        show(as_json, found.to_json(), found.text())
    if found.exit_code:
        raise typer.Exit(found.exit_code)


@certificate_app.command("sign", epilog="Example: sbiplat certificate sign moons.run --key site.key")
def sign_certificate(
    path: CertificatePath,
    key: Annotated[Path, typer.Option(help="File of an Ed25519 private key, PEM or OpenSSH.")],
    as_json: Json = False,
) -> None:
    """Sign a certificate with a site's key; a signature that stood there is replaced."""
    from sbiplat.gate.verify import sign

    certificate, by = sign(path, key)
    show(as_json, {"path": str(path), "sha256": certificate.sha256, "signed_by": by},
         f"{path}: signed by {by}; certificate {certificate.sha256}")


@certificate_app.command("keygen", epilog="Example: sbiplat certificate keygen --out site.key")
def keygen_certificate(
    out: Annotated[Path, typer.Option(help="The private key's file; the public one is beside it, with .pub.")], as_json: Json = False,
) -> None:
    """Make an Ed25519 key: a private file that only you may read, and a public one to give away."""
    from sbiplat.gate.signature import keygen

    made = keygen(out)
    show(as_json, {"key": str(out), "public_key": f"{out}.pub", "fingerprint": made},
         f"{out}, to keep secret, and {out}.pub, to publish: {made}")


@certificate_app.command("schema", epilog="Example: sbiplat certificate schema")
def schema_certificate() -> None:
    """Print the JSON Schema of certificate.json."""
    from importlib.resources import files

    say((files("sbiplat.gate") / "schema.json").read_text(encoding="utf-8").rstrip())
