"""What the clients can be asked for, as messages."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypedDict

from p2p.wire.control_messages import Generate, Sampling, Turn
from petalctl.errors import JobError

DEFAULT_MAX_NEW_TOKENS = 256


class GenerateOptions(TypedDict, total=False):
    """The keywords of `Client.generate` and `AsyncClient.generate`.

    Attributes:
        turns: a conversation instead of a prompt: `Turn` objects, or maps of role and content.
        prompt_tokens: token ids instead of a prompt.
        model: a name that the daemon routes for; needed where it routes for several.
        max_new_tokens: the most tokens to make.
        temperature: 0, the default, takes the likeliest token each time.
        top_k: choose among so many of the likeliest tokens; 0 among all.
        top_p: choose among the likeliest that make up this share of the probability.
        min_p: leave out what is less probable than this share of the likeliest.
        repetition_penalty: over 1 makes tokens that stand there already less likely.
        seed: the same one gives the same answer.
        stop: texts before which the answer ends.
        session: a name under which this connection keeps the caches, so that the next job with it
            prefills only what is new.
        max_session_tokens: room for a kept session; 0 lets the daemon choose.
        max_wait_s: how long to wait where no server can run some blocks; none lets the daemon's
            configuration say.
        adapter: a folder on this machine with an adapter in PEFT's format, which the daemon can
            read, or the name of one that servers host.
    """

    turns: Sequence[Turn | Mapping[str, str]]
    prompt_tokens: Sequence[int]
    model: str
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    session: str
    max_session_tokens: int
    max_wait_s: float | None
    adapter: str | os.PathLike[str]


def make_generate(prompt: str | None, options: GenerateOptions) -> Generate:
    """The message for a prompt or its alternatives; its job number is still 0.

    Raises:
        JobError: there is not exactly one of prompt, turns and prompt_tokens, or the adapter's
            folder is not there.
    """
    turns = tuple(
        turn if isinstance(turn, Turn) else Turn(role=turn["role"], content=turn["content"])
        for turn in options.get("turns", ())
    )
    prompt_tokens = tuple(options.get("prompt_tokens", ()))
    if (prompt is not None) + bool(turns) + bool(prompt_tokens) != 1:
        raise JobError(
            "bad_request",
            "give exactly one of prompt, turns and prompt_tokens, and not an empty one",
        )
    stop = options.get("stop", ())
    return Generate(
        job=0,
        model=options.get("model", ""),
        prompt=prompt or "",
        turns=turns,
        prompt_tokens=prompt_tokens,
        max_new_tokens=options.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS),
        sampling=Sampling(
            temperature=options.get("temperature", 0.0),
            top_k=options.get("top_k", 0),
            top_p=options.get("top_p", 1.0),
            min_p=options.get("min_p", 0.0),
            repetition_penalty=options.get("repetition_penalty", 1.0),
            seed=options.get("seed"),
        ),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        session=options.get("session", ""),
        max_session_tokens=options.get("max_session_tokens", 0),
        max_wait_s=options.get("max_wait_s"),
        adapter=name_adapter(options.get("adapter", "")),
    )


def name_adapter(given: str | os.PathLike[str]) -> str:
    """What the daemon is told of an adapter: an absolute path, or a hosted one's name.

    Args:
        given: a folder, if there is one of this name, or looks like the path of one; else a hosted
            adapter's name.

    Raises:
        JobError: it looks like a path, and no folder is there.
    """
    text = os.path.expanduser(given)
    if not text:
        return ""
    if os.path.isdir(text):
        return os.path.abspath(text)
    if not isinstance(given, str) or os.sep in text:
        raise JobError(
            "bad_adapter", f"there is no folder {text}; an adapter is one as PEFT saves it"
        )
    return text
