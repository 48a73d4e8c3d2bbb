"""The identity's file, peer ids and signatures."""

from __future__ import annotations

import stat

import pytest

from p2p.errors import IdentityUnusable
from p2p.identity import create_identity, load_or_create_identity, parse_peer, verify


def test_it_is_made_once_and_kept(tmp_path):
    path = tmp_path / "state" / "identity.key"
    first = load_or_create_identity(path)
    assert load_or_create_identity(path).peer == first.peer
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [each.name for each in path.parent.iterdir()] == ["identity.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_file_that_others_may_read_is_not_used(tmp_path, mode):
    path = tmp_path / "identity.key"
    load_or_create_identity(path)
    path.chmod(mode)
    with pytest.raises(IdentityUnusable, match="chmod 600"):
        load_or_create_identity(path)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_file_of_another_size_is_not_used(tmp_path, size):
    path = tmp_path / "identity.key"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(IdentityUnusable):
        load_or_create_identity(path)


def test_the_seed_is_not_shown():
    identity = create_identity()
    assert repr(identity.seed) not in repr(identity)
    assert identity.peer in repr(identity)


def test_signatures():
    one, other = create_identity(), create_identity()
    signature = one.sign(b"data")
    assert verify(one.peer, b"data", signature)
    assert not verify(one.peer, b"dat", signature)
    assert not verify(other.peer, b"data", signature)
    assert not verify(one.peer, b"data", signature[:-1])
    assert not verify(one.peer, b"data", b"")


@pytest.mark.parametrize(
    "peer",
    [
        "",
        "1",
        "0",
        "é",
        "x" * 10_000,
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        create_identity().peer + "1",
        create_identity().peer[:-1],
    ],
)
def test_what_is_no_peer_id(peer):
    assert not verify(peer, b"data", bytes(64))
    with pytest.raises(ValueError, match=r".*"):
        parse_peer(peer)
