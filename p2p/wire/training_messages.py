"""The Unix socket's conversation for those who train, or who want hidden states.

Jobs are numbered and end as in `p2p.wire.control_messages`. A batch is larger than a frame may be,
so its rows follow the request as `BatchRows`, in order, and the answer's rows come back so, in any
order, before the job's end. Rows are tokens, sequence after sequence: row ``s * tokens + t`` is
token t of sequence s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from p2p.wire.adapter_messages import AdapterShape
from p2p.wire.control_messages import MAX_MOVES, Chain, ChainMove, JobNumber, ModelName
from p2p.wire.message import (
    BlockNumber,
    Bound,
    Count,
    Message,
    Seconds,
    Tokens,
    message,
)
from p2p.wire.tensor import WireTensor

MAX_CHAINS = 64
ROWS_BYTES = 4 * 1024 * 1024
"""What one `BatchRows` holds, about: a quarter of the largest frame."""

AdapterNumber = Annotated[int, Bound(0, 2**31)]
HostedName = Annotated[str, Bound(0, 256)]


@message("put_adapter")
@dataclass(frozen=True, kw_only=True, slots=True)
class PutAdapter(Message):
    """Gives the daemon an adapter, or some blocks of it; answered with `AdapterKept`.

    An adapter is complete when all its blocks came, in order and without a gap, over any number of
    these. One of a number that is in use replaces the old one; forward passes that were run with
    that keep it.

    Attributes:
        model: a name that the daemon routes for; empty where it routes for just one.
        adapter: its number on this connection, chosen by the app.
        form: what it consists of.
        start: first block of the whole adapter.
        end: the block after its last one.
        first: the first block of these values.
        values: ``[blocks, numbers of a block]``, float32 or float64.
    """

    job: JobNumber
    model: ModelName = ""
    adapter: AdapterNumber
    form: AdapterShape
    start: BlockNumber
    end: BlockNumber
    first: BlockNumber
    values: WireTensor


@message("adapter_kept")
@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterKept(Message):
    """The daemon has these blocks of the adapter."""

    job: JobNumber


@message("forward_batch")
@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardBatch(Message):
    """Runs a batch through blocks. `BatchRows` follow; answered with those, and `ForwardDone`.

    Attributes:
        model: a name that the daemon routes for; empty where it routes for just one.
        start: first block.
        end: the block after the last one; 0 for the model's end.
        sequences: of the batch.
        tokens: of each, padding included.
        mask: uint8 ``[sequences, tokens]``, 1 for real tokens, 0 for padding; none: all are real.
        adapter: the number of an adapter that was put, and covers the blocks.
        hosted: the name of an adapter that servers host; empty for none.
        is_kept: keep what is needed for a `BackwardBatch`.
        pieces_under_way: the most pieces of the batch on their way at once in each chain; 0 lets
            the daemon choose, 1 is no pipeline.
        max_wait_s: how long to wait where no server can run some blocks; none lets the daemon's
            configuration say.
    """

    job: JobNumber
    model: ModelName = ""
    start: BlockNumber = 0
    end: BlockNumber = 0
    sequences: Tokens
    tokens: Tokens
    mask: WireTensor | None = None
    adapter: AdapterNumber | None = None
    hosted: HostedName = ""
    is_kept: bool = False
    pieces_under_way: Tokens = 0
    max_wait_s: Seconds | None = None


@message("batch_rows")
@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRows(Message):
    """Some rows of a batch: whole sequences.

    Attributes:
        job: whose they are.
        row: the number of the first one.
        hidden: ``[rows, hidden]``, uncompressed: hidden states, or their gradients.
    """

    job: JobNumber
    row: Count
    hidden: WireTensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTimings:
    """What a pass took.

    Attributes:
        total_s: from the request to its end.
        pieces: that the batch was cut into.
        hop_compute_s: kernel time of all hops together.
        hop_queue_s: time that pieces waited at hops, likewise.
        repeated: requests to a hop that were made again, at another or the same.
    """

    total_s: Seconds
    pieces: Count
    hop_compute_s: Seconds
    hop_queue_s: Seconds
    repeated: Count = 0


@message("forward_done")
@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardDone(Message):
    """The end of a forward pass; all rows came before it.

    Attributes:
        chains: the parallel chains as they were at the end.
        moves: blocks that are run elsewhere now, the last so many.
    """

    job: JobNumber
    timings: PassTimings
    chains: Annotated[tuple[Chain, ...], Bound(0, MAX_CHAINS)] = ()
    moves: Annotated[tuple[ChainMove, ...], Bound(0, MAX_MOVES)] = ()


@message("backward_batch")
@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardBatch(Message):
    """Takes gradients back through a forward pass that was kept, which is then forgotten.

    `BatchRows` of the output's gradient follow; answered with those of the input's, with
    `AdapterGradient`, and `BackwardDone`.

    Attributes:
        forward: the job number of the forward pass.
    """

    job: JobNumber
    forward: JobNumber


@message("adapter_gradient")
@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterGradient(Message):
    """The gradient of some blocks of the adapter.

    Attributes:
        first: the first of these blocks.
        values: ``[blocks, numbers of a block]``.
    """

    job: JobNumber
    first: BlockNumber
    values: WireTensor


@message("backward_done")
@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardDone(Message):
    """The end of a backward pass; all rows came before it."""

    job: JobNumber
    timings: PassTimings
    chains: Annotated[tuple[Chain, ...], Bound(0, MAX_CHAINS)] = ()
    moves: Annotated[tuple[ChainMove, ...], Bound(0, MAX_MOVES)] = ()


@message("forget_forward")
@dataclass(frozen=True, kw_only=True, slots=True)
class ForgetForward(Message):
    """Gives up a forward pass that was kept; answered with `ForwardForgotten`.

    Attributes:
        forward: its job number.
    """

    job: JobNumber
    forward: JobNumber


@message("forward_forgotten")
@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardForgotten(Message):
    """The pass is kept no more."""

    job: JobNumber


@message("open_hidden_session")
@dataclass(frozen=True, kw_only=True, slots=True)
class OpenHiddenSession(Message):
    """Opens a session through the whole model for hidden states; answered with `HiddenOpened`.

    `p2p.wire.control_messages.CloseSession` ends it.

    Attributes:
        model: a name that the daemon routes for; empty where it routes for just one.
        session: the name under which the connection keeps it.
        max_tokens: the most that will be cached.
        adapter: the number of an adapter that was put, and covers all blocks.
        hosted: the name of an adapter that servers host; empty for none.
        max_wait_s: as for `ForwardBatch`.
    """

    job: JobNumber
    model: ModelName = ""
    session: Annotated[str, Bound(1, 64)]
    max_tokens: Tokens
    adapter: AdapterNumber | None = None
    hosted: HostedName = ""
    max_wait_s: Seconds | None = None


@message("hidden_opened")
@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenOpened(Message):
    """The session can be used."""

    job: JobNumber
    chain: Chain = ()


@message("run_hidden_step")
@dataclass(frozen=True, kw_only=True, slots=True)
class RunHiddenStep(Message):
    """Runs new tokens through a session; answered with `HiddenStepDone`.

    Attributes:
        session: its name.
        position: of the first token; the caches are cut back to it.
        hidden: ``[tokens, hidden]``, as embeddings give them.
        is_last_wanted: only the last token's output is wanted.
    """

    job: JobNumber
    session: Annotated[str, Bound(1, 64)]
    position: Tokens
    hidden: WireTensor
    is_last_wanted: bool = True


@message("hidden_step_done")
@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenStepDone(Message):
    """What came out of the last block.

    Attributes:
        hidden: ``[rows, hidden]``.
    """

    job: JobNumber
    hidden: WireTensor
