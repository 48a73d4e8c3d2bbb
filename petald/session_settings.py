"""What a session is made with, and what it tells of its life. Plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from petald.routing import Hop
from petald.session_actions import History


@dataclass(slots=True)
class Counts:
    """What a session has gone through."""

    moves: int = 0
    replayed_tokens: int = 0
    handed_over_tokens: int = 0
    probes: int = 0
    relinks: int = 0


class Replay(Enum):
    """How what a hop had cached is computed again elsewhere.

    Attributes:
        FAST: in the long pieces that are quickest, which differ in the last bits.
        EXACT: step by step, as it was computed first, to the same bits.
        AUTO: exact as soon as anything was sent in a codec that loses precision, which makes a
            whole step of a last bit; fast otherwise.
    """

    FAST = "fast"
    EXACT = "exact"
    AUTO = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionSettings:
    """What a session is made with.

    Attributes:
        num_blocks: of the model.
        max_tokens: the most that will be cached.
        max_wait_s: how long to wait where nobody can run some blocks.
        make_history: a new, empty history.
        replay: how what is lost is repeated; see `petald.session_flow`.
        prefers_hand_over: whether a cache of so many tokens comes sooner from the hop that leaves
            to its replacement than by replay.
    """

    num_blocks: int
    max_tokens: int
    make_history: Callable[[], History]
    max_wait_s: float = 0.0
    replay: Replay = Replay.FAST
    prefers_hand_over: Callable[[Hop, Hop, int], bool] = field(
        default=lambda old, new, tokens: False
    )
