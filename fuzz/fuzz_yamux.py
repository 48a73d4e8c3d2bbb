"""Attacks the reading of a connection's frames.

Invariant: however the bytes are cut, `YamuxSession` gives the same data in the same events or the
same `RemoteProtocolError`; it raises nothing else, opens no more streams than it allows, and takes
no more of any stream than that stream's window.

The first byte says how the rest is cut.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from fuzz.campaign import main
from p2p.errors import RemoteProtocolError
from p2p.yamux import WINDOW_BYTES, DataReceived, Event, YamuxSession

MAX_STREAMS = 4


def check(data: bytes) -> None:
    stride = data[0] % 32 + 1 if data else 1
    stream = data[1:]
    whole, whole_failed, _ = run(stream, max(len(stream), 1))
    parts, parts_failed, session = run(stream, stride)
    assert whole_failed == parts_failed
    if not whole_failed:
        assert joined(whole) == joined(parts)
    received = Counter()
    for event in parts:
        if isinstance(event, DataReceived):
            received[event.stream] += len(event.data)
    assert all(size <= WINDOW_BYTES for size in received.values())
    assert session.streams <= MAX_STREAMS


def run(stream: bytes, stride: int) -> tuple[list[Event], bool, YamuxSession]:
    """The events of a stream that arrives in pieces, and whether it broke the protocol."""
    session = YamuxSession(is_client=True, max_inbound_streams=MAX_STREAMS)
    events: list[Event] = []
    try:
        for start in range(0, len(stream), stride):
            events += session.on_bytes(stream[start : start + stride])
    except RemoteProtocolError:
        return events, True, session
    return events, False, session


def joined(events: list[Event]) -> list[Event]:
    """The events, neighbouring pieces of one stream's data made one."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if (
            isinstance(event, DataReceived)
            and isinstance(last, DataReceived)
            and last.stream == event.stream
        ):
            result[-1] = DataReceived(event.stream, last.data + event.data)
        else:
            result.append(event)
    return result


if __name__ == "__main__":
    main(check, "fuzz_yamux")
