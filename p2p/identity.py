"""A peer's identity: an Ed25519 key, and the peer id that is made of it.

The peer id of such a key holds the public key itself, so whoever knows a peer's name can check its
signatures. Source: the libp2p specification, peer-ids/peer-ids.md.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2p.errors import IdentityUnusable

KEY_BYTES = 32
MAX_PEER_CHARACTERS = 64

_PEER_ID_PREFIX = bytes.fromhex("002408011220")
"""Identity multihash of 36 bytes, which are a protobuf: key type 1 (Ed25519), 32 bytes of key."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key.

    Attributes:
        seed: its 32 bytes; never logged, never sent.
    """

    seed: bytes

    def __repr__(self) -> str:
        return f"Identity(peer={self.peer!r})"

    @property
    def peer(self) -> str:
        """The peer id, in base58."""
        return peer_of(self._key.public_key().public_bytes_raw())

    def sign(self, data: bytes) -> bytes:
        """A signature of 64 bytes."""
        return self._key.sign(data)

    @property
    def _key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seed)


def peer_of(public_key: bytes) -> str:
    """The peer id of an Ed25519 public key."""
    return base58.b58encode(_PEER_ID_PREFIX + public_key).decode("ascii")


def parse_peer(peer: str) -> bytes:
    """A peer id's bytes, if it is that of an Ed25519 key.

    Raises:
        ValueError: it is not.
    """
    raw = b"" if len(peer) > MAX_PEER_CHARACTERS else base58.b58decode(peer)
    if len(raw) != len(_PEER_ID_PREFIX) + KEY_BYTES or not raw.startswith(_PEER_ID_PREFIX):
        raise ValueError(f"{peer[:MAX_PEER_CHARACTERS]!r} is not the peer id of an Ed25519 key")
    return raw


def verify(peer: str, data: bytes, signature: bytes) -> bool:
    """Whether the key in a peer id made the signature; false for ids of other kinds of key."""
    try:
        _public_key(peer).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


@functools.lru_cache(maxsize=4096)
def _public_key(peer: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(parse_peer(peer)[len(_PEER_ID_PREFIX) :])


def create_identity() -> Identity:
    """A new identity, kept nowhere."""
    return Identity(os.urandom(KEY_BYTES))


def load_or_create_identity(path: Path) -> Identity:
    """Reads the identity's file; makes one, readable by its owner alone, where there is none.

    Raises:
        IdentityUnusable: the file is no key, or others can read it; says what to do.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        status = path.stat()
    except FileNotFoundError:
        _create(path)
        status = path.stat()
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise IdentityUnusable(
            f"others can read the private key in {path}; run: chmod 600 {path} "
            "(or delete it, to get a new identity)"
        )
    seed = path.read_bytes()
    if len(seed) != KEY_BYTES:
        raise IdentityUnusable(
            f"{path} holds {len(seed)} bytes, not a key of {KEY_BYTES}; "
            "delete it, to get a new identity"
        )
    return Identity(seed)


def _create(path: Path) -> None:
    """Writes a new key, whole or not at all; leaves one that another process wrote meanwhile."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            os.write(file, os.urandom(KEY_BYTES))
            os.fsync(file)
        finally:
            os.close(file)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()
