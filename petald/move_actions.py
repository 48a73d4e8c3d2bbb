"""What the planner of moves wants done, what it is made with, and what it tells. Plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MakeClaim:
    """Announce a claim on a span, at once; answered with `MovePlanner.on_claimed` when it is out.

    If it could not be announced: `MovePlanner.on_move_failed`.
    """

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class WithdrawClaim:
    """Announce no claim any more, stay where you are, and throw away what was loaded, if any."""


@dataclass(frozen=True, slots=True)
class StartMove:
    """Load a span beside the one that is served; answered with `MovePlanner.on_loaded`.

    The claim stays announced. If it cannot be loaded: `MovePlanner.on_move_failed`.
    """

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class FinishMove:
    """Serve the span that was loaded, let the sessions of the old one move; and announce that.

    Answered with `MovePlanner.on_moved` when it is announced, without the claim.
    """

    start: int
    end: int


MoveAction = MakeClaim | WithdrawClaim | StartMove | FinishMove


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveSettings:
    """How a server weighs moves, and how long it waits for others to know of its own.

    Attributes:
        known_s: a claim that was announced so long ago is in every view that is read now: three
            announcements long, which is also when one expires (`petald.announcer`).
        likely_known_s: the same, but for one in twenty: an announcement is out at once, a lookup
            takes a second or two. Who trusts in it leaves two servers on each block, for the case
            that one's claim was not known.
        suppress_s: within this time most others see a new claim and give up theirs; the unit of
            the delays by chance before a claim.
        haste: so many times what is missing somewhere sets out to mend it, in an hour in which
            nothing gets better. That is a quarter of it in a second, and a claim is seen after two:
            so those that set out without knowing of the others are about half of what is needed.
        look_s: between a claim and the first look at whether another was before it, at most; and
            between two looks at whether the old blocks may be left.
        drain_s: the cost of any move of a server that has all its sessions, as time of the server:
            they move to others.
        young_s: when it has been in a place for so long, a server has all the sessions that it will
            get there; one that has just come has few, and it is the one that should move (on). In a
            swarm that has just started that is everybody.
        load_block_s: to load one block, of those that are new; also a cost.
        foresight_s: a gain is expected to last so long at least, from when it is seen first.
        min_gain: what the swarm must gain, in parts of what this server contributes; where it is
            less the gains of all together are not worth their moves.
        enough: where the least-served block has this part of what blocks have in the mean, only
            gaps are a reason to move. It is above what is hoped for under churn, so that there is
            something to lose until the next move; the last percents would cost most moves. What is
            lacking to it may be more in a sample, by the square root of how many there are.
        rest_s: after a move, until the next one that is not urgent: what others do about what it
            left behind is to be seen by then.
        failed_rest_s: after a move that failed, until the next one, urgent or not: while it claims
            blocks that it cannot load, others keep away from them.
        hourly: moves that are not urgent, in an hour, in the long run. It hardly matters where
            speeds are what servers say: it bounds what measurements that swing, and liars, can do.
        burst: of them may come in a row; a swarm that has just started needs more.
        patience_s: a claim that could not be carried out for so long is withdrawn.
    """

    known_s: float = 45.0
    likely_known_s: float = 10.0
    suppress_s: float = 3.0
    haste: float = 1000.0
    look_s: float = 10.0
    drain_s: float = 800.0
    young_s: float = 3600.0
    load_block_s: float = 5.0
    foresight_s: float = 900.0
    min_gain: float = 0.007
    enough: float = 0.99
    rest_s: float = 60.0
    failed_rest_s: float = 300.0
    hourly: float = 4.0
    burst: int = 4
    patience_s: float = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveCounts:
    """What a planner has gone through.

    Attributes:
        claims: that were made.
        withdrawn: claims that were withdrawn.
        moves: that were finished.
        urgent_moves: of those, the ones to blocks that nobody served.
        failed: moves that failed.
    """

    claims: int = 0
    withdrawn: int = 0
    moves: int = 0
    urgent_moves: int = 0
    failed: int = 0
