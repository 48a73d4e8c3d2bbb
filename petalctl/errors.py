"""The errors that a command or a job ends with: a sentence for the user, a code for programs."""

from __future__ import annotations


class CommandError(Exception):
    """A command cannot do what was asked. The text says why, and what to do about it.

    Attributes:
        code: Stable, for programs.
        exit_status: What the process ends with.
    """

    def __init__(self, text: str, *, code: str = "command_error", exit_status: int = 1) -> None:
        super().__init__(text)
        self.code = code
        self.exit_status = exit_status


class DaemonUnreachable(CommandError):
    """No daemon answers on the socket. Start one, or name another socket."""

    def __init__(self, text: str, *, code: str = "daemon_unreachable") -> None:
        super().__init__(text, code=code, exit_status=3)


class ConnectionLost(DaemonUnreachable):
    """The daemon went away before the job ended; what it made until then is all there is."""

    def __init__(self, text: str) -> None:
        super().__init__(text, code="connection_lost")


class JobError(CommandError):
    """The daemon did not do the job, or not to its end.

    Attributes:
        code: Stable, the daemon's own: ``unknown_model``, ``missing_blocks``, ``cancelled``, ...
        text: What was expected, what came, what to do.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text, code=code)
        self.text = text
