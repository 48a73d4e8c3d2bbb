"""The Unix socket's conversation between an app and the daemon of its own machine.

A connection carries any number of jobs at once. The app numbers its requests (``job``, any number
that is not in use); every answer carries the number. A job ends with its result or `JobFailed`.
Closing the connection cancels all its jobs and frees what they hold on every hop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from p2p.wire.message import (
    Addresses,
    BlockNumber,
    Bound,
    Count,
    Message,
    Name,
    PeerName,
    Seconds,
    Text,
    Tokens,
    message,
)

MAX_CONTROL_FRAME_BYTES = 16 * 1024 * 1024

JobNumber = Annotated[int, Bound(0, 2**31)]
TokenId = Annotated[int, Bound(0, 2**31)]
TokenIds = Annotated[tuple[TokenId, ...], Bound(0, 2**20)]
LongText = Annotated[str, Bound(0, 8 * 1024 * 1024)]
ModelName = Annotated[str, Bound(0, 1024)]
MAX_MOVES = 256
Stops = Annotated[tuple[Annotated[str, Bound(1, 256)], ...], Bound(0, 16)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation, as chat templates take it."""

    role: Annotated[str, Bound(1, 32)]
    content: LongText


Turns = Annotated[tuple[Turn, ...], Bound(0, 4096)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy. Checked again by the daemon."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None


@message("status_request")
@dataclass(frozen=True, kw_only=True, slots=True)
class StatusRequest(Message):
    """What is this daemon, and what does it do? Answered with `StatusReport`."""

    job: JobNumber


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanStatus:
    """The span that this daemon hosts.

    Attributes:
        state: ``moving`` (between two spans), ``serving``, ``draining`` or
            ``paused``.
        quant: the weight format.
        weight_bytes: the memory that its weights take.
        cache_tokens: the arena's size; ``free_cache_tokens`` of it are promised to nobody.
        sessions: open now.
        steps: done since the start, decode and prefill apart.
    """

    model: ModelName
    fingerprint: Name
    start: BlockNumber
    end: BlockNumber
    state: Name
    dtype: Name
    quant: Name
    device: Name
    weight_bytes: Count
    cache_tokens: Count
    free_cache_tokens: Count
    sessions: Count
    decode_steps: Count
    prefill_steps: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class PauseStatus:
    """Why this daemon serves nobody now, though it is to serve.

    Attributes:
        why: a clause, as "it" is the server.
        ends_in_s: when it comes back by itself, where that is known.
    """

    why: Text
    ends_in_s: Seconds | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerStatus:
    """A peer that this daemon is connected with.

    Attributes:
        round_trip_s: measured from here; none where it never was.
        bytes_per_s: that reach it from here, likewise.
    """

    peer: PeerName
    addresses: Addresses = ()
    round_trip_s: Seconds | None = None
    bytes_per_s: Count | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecCount:
    """How many messages of hidden states were written in a codec since the start."""

    codec: Name
    messages: Count


@message("status_report")
@dataclass(frozen=True, kw_only=True, slots=True)
class StatusReport(Message):
    """The daemon, its span, its peers, the models that it routes for.

    Attributes:
        roles: of ``serve``, ``route`` and ``anchor``.
        span: that is in memory; none where there is none, or none now.
        pause: none while the server does not make way for its owner.
    """

    job: JobNumber
    version: Name
    peer: PeerName
    addresses: Addresses
    pid: Count
    uptime_s: Seconds
    roles: Annotated[tuple[Name, ...], Bound(0, 8)]
    models: Annotated[tuple[ModelName, ...], Bound(0, 256)]
    peers: Annotated[tuple[PeerStatus, ...], Bound(0, 4096)]
    jobs: Count
    span: SpanStatus | None = None
    pause: PauseStatus | None = None
    sent: Annotated[tuple[CodecCount, ...], Bound(0, 64)] = ()


@message("swarm_request")
@dataclass(frozen=True, kw_only=True, slots=True)
class SwarmRequest(Message):
    """Which servers hold what? Answered with `SwarmReport`.

    Attributes:
        model: only this model; empty for all that the daemon knows.
    """

    job: JobNumber
    model: ModelName = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerStatus:
    """One server of a model, as it announced itself.

    Attributes:
        steps_per_s: decode steps through its whole span, by its own measurement.
        round_trip_s: measured from here; none where it never was.
        adapters: that it hosts, by their full names.
    """

    peer: PeerName
    start: BlockNumber
    end: BlockNumber
    state: Name
    dtype: Name
    quant: Name
    codec: Name
    steps_per_s: Seconds
    free_cache_tokens: Count
    cache_tokens: Count
    round_trip_s: Seconds | None = None
    adapters: Annotated[tuple[Name, ...], Bound(0, 8)] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSwarm:
    """The servers of one model.

    Attributes:
        coverage: for each block, how many servers hold it.
        share: the part of the servers that the daemon's own view has, from which it chooses chains;
            of a large swarm that is a sample. The servers told here are all.
    """

    model: ModelName
    fingerprint: Name
    blocks: BlockNumber
    coverage: Annotated[tuple[Count, ...], Bound(0, 4096)]
    servers: Annotated[tuple[ServerStatus, ...], Bound(0, 65536)]
    share: Annotated[float, Bound(0, 1)] = 1.0


@message("swarm_report")
@dataclass(frozen=True, kw_only=True, slots=True)
class SwarmReport(Message):
    """The swarm view of each model."""

    job: JobNumber
    models: Annotated[tuple[ModelSwarm, ...], Bound(0, 256)]


@message("generate")
@dataclass(frozen=True, kw_only=True, slots=True)
class Generate(Message):
    """Continues a prompt. Answered with `Progress`, `Generated` pieces, and `GenerateDone`.

    Attributes:
        model: a name that the daemon routes for; empty where it routes for just one.
        prompt: text; used when there are neither ``turns`` nor ``prompt_tokens``.
        turns: a conversation, formatted by the model's chat template.
        prompt_tokens: token ids as they are.
        max_new_tokens: the most tokens to make.
        stop: the text ends before the first of these.
        session: a name under which the connection keeps the session open, so that the next
            `Generate` with it prefills only what is new; empty for none.
        max_session_tokens: room for a kept session; 0 lets the daemon choose.
        max_wait_s: how long to wait where no server can run some blocks; none lets the daemon's
            configuration say.
        adapter: the absolute path of a folder on the daemon's machine with an adapter in PEFT's
            format, or the name of one that servers host; empty for none.
    """

    job: JobNumber
    model: ModelName = ""
    prompt: LongText = ""
    turns: Turns = ()
    prompt_tokens: TokenIds = ()
    max_new_tokens: Tokens = 256
    sampling: Sampling = Sampling()
    stop: Stops = ()
    session: Annotated[str, Bound(0, 64)] = ""
    max_session_tokens: Tokens = 0
    max_wait_s: Seconds | None = None
    adapter: Annotated[str, Bound(0, 4096)] = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainHop:
    """One hop of a chain."""

    peer: PeerName
    start: BlockNumber
    end: BlockNumber


Chain = Annotated[tuple[ChainHop, ...], Bound(0, 128)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainMove:
    """Blocks that are run elsewhere now.

    Attributes:
        start: first block.
        end: the block after the last one.
        old: the peers that ran them.
        new: the peers that run them now.
        reason: a stable name: ``leaving``, ``better``, or how the old ones failed.
        silent_s: how long a hop had been silent when it was given up.
        pause_s: from then on until the job went on.
        replayed_tokens: sent again to the new peers.
        handed_over_tokens: that came from the old peer's cache instead.
    """

    start: BlockNumber
    end: BlockNumber
    old: Annotated[tuple[PeerName, ...], Bound(0, 128)]
    new: Annotated[tuple[PeerName, ...], Bound(0, 128)]
    reason: Name
    silent_s: Seconds
    pause_s: Seconds
    replayed_tokens: Tokens = 0
    handed_over_tokens: Tokens = 0


@message("progress")
@dataclass(frozen=True, kw_only=True, slots=True)
class Progress(Message):
    """Something worth telling happened to a job that goes on.

    Attributes:
        event: a stable name: ``chain``, ``prefill``, ``moved``, ``waiting``.
        text: a sentence.
        chain: the chain as it is now, with the events ``chain`` and ``moved``.
        move: with the event ``moved``.
        done: so many tokens of ``total`` are prefilled, with the event ``prefill``.
    """

    job: JobNumber
    event: Name
    text: Text = ""
    chain: Chain = ()
    move: ChainMove | None = None
    done: Tokens = 0
    total: Tokens = 0


@message("generated")
@dataclass(frozen=True, kw_only=True, slots=True)
class Generated(Message):
    """A piece of the answer: the new tokens, and the text that became certain with them."""

    job: JobNumber
    tokens: TokenIds
    text: LongText = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """How long it took.

    Attributes:
        first_token_s: from the request to the first new token.
        steps_per_s: of the decode steps after it; 0 where there was none.
        total_s: of the whole job.
        prefilled_tokens: prompt tokens that went through the chain (fewer with a kept session).
        hop_compute_s: kernel time of each hop, summed over the decode steps.
        hop_queue_s: time that steps waited at each hop, likewise.
    """

    first_token_s: Seconds
    steps_per_s: Seconds
    total_s: Seconds
    prefilled_tokens: Tokens = 0
    hop_compute_s: Annotated[tuple[Seconds, ...], Bound(0, 128)] = ()
    hop_queue_s: Annotated[tuple[Seconds, ...], Bound(0, 128)] = ()


@message("generate_done")
@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateDone(Message):
    """The job's end.

    Attributes:
        tokens: ids of all new tokens, the ending one included.
        text: the whole answer, cut before a stop text.
        finish_reason: ``stop`` (the model ended), ``stop_text``, or ``length``.
        chain: as it was at the end.
        moves: what happened to it, the last so many.
    """

    job: JobNumber
    model: ModelName
    text: LongText
    tokens: TokenIds
    prompt_tokens: Tokens
    finish_reason: Name
    chain: Chain
    timings: Timings
    moves: Annotated[tuple[ChainMove, ...], Bound(0, MAX_MOVES)] = ()


@message("job_failed")
@dataclass(frozen=True, kw_only=True, slots=True)
class JobFailed(Message):
    """The job's end, when it did not succeed.

    Attributes:
        code: stable; `petalctl.client` makes an exception of it.
        text: what was expected, what came, what to do.
    """

    job: JobNumber
    code: Name
    text: Text = ""


@message("cancel")
@dataclass(frozen=True, kw_only=True, slots=True)
class Cancel(Message):
    """Ends a job early; it is answered with `JobFailed`, code ``cancelled``, if it still ran."""

    job: JobNumber


@message("close_session")
@dataclass(frozen=True, kw_only=True, slots=True)
class CloseSession(Message):
    """Gives up a kept session; answered with `SessionClosed`."""

    job: JobNumber
    session: Annotated[str, Bound(1, 64)]


@message("session_closed")
@dataclass(frozen=True, kw_only=True, slots=True)
class SessionClosed(Message):
    """A kept session is gone from every hop."""

    job: JobNumber


@message("pause")
@dataclass(frozen=True, kw_only=True, slots=True)
class Pause(Message):
    """Takes this daemon's server out of the swarm for its owner's sake; answered with `Paused`.

    Its sessions move to others, and it takes no new ones.

    Attributes:
        for_s: how long; none until `Resume`.
        within_s: how long sessions have to move before those that are left are ended; none lets
            the daemon's configuration say.
    """

    job: JobNumber
    for_s: Seconds | None = None
    within_s: Seconds | None = None


@message("paused")
@dataclass(frozen=True, kw_only=True, slots=True)
class Paused(Message):
    """No session of the server is in use any more, or their time is over.

    Attributes:
        sessions: that were open when it began.
        left: of them, those that did not move: idle, or with nobody to go to. They are ended when
            the time is over; their clients rebuild them.
    """

    job: JobNumber
    sessions: Count
    left: Count


@message("resume")
@dataclass(frozen=True, kw_only=True, slots=True)
class Resume(Message):
    """Ends the owner's pause; answered with `Resumed`."""

    job: JobNumber


@message("resumed")
@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed(Message):
    """The owner's pause is over.

    Attributes:
        paused_why: why the server is not back all the same; empty where it is.
        is_loading: whether it loads its blocks first, which were freed.
    """

    job: JobNumber
    paused_why: Text = ""
    is_loading: bool = False
