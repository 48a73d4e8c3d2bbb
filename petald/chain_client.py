"""A session from the client's side: streams to the hops, and the clock.

What is done, and when, is decided by `petald.session`; here its actions are carried out. Every hop
has a task, which opens its stream, and then one that sends and one that reads. `ChainSession.run`
holds them all; whoever generates awaits `run_step`. Invariant: when `run` has ended, every hop has
seen its stream end, and so gives the session's room back.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import trio

from kernels.errors import KernelError
from p2p.errors import P2PError, RemoteProtocolError
from p2p.network import Network
from p2p.rpc import MessageStream
from p2p.wire.message import Message, expect
from p2p.wire.pass_messages import CODE_UNKNOWN_ADAPTER
from p2p.wire.replies import Refusal
from p2p.wire.session_messages import (
    SESSION_PROTOCOL,
    HandOver,
    Leaving,
    LinkDone,
    LinkFailed,
    LinkNext,
    LinkPrevious,
    OpenSession,
    Probe,
    ProbeReply,
    SessionOpened,
    Step,
    StepFailed,
    StepOutput,
    StepResult,
    Wanted,
)
from p2p.wire.tensor import RAW, WireTensor
from petald.adapter_lending import lend_adapter, lending_allowance_s
from petald.errors import BadRequest, MissingBlocks, PetaldError, SessionLost, leaves
from petald.history import HistoryStore
from petald.lent_adapter import AdapterPart, LentAdapter
from petald.log import get_logger
from petald.message_codecs import MessageCodecs, may_come_as
from petald.routing import Hop
from petald.session import Session
from petald.session_actions import (
    Action,
    CloseHop,
    Ended,
    Moved,
    NeedChain,
    OpenHop,
    Penalise,
    SendHandOver,
    SendLinkNext,
    SendLinkPrevious,
    SendProbe,
    SendStep,
    StepDone,
    StepLost,
    StepResultRows,
    Waiting,
)
from petald.session_settings import Counts, Replay, SessionSettings
from petald.tensors import check_rows, check_wire, off_loop

log = get_logger(__name__)

BETTER_PERIOD_S = 10.0
"""Between two looks for a better chain: as often as views change, or less."""

COOL_DOWN_S = 60.0
"""After a move: many sessions that saw the same better server have come there by then, and what is
measured shows it."""

PING_S = 1.0
LATE_S = 1.0
SETTLE_S = 0.2
"""After a pause of this whole process, what came meanwhile is read before anybody is judged."""

News = Callable[[Moved | Waiting], None]


class Chooser(Protocol):
    """Who knows the swarm."""

    async def choose(self, need: NeedChain) -> Sequence[Hop]:
        """Servers for some blocks.

        Raises:
            MissingBlocks: nobody can run some of them now.
        """

    async def find_better(
        self, chain: Sequence[Hop], *, max_tokens: int, cached_tokens: int
    ) -> Sequence[Hop] | None:
        """A chain so much better that moving there pays; none if there is none.

        Args:
            chain: as it is, with room promised on each hop.
            max_tokens: the most that the session will have cached.
            cached_tokens: that it has now.
        """

    def penalise(self, peer: str) -> None:
        """A peer did not do its part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainModel:
    """The model that a session is for.

    Attributes:
        fingerprint: of its weights.
        num_blocks: that it has.
        hidden_size: of the states between them.
    """

    fingerprint: bytes
    num_blocks: int
    hidden_size: int


@dataclass(eq=False, slots=True)
class _Line:
    """One hop's stream, and what waits to be sent on it.

    Attributes:
        dtype: of the outputs that it copies to us, as the first one said.
    """

    id: int
    at: Hop
    session: bytes
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    waiting: deque[Message] = field(default_factory=deque)
    wake: trio.Event = field(default_factory=trio.Event)
    dtype: str | None = None

    def send_step_soon(self, step: Step) -> None:
        """Sends a step; those that it makes worthless are not sent any more."""
        if any(isinstance(each, Step) and each.position >= step.position for each in self.waiting):
            kept = [
                e for e in self.waiting if not isinstance(e, Step) or e.position < step.position
            ]
            self.waiting = deque(kept)
        self.send_soon(step)

    def send_soon(self, message: Message) -> None:
        self.waiting.append(message)
        self.wake.set()


