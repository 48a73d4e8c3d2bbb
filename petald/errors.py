"""What a daemon could not do, one class for each distinct reaction of the caller.

``code`` is stable and crosses the sockets; the text says what was expected, what came, and what to
do.
"""

from __future__ import annotations

import traceback
from typing import ClassVar, NoReturn


class PetaldError(Exception):
    """Anything that the daemon did not do."""

    code: ClassVar[str] = "petald_error"


class ConfigError(PetaldError):
    """The configuration cannot be used: correct it."""

    code = "config_error"


class SocketInUse(PetaldError):
    """The control socket's path is taken: stop who has it, or choose another."""

    code = "socket_in_use"


class UnknownModel(PetaldError):
    """No model of this name is here: name another, or pull it."""

    code = "unknown_model"


class MoveGivenUp(PetaldError):
    """A server is not to take other blocks after all."""

    code = "move_given_up"


class BadRequest(PetaldError):
    """A request contradicts itself or the protocol: correct it."""

    code = "bad_request"


class PromptTooLong(PetaldError):
    """The prompt leaves no room for an answer: shorten it."""

    code = "prompt_too_long"


class MissingBlocks(PetaldError):
    """No chain covers the model now: wait, or serve the blocks.

    Attributes:
        ranges: the half-open ranges of blocks that nobody usable holds; empty where the spans
            there are cannot be joined.
    """

    code = "missing_blocks"

    def __init__(self, text: str, *, ranges: tuple[tuple[int, int], ...]) -> None:
        super().__init__(text)
        self.ranges = ranges


class HopFailed(PetaldError):
    """A hop of a chain did not do its part: try another chain.

    Attributes:
        peer: the hop's.
        reason: a stable name for how it failed; a peer's own, where it said one.
    """

    code = "hop_failed"

    def __init__(self, text: str, *, peer: str, reason: str = "") -> None:
        super().__init__(text)
        self.peer = peer
        self.reason = reason


class NotFinite(PetaldError):
    """Several servers agree that a result is not finite: lower the learning rate, or the values."""

    code = "not_finite"


class UnknownForward(PetaldError):
    """The forward pass is not kept (any more): run it again."""

    code = "unknown_forward"


class SessionLost(PetaldError):
    """The session is closed: open another."""

    code = "session_lost"


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The plain errors in a group, and in the groups within it."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def raise_alone(group: BaseExceptionGroup[BaseException]) -> NoReturn:
    """Raises the one plain error of a group, for callers who know no groups.

    Cancellations give way to an error; of several errors the first is raised.
    """
    found = leaves(group)
    plain = [error for error in found if isinstance(error, Exception)]
    raise (plain or found)[0]


def forget_frames(error: BaseException | None) -> None:
    """Frees what the frames hold in which an error arose, and its causes; the error stays."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
