"""Everything that can go wrong between peers, one class for each distinct reaction of the caller.

Each class has a stable ``code``: what crosses a wire is the code and one sentence, never a
traceback.
"""

from __future__ import annotations

from typing import ClassVar


class P2PError(Exception):
    """Anything that the network, or a peer on it, did not do."""

    code: ClassVar[str] = "p2p_error"


class LocalProtocolError(P2PError):
    """This process tried to send or do what the protocol forbids: a bug here, not there."""

    code = "local_protocol_error"


class RemoteProtocolError(P2PError):
    """The other side sent what the protocol forbids. Drop the stream, hold it against the peer."""

    code = "remote_protocol_error"


class MessageTooLarge(RemoteProtocolError):
    """A frame, or a table inside it, is over its limit; found before anything was allocated."""

    code = "message_too_large"


class RecordRejected(RemoteProtocolError):
    """A record for the directory was not taken: forged, expired, stale or too large."""

    code = "record_rejected"


class TransportError(P2PError):
    """The bytes did not get there. Another try, or another peer, may do better."""

    code = "transport_error"


class PeerUnreachable(TransportError):
    """No connection to the peer could be made, at any of its known addresses."""

    code = "peer_unreachable"


class StreamBroken(TransportError):
    """An open stream ended before its conversation did."""

    code = "stream_broken"


class DeadlineExceeded(TransportError):
    """The peer did not answer within the time that the caller allowed."""

    code = "deadline_exceeded"


class AddressInUse(P2PError):
    """A listening address belongs to another process."""

    code = "address_in_use"


class Overloaded(P2PError):
    """The peer works, and has no room now.

    Attributes:
        retry_after_s: when the peer thinks that it is worth asking again.
    """

    code = "overloaded"

    def __init__(self, text: str, retry_after_s: float = 1.0) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class Refused(P2PError):
    """The peer understood, and said no, with a code and a sentence of its own.

    Attributes:
        remote_code: the peer's code. Compare it with known ones; it may be anything.
        remote_text: the peer's sentence. Quote it; it may say anything.
        retry_after_s: when the peer thinks it worth asking again; 0 where it does not say.
    """

    code = "refused"

    def __init__(
        self, peer: str, remote_code: str, remote_text: str, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(f"{peer} refused ({remote_code}): {remote_text!r}")
        self.peer = peer
        self.remote_code = remote_code
        self.remote_text = remote_text
        self.retry_after_s = retry_after_s


class IdentityUnusable(P2PError):
    """The file of the peer's private key cannot be used as it is."""

    code = "identity_unusable"