@dataclass(eq=False, slots=True)
class _Step:
    """A step that somebody awaits."""

    done: trio.Event = field(default_factory=trio.Event)
    result: StepResultRows | None = None


class ChainSession:
    """One inference, on a chain that may change.

    Args:
        network: the way to the hops.
        model: whose blocks are run.
        chooser: finds servers.
        histories: where the histories are kept.
        max_tokens: the most that the session will have cached.
        codec: in which hops write their outputs.
        max_wait_s: how long to wait where nobody can run some blocks.
        replay: as for `petald.session_settings.SessionSettings`.
        codecs: encode what the app sends.
        prefers_hand_over: as for `petald.session_settings.SessionSettings`.
        adapter: with which the blocks are run; it covers all of them, and is lent to the hops.
        hosted: tells the name of an adapter that the chosen hops host themselves; none for none.
        on_news: told of what happens to the chain; must not block.
    """

    def __init__(
        self,
        network: Network,
        *,
        model: ChainModel,
        chooser: Chooser,
        histories: HistoryStore,
        max_tokens: int,
        codec: str = RAW,
        max_wait_s: float = 0.0,
        replay: Replay = Replay.FAST,
        codecs: MessageCodecs | None = None,
        prefers_hand_over: Callable[[Hop, Hop, int], bool] = lambda old, new, tokens: False,
        adapter: LentAdapter | None = None,
        hosted: Callable[[], str | None] = lambda: None,
        on_news: News = lambda news: None,
    ) -> None:
        self.max_tokens = max_tokens
        self._codec = codec
        self._codecs = codecs or MessageCodecs(network)
        self.on_news = on_news
        self.times_lent = 0
        self._adapter = adapter
        self._hosted = hosted
        self._network = network
        self._model = model
        self._chooser = chooser
        self._machine = Session(
            SessionSettings(
                num_blocks=model.num_blocks,
                max_tokens=max_tokens,
                make_history=histories.open,
                max_wait_s=max_wait_s,
                replay=replay,
                prefers_hand_over=prefers_hand_over,
            )
        )
        self._lines: dict[int, _Line] = {}
        self._steps: dict[int, _Step] = {}
        self._error: PetaldError | None = None
        self._scope = trio.CancelScope()
        self._has_ended = trio.Event()
        self._is_ready = trio.Event()
        self._timer = trio.Event()
        self._timer_at = float("inf")
        self._nursery: trio.Nursery | None = None

    @property
    def is_open(self) -> bool:
        """Whether steps can be run, now or once the chain is whole again."""
        return self._nursery is not None and not self._machine.has_ended

    @property
    def chain(self) -> tuple[Hop, ...]:
        """The hops, in order; some may be missing while they are replaced."""
        return self._machine.chain

    @property
    def max_step_tokens(self) -> int:
        """The longest step that every hop takes."""
        return self._machine.max_step_tokens

    @property
    def counts(self) -> Counts:
        """What the session has gone through."""
        return self._machine.counts

    async def run(
        self, *, task_status: trio.TaskStatus[PetaldError | None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Opens the session, and keeps it until `close`, or until it is lost.

        Reports, as the nursery's start value, why it could not be opened, or none once steps can
        be run.
        """
        with self._scope:
            try:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._keep_time)
                    self._carry_out(self._machine.start(trio.current_time()))
                    await self._is_ready.wait()
                    task_status.started(self._error)
                    nursery.start_soon(self._keep_looking)
                    if self._error is not None:
                        nursery.cancel_scope.cancel()
            finally:
                self._carry_out(self._machine.close())
                self._wake_all()
                self._has_ended.set()

    async def close(self) -> None:
        """Ends the session on every hop."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._has_ended.wait()

    async def encode(self, hidden_SD: torch.Tensor) -> WireTensor:
        """Rows as they go to the first hop, for `run_step`.

        Raises:
            BadRequest: they hold numbers that are not finite, or that the codec cannot write.
        """
        try:
            to = [hop.peer for hop in self.chain[:1]]
            hidden = await self._codecs.encode(hidden_SD, self._codec, to=to)
            await self._check_numbers(hidden, max_tokens=sys.maxsize)
        except (KernelError, RemoteProtocolError) as error:
            raise BadRequest(str(error)) from error
        return hidden

    async def run_step(
        self,
        hidden: WireTensor,
        *,
        position: int,
        wanted: Wanted,
        meanwhile: Callable[[], Awaitable[None]] | None = None,
    ) -> StepResultRows:
        """Runs one step through the chain, whatever becomes of its hops.

        Args:
            hidden: ``[tokens, hidden]``, at most `max_step_tokens` tokens, made by `encode`.
            position: of the first token; the caches are cut back to it.
            wanted: which rows of the output to bring back.
            meanwhile: awaited while the step is on its way.

        Raises:
            SessionLost, MissingBlocks, HopFailed: the session is lost; so it is where what was
                sent cannot be kept.
            BadRequest: the step does not follow the ones before, or is no hidden states.

        Cancellation: the step is taken back, and those after it; the session can be used on.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check()
        self._check_own(hidden)
        try:
            ticket, actions = self._machine.submit(position, hidden, wanted, trio.current_time())
        except SessionLost as error:
            self._carry_out(self._machine.give_up(error))
            raise
        step = self._steps[ticket] = _Step()
        self._carry_out(actions)
        try:
            if meanwhile is not None:
                await meanwhile()
            await step.done.wait()
        except BaseException:
            if not self._machine.has_ended:
                self._carry_out(self._machine.cancel(ticket, trio.current_time()))
            raise
        finally:
            self._steps.pop(ticket, None)
        if step.result is None:
            self._check()
            raise SessionLost("a step before this one was taken back")
        return step.result

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._machine.has_ended or self._nursery is None:
            raise SessionLost("the session is closed")

    def _wake_all(self) -> None:
        self._is_ready.set()
        for step in self._steps.values():
            step.done.set()

    # Actions.

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, SendStep):
                self._send_step(action)
            elif isinstance(action, StepDone):
                step = self._steps.get(action.ticket)
                if step is not None:
                    step.result = action.result
                    step.done.set()
            else:
                self._carry_out_rare(action)
        if self._machine.is_running:
            self._is_ready.set()
        due = self._machine.next_deadline()
        if due < self._timer_at:
            self._timer_at = due
            self._timer.set()

    def _carry_out_rare(self, action: Action) -> None:
        nursery = self._nursery
        if isinstance(action, CloseHop):
            line = self._lines.pop(action.hop, None)
            if line is not None:
                line.scope.cancel()
        elif isinstance(action, StepLost):
            step = self._steps.get(action.ticket)
            if step is not None:
                step.done.set()
        elif isinstance(action, Ended):
            self._error = action.error
            self._wake_all()
        elif isinstance(action, Penalise):
            log.info("hop failed", peer=action.peer, reason=action.code)
            self._chooser.penalise(action.peer)
        elif isinstance(action, Moved | Waiting):
            self.on_news(action)
        elif isinstance(action, OpenHop) and nursery is not None:
            line = self._lines[action.hop] = _Line(action.hop, action.at, os.urandom(16))
            nursery.start_soon(self._run_line, line, action)
        elif isinstance(action, NeedChain) and nursery is not None:
            nursery.start_soon(self._choose, action)
        else:
            self._send_request(action)

    def _send_step(self, action: SendStep) -> None:
        line = self._lines[action.hop]
        line.send_step_soon(
            Step(
                number=action.number,
                position=action.position,
                hidden=action.hidden,
                wanted=action.wanted,
                until=action.until,
            )
        )

    def _send_request(self, action: Action) -> None:
        if isinstance(action, SendLinkNext):
            target = self._lines[action.target]
            message: Message = LinkNext(
                request=action.request,
                peer=target.at.peer,
                session=target.session,
                addresses=target.at.addresses,
            )
        elif isinstance(action, SendLinkPrevious):
            message = LinkPrevious(request=action.request, peer=action.peer)
        elif isinstance(action, SendHandOver):
            target = self._lines[action.target]
            message = HandOver(
                request=action.request,
                peer=target.at.peer,
                session=target.session,
                tokens=action.tokens,
                addresses=target.at.addresses,
            )
        elif isinstance(action, SendProbe):
            line = self._lines[action.hop]
            line.waiting.appendleft(Probe(request=action.request))  # before all steps that wait
            line.wake.set()
            return
        else:
            raise TypeError(f"{action} is not known")
        self._lines[action.hop].send_soon(message)

    # Tasks.

    async def _choose(self, need: NeedChain) -> None:
        try:
            chain = await self._chooser.choose(need)
        except MissingBlocks as error:
            now = trio.current_time()
            self._carry_out(self._machine.on_no_chain(need.question, error, now))
        else:
            self._carry_out(self._machine.on_chain(need.question, chain, trio.current_time()))

    async def _keep_time(self) -> None:
        """Tells the machine that time has passed, when it wants to know."""
        while True:
            self._timer = trio.Event()
            self._timer_at = self._machine.next_deadline()
            with trio.move_on_at(self._timer_at):
                await self._timer.wait()  # something is wanted earlier
                continue
            if trio.current_time() - self._timer_at > LATE_S:
                await trio.sleep(SETTLE_S)
            now = trio.current_time()
            if self._machine.next_deadline() <= now:
                self._carry_out(self._machine.on_timer(now))

    async def _keep_looking(self) -> None:
        """Looks for a better chain from time to time."""
        while True:
            await trio.sleep(BETTER_PERIOD_S * random.uniform(0.8, 1.2))
            if not self._machine.is_running or self._machine.is_moving:
                continue
            chain = await self._chooser.find_better(
                self._machine.chain,
                max_tokens=self.max_tokens,
                cached_tokens=self._machine.submitted_rows,
            )
            if chain is not None:
                self._carry_out(self._machine.propose(chain, trio.current_time()))
                await trio.sleep(COOL_DOWN_S)

    async def _run_line(self, line: _Line, action: OpenHop) -> None:
        with line.scope:
            try:
                part = await self._own_part(line.at)
                refusal = await self._use_hop(line, action, part)
                if refusal is not None and refusal.code == CODE_UNKNOWN_ADAPTER:
                    refusal = await self._lend(line, part) or await self._use_hop(
                        line, action, part
                    )
                if refusal is not None:
                    self._on_failed(line, refusal.code, refusal.text, refusal.retry_after_s)
            except* P2PError as group:
                for error in leaves(group):
                    assert isinstance(error, P2PError)
                    self._on_failed(line, error.code, str(error))

    async def _own_part(self, at: Hop) -> AdapterPart | None:
        """The adapter's part for a hop's blocks."""
        if self._adapter is None:
            return None
        row_bytes = self._adapter.values_LE[0].nbytes
        return await off_loop(
            self._adapter.part, at.start, at.end, size_bytes=row_bytes * (at.end - at.start)
        )

    async def _lend(self, line: _Line, part: AdapterPart | None) -> Refusal | None:
        """Lends a hop the adapter that it says it does not have; gives why it was not taken."""
        if part is None:
            raise RemoteProtocolError("it misses an adapter that was not asked for")
        allowed_s = lending_allowance_s(part)
        self._carry_out(self._machine.on_opening_takes(line.id, allowed_s, trio.current_time()))
        model = self._model.fingerprint
        refusal = await lend_adapter(self._network, line.at, model=model, part=part)
        if refusal is None:
            self.times_lent += 1
        return refusal

    async def _use_hop(
        self, line: _Line, action: OpenHop, part: AdapterPart | None
    ) -> Refusal | None:
        """Opens the session at a hop, and keeps it until its stream ends; or gives its refusal."""
        stream = await self._network.open_stream(
            line.at.peer, SESSION_PROTOCOL, hints=line.at.addresses
        )
        messages = MessageStream(stream)
        try:
            return await self._talk_to_hop(line, messages, action, part)
        finally:
            with trio.CancelScope(shield=True):
                await messages.abort()

    async def _talk_to_hop(
        self, line: _Line, messages: MessageStream, action: OpenHop, part: AdapterPart | None
    ) -> Refusal | None:
        await messages.send(
            OpenSession(
                session=line.session,
                model=self._model.fingerprint,
                start=line.at.start,
                end=line.at.end,
                max_tokens=self.max_tokens,
                previous=action.previous,
                codec=self._codec,
                cache_from=action.cache_from,
                adapter=None if part is None else part.digest,
                hosted=self._hosted(),
            )
        )
        reply = await messages.receive()
        if isinstance(reply, Refusal):
            return reply
        if reply is None:
            raise RemoteProtocolError("the stream ended before the answer")
        opened = expect(reply, SessionOpened)
        if action.cache_from is not None:  # nobody waits; and how near it is decides what is best
            with trio.move_on_after(PING_S), contextlib.suppress(P2PError):
                await self._network.ping(line.at.peer)
        now = trio.current_time()
        self._carry_out(self._machine.on_opened(line.id, opened.max_step_tokens, now))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send, line, messages)
            await self._read(line, messages)
            nursery.cancel_scope.cancel()
        return None

    async def _send(self, line: _Line, messages: MessageStream) -> None:
        while True:
            while line.waiting:
                await messages.send(line.waiting.popleft())
            line.wake = trio.Event()
            await line.wake.wait()

    async def _read(self, line: _Line, messages: MessageStream) -> None:
        """Takes what one hop has to say, until its stream ends."""
        while (received := await messages.receive()) is not None:
            if isinstance(received, StepOutput | StepResult) and received.hidden is not None:
                await self._check_rows(received.hidden)
            try:
                actions = self._take(line, received, trio.current_time())
            except SessionLost as error:
                actions = self._machine.give_up(error)
            self._carry_out(actions)
        self._on_failed(line, "stream_broken", "it ended the session")

    def _take(self, line: _Line, received: Message, now: float) -> Sequence[Action]:
        machine = self._machine
        if isinstance(received, StepOutput):
            line.dtype = line.dtype or received.hidden.dtype
            if received.hidden.dtype != line.dtype:
                raise RemoteProtocolError("it changes how it writes its outputs")
            return machine.on_output(line.id, received.number, received.hidden, now)
        if isinstance(received, StepResult):
            return machine.on_result(line.id, received.number, received.hidden, received.times, now)
        if isinstance(received, LinkDone):
            return machine.on_link_done(line.id, received.request, now)
        if isinstance(received, LinkFailed):
            return machine.on_link_failed(
                line.id, received.request, received.code, received.text, now
            )
        if isinstance(received, ProbeReply):
            return machine.on_probe_reply(line.id, received.request, received.received, now)
        if isinstance(received, Leaving):
            return machine.on_leaving(line.id, now)
        failed = expect(received, StepFailed)
        return machine.on_step_failed(
            line.id, failed.number, failed.code, failed.text, failed.culprit, now
        )

    def _check_own(self, hidden: WireTensor) -> None:
        try:
            check_wire(hidden, hidden_size=self._model.hidden_size, max_tokens=sys.maxsize)
        except RemoteProtocolError as error:
            raise BadRequest(str(error)) from error

    async def _check_rows(self, hidden: WireTensor) -> None:
        if not may_come_as(hidden.codec, self._codec):
            raise RemoteProtocolError(
                f"it wrote its outputs as {hidden.codec[:32]!r}; {self._codec} was asked for"
            )
        await self._check_numbers(hidden, max_tokens=self.max_tokens)

    async def _check_numbers(self, hidden: WireTensor, *, max_tokens: int) -> None:
        check = functools.partial(
            check_rows, hidden, hidden_size=self._model.hidden_size, max_tokens=max_tokens
        )
        await off_loop(check, size_bytes=4 * math.prod(hidden.shape))

    def _on_failed(self, line: _Line, code: str, text: str, retry_after_s: float = 0.0) -> None:
        log.debug("hop lost", peer=line.at.peer, code=code, reason=text)
        self._carry_out(
            self._machine.on_hop_failed(
                line.id, code, text, trio.current_time(), retry_after_s=retry_after_s
            )
        )
