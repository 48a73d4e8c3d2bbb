"""The state of a session at one hop, and what it does with each step that arrives.

Pure: it decides; `petald.server` moves the bytes and runs the kernels. Steps carry numbers and are
idempotent: a repeated step is answered from the kept output, a stale one is passed over. Numbers
may be left out, since a hop may join late, and steps may be lost with a hop before it; that none
is missing shows in the positions, because a client begins again where all hops agree.
Invariant: `length` tokens are cached, by steps that were all done.
"""

from __future__ import annotations

from dataclasses import dataclass

from petald.errors import BadRequest


@dataclass(frozen=True, slots=True)
class RunStep:
    """Cut the cache back to a position, then run the step."""

    truncate_to: int


@dataclass(frozen=True, slots=True)
class RepeatOutput:
    """The step was done before, and was the last one: send its output again."""


@dataclass(frozen=True, slots=True)
class PassOver:
    """The step is older than the last one done; whoever sent it has its answer already."""


Decision = RunStep | RepeatOutput | PassOver


class HopSession:
    """One session at one hop.

    Args:
        max_tokens: promised room in the KV cache.
        max_step_tokens: the longest step that this server takes.
    """

    def __init__(self, *, max_tokens: int, max_step_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.max_step_tokens = max_step_tokens
        self.length = 0
        self._last_number: int | None = None

    def on_step(self, *, number: int, position: int, tokens: int) -> Decision:
        """Decides what becomes of a step.

        Args:
            number: the step's.
            position: of its first token.
            tokens: how many rows it has.

        Raises:
            BadRequest: the step does not fit what is cached, or what was promised.
        """
        last = self._last_number
        if last is not None and number <= last:
            return RepeatOutput() if number == last else PassOver()
        if not 1 <= tokens <= self.max_step_tokens:
            raise BadRequest(
                f"a step of {tokens} tokens came; this server takes 1 to {self.max_step_tokens}"
            )
        if position > self.length:
            raise BadRequest(
                f"a step at position {position} came, but only {self.length} tokens are cached"
            )
        if position + tokens > self.max_tokens:
            raise BadRequest(
                f"a step up to position {position + tokens} came; "
                f"the session was opened for {self.max_tokens} tokens"
            )
        return RunStep(truncate_to=position)

    def on_done(self, *, number: int, position: int, tokens: int) -> None:
        """A step that `on_step` let through has run, and its tokens are cached."""
        self._last_number = number
        self.length = position + tokens

    def on_handed_over(self, tokens: int) -> None:
        """So many tokens came from another hop's cache."""
        self.length = tokens

    def on_new_previous(self) -> None:
        """Another hop will push: what the one before counted does not bind it."""
        self._last_number = None

    def on_truncated(self, length: int) -> None:
        """The cache was cut back, for a step that then failed."""
        self.length = min(self.length, length)
