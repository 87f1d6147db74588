r"""A site's signature of a certificate: Ed25519 (RFC 8032) over the line

.. math:: \texttt{sbiplat certificate } \Vert \text{ sha256}

of ASCII, where `sha256` is the certificate's own, which all else in it decides. The words in front keep a key that signs other things from
signing a certificate unawares. Needs `cryptography`, the extra `sign`.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbiplat import files
from sbiplat.errors import SettingError, Uncertified, UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PREFIX = b"sbiplat certificate "
PASSPHRASE = "SBIPLAT_KEY_PASSPHRASE"
MOST_BYTES = 2**16


class KeyFileError(UserError):
    """A key file that is missing, damaged, of another kind, or locked by a passphrase."""


class Forged(Uncertified):
    """A signature that is not that of its key over this certificate, or not of the key that was asked for."""


def signed(content: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """A certificate's content with the signature of this key."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    value = base64.b64encode(key.sign(_message(content))).decode()
    return {**content, "signature": {"algorithm": "ed25519", "public_key": public, "signature": value}}


def check(content: Mapping[str, Any]) -> str:
    """The fingerprint of the key that signed; raises Forged where the signature is not that key's."""
    _require()
    from cryptography.exceptions import InvalidSignature

    stored = content["signature"]
    try:
        _ssh_public(stored["public_key"].encode()).verify(base64.b64decode(stored["signature"], validate=True), _message(content))
    except (InvalidSignature, ValueError, KeyFileError):
        raise Forged("the signature is not that of its key over this certificate") from None
    return fingerprint(stored["public_key"])


def require(content: Mapping[str, Any], public: str) -> str:
    """The fingerprint of this public key, which signed; raises Forged where it did not."""
    if not content.get("signature"):
        raise Forged(f"the certificate is not signed, and the key {fingerprint(public)} was asked for")
    made = check(content)
    if content["signature"]["public_key"] != public:
        raise Forged(f"the certificate is signed by another key: {made}, not {fingerprint(public)}")
    return made


def fingerprint(public: str) -> str:
    """As `ssh-keygen -l` names a key: SHA256 and the base64 of the hash of its bytes."""
    blob = base64.b64decode(public.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def read_private(path: str | Path) -> Ed25519PrivateKey:
    """An Ed25519 private key from a PEM or OpenSSH file; a passphrase comes from the environment. Raises KeyFileError."""
    _require()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    data, phrase = _read(path), os.environ.get(PASSPHRASE)
    openssh = b"BEGIN OPENSSH PRIVATE KEY" in data
    if b"PRIVATE KEY" not in data:
        raise KeyFileError(f"{path} holds no private key; make one with `sbiplat certificate keygen --out FILE`")
    try:
        key = (load_ssh_private_key if openssh else load_pem_private_key)(data, phrase.encode() if phrase else None)
    except TypeError as error:
        if phrase:  # a key without a passphrase, and one in the environment for another
            raise KeyFileError(f"{path} has no passphrase, but {PASSPHRASE} is set; unset it") from None
        raise KeyFileError(f"{path} cannot be opened: {str(error).splitlines()[0]}; put its passphrase into {PASSPHRASE}") from None
    except (ValueError, UnsupportedAlgorithm, UnicodeDecodeError) as error:
        locked = " (it is locked by a passphrase, which " + (f"{PASSPHRASE} may not hold)" if phrase else f"{PASSPHRASE} must hold)")
        why = (str(error) or "it is damaged").splitlines()[0]
        raise KeyFileError(f"{path} is no key that can be read: {why}{locked if 'assw' in why or 'ENCRYPTED' in str(data[:64]) else ''}"
                           ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path} is no Ed25519 key; make one with `sbiplat certificate keygen --out FILE`")
    return key


def read_public(path: str | Path) -> str:
    """An Ed25519 public key, from an OpenSSH or PEM file, as OpenSSH writes it (without a comment). Raises KeyFileError."""
    _require()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise KeyFileError(f"{path} holds a private key, which must stay secret; give the public one ({path}.pub?)")
    if b"BEGIN PUBLIC KEY" not in data:
        return _openssh(_ssh_public(data, f"{path} is no Ed25519 public key, in OpenSSH's form or PEM"))
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path} is no key that can be read: {(str(error) or 'it is damaged').splitlines()[0]}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"{path} is no Ed25519 key")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def keygen(path: str | Path) -> str:
    """Make a key: `path` in PEM (PKCS 8), which its owner alone may read, and `path`.pub as OpenSSH writes it. The fingerprint."""
    _require()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path = Path(path)
    public_path = path.with_name(path.name + ".pub")
    for place in (path, public_path):
        if place.exists():
            raise KeyFileError(f"{place} is there already, and a key is not replaced; choose another name")
    key = Ed25519PrivateKey.generate()
    with files.disk_errors(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = _openssh(key.public_key())
    files.write_text(public_path, public + "\n")
    return fingerprint(public)


def _message(content: Mapping[str, Any]) -> bytes:
    return PREFIX + str(content["sha256"]).encode()


def _openssh(key: Ed25519PublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _ssh_public(data: bytes, why: str = "no key") -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        key = load_ssh_public_key(data.strip())
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFileError(why) from None
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(why)
    return key


def _read(path: str | Path) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(MOST_BYTES)
    except FileNotFoundError:
        raise KeyFileError(f"no key file at {path}; make one with `sbiplat certificate keygen --out {path}`") from None
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read: {error.strerror or error}") from None


def _require() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise SettingError("signatures need the package cryptography; pip install 'sbiplat[sign]'") from None
