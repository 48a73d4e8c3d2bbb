"""Attacks the reading of messages.

Invariant: `decode_message` raises nothing but `RemoteProtocolError`; a message that it gives can
be encoded and decoded again to its equal, and its body passed the limits of its outline.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

import p2p.wire.control_messages
import p2p.wire.directory_messages
import p2p.wire.pass_messages
import p2p.wire.replies
import p2p.wire.session_messages
import p2p.wire.training_messages  # noqa: F401
from fuzz.campaign import main
from p2p.errors import MessageTooLarge, RemoteProtocolError
from p2p.wire.frame import HEADER_BYTES
from p2p.wire.message import decode_message, encode_message
from p2p.wire.outline import check_outline


def check(data: bytes) -> None:
    try:
        decoded = decode_message(data)
    except RemoteProtocolError:
        check_walk_ends(data)
        return
    check_outline(data)
    body = encode_message(decoded)[HEADER_BYTES:]
    assert decode_message(body) == decoded, "a message did not survive its encoding"


def check_walk_ends(data: bytes) -> None:
    try:
        check_outline(data)
    except MessageTooLarge:
        return


if __name__ == "__main__":
    main(check, "fuzz_message")
