"""What is known of an answer in the making; the same for both clients, and without a socket."""

from __future__ import annotations

from p2p.wire.control_messages import ChainHop, Generated, GenerateDone, Progress
from petalctl.connection import Answer
from petalctl.errors import CommandError, JobError

Event = Progress | Generated | GenerateDone


class GenerationState:
    """An answer so far.

    Attributes:
        text: the answer so far.
        tokens: the ids of the new tokens so far.
        chain: the hops that it crosses, as far as they are known.
        done: the job's result, once it is there.
        failure: what ended the job instead.
    """

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.chain: tuple[ChainHop, ...] = ()
        self.done: GenerateDone | None = None
        self.failure: CommandError | None = None

    @property
    def is_running(self) -> bool:
        """Whether more may come."""
        return self.done is None and self.failure is None

    def close(self) -> None:
        """Takes nothing more."""
        if self.is_running:
            self.failure = JobError("cancelled", "this generation was closed")

    def take(self, answer: Answer) -> Event:
        """Takes the job's next answer, and gives it back as an event.

        Raises:
            JobError: it is no answer to `Generate`.
        """
        if isinstance(answer, Generated):
            self.text += answer.text
            self.tokens += answer.tokens
        elif isinstance(answer, GenerateDone):
            self.done = answer
            self.text = answer.text
            self.tokens = list(answer.tokens)
            self.chain = answer.chain
        elif isinstance(answer, Progress):
            self.chain = answer.chain or self.chain
        else:
            raise JobError("remote_protocol_error", "the daemon's answer is of another kind")
        return answer
