"""A conversation's turns, and what the lines that begin with a slash do to them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from p2p.wire.control_messages import Turn

HELP = (
    "/reset forgets the conversation; /system TEXT tells the model something beforehand, and "
    "forgets; /retry asks the last question again; /quit leaves. "
    "A line that begins with // is sent with one slash."
)


@dataclass(frozen=True, slots=True)
class Ask:
    """The model is to answer these turns."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Say:
    """The user is to be told something."""

    text: str


@dataclass(frozen=True, slots=True)
class Leave:
    """The conversation is over."""


Action = Ask | Say | Leave


class Conversation:
    """The turns so far. Invariant: after the system's turn, user and assistant alternate."""

    def __init__(self, system: str | None = None) -> None:
        self._system = system or ""
        self._turns: list[Turn] = []

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns, the system's first."""
        before = (Turn(role="system", content=self._system),) if self._system else ()
        return (*before, *self._turns)

    def on_line(self, line: str) -> Action | None:
        """What a line of the user's calls for; none for an empty one."""
        text = line.strip()
        if not text:
            return None
        if text.startswith("/") and not text.startswith("//"):
            command, _, rest = text.partition(" ")
            return self._on_command(command, rest.strip())
        return self._ask(text[1:] if text.startswith("//") else text)

    def on_answer(self, text: str) -> None:
        """Takes the answer, or as much of it as was made before it was stopped."""
        self._turns.append(Turn(role="assistant", content=text))

    def on_failure(self) -> None:
        """Takes back the turn that got no answer."""
        self._turns.pop()

    def _ask(self, text: str) -> Ask:
        self._turns.append(Turn(role="user", content=text))
        return Ask(self.turns)

    def _on_command(self, command: str, rest: str) -> Action:
        if command in ("/quit", "/exit", "/bye"):
            return Leave()
        if command == "/help":
            return Say(HELP)
        if command == "/reset":
            self._turns.clear()
            return Say("(the conversation is forgotten)")
        if command == "/system":
            self._system = rest
            self._turns.clear()
            return Say("(the model will be told so)" if rest else "(the model is told nothing now)")
        if command == "/retry":
            if len(self._turns) < 2:
                return Say("(there is no question to ask again)")
            question = self._turns[-2].content
            del self._turns[-2:]
            return self._ask(question)
        return Say(f"{command} is no command; /help tells which there are")
