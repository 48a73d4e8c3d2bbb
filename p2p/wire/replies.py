"""Replies that any conversation may need."""

from __future__ import annotations

from dataclasses import dataclass

from p2p.wire.message import Message, Name, Seconds, Text, message


@message("ok")
@dataclass(frozen=True, kw_only=True, slots=True)
class Ok(Message):
    """It was done."""


@message("refusal")
@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal(Message):
    """It was understood and not done.

    Attributes:
        code: a stable name of the reason.
        text: one sentence for a person. Quoted, never trusted.
        retry_after_s: when it is worth asking again; 0 where that is not known.
    """

    code: Name
    text: Text = ""
    retry_after_s: Seconds = 0.0
