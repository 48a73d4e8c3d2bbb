"""Generation jobs: from a prompt to a text, through a session.

A job checks its request, finds or opens its session, prefills what the session has not cached yet,
and then makes one token after the other. Tokenizer, embedding, head and sampling are local; hidden
states go out and come back. The rows of a soft prompt, if there is one, stand before the prompt's
in the session. Invariant of a kept session: `KeptSession.cached` are ids whose hidden states every
hop has cached, so what a new prompt shares with it need not be sent again.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import torch
import trio

from kernels.sampling import Sampler
from kernels.sampling_params import SamplingParams
from p2p.wire.control_messages import (
    Chain,
    ChainHop,
    Generate,
    Generated,
    GenerateDone,
    Progress,
    Timings,
)
from p2p.wire.message import Message
from p2p.wire.session_messages import Wanted
from p2p.wire.tensor import WireTensor
from petald.chain_client import ChainSession
from petald.errors import BadRequest, HopFailed, PromptTooLong
from petald.executor import Executor
from petald.job_adapter import NO_ADAPTER, JobAdapter
from petald.job_news import JobNews
from petald.local_model import LocalModel
from petald.router import Router
from petald.scheduler import Priority
from petald.session_actions import StepResultRows
from petald.step_pieces import run_pieces
from petald.tensors import from_wire
from petald.text_stream import TextStream

KEPT_SESSION_SPARE_TOKENS = 2048
"""Room that a kept session gets beyond its first job when the app does not say how much."""

Send = Callable[[Message], Awaitable[None]]


@dataclass(eq=False, slots=True)
class KeptSession:
    """A session that outlives its job.

    Attributes:
        adapter: with which it was opened.
        has_soft_prompt: whether every hop has cached the soft prompt's rows, if there are any.
        cached: ids whose hidden states every hop has cached, in order.
    """

    model: LocalModel
    session: ChainSession
    adapter: JobAdapter
    has_soft_prompt: bool = False
    cached: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Clock:
    """What a job's time went into."""

    started_at: float
    first_token_at: float | None = None
    ended_at: float | None = None
    prefilled_tokens: int = 0
    hop_compute_us: list[int] = field(default_factory=list)
    hop_queue_us: list[int] = field(default_factory=list)

    def on_decode_step(self, result: StepResultRows) -> None:
        if len(self.hop_compute_us) != len(result.times):
            self.hop_compute_us = [0] * len(result.times)
            self.hop_queue_us = [0] * len(result.times)
        for index, spent in enumerate(result.times):
            self.hop_compute_us[index] += spent.compute_us
            self.hop_queue_us[index] += spent.queue_us

    def timings(self, new_tokens: int) -> Timings:
        ended_at = trio.current_time() if self.ended_at is None else self.ended_at
        first_at = ended_at if self.first_token_at is None else self.first_token_at
        decode_s = ended_at - first_at
        return Timings(
            first_token_s=first_at - self.started_at,
            steps_per_s=(new_tokens - 1) / decode_s if new_tokens > 1 and decode_s > 0 else 0.0,
            total_s=ended_at - self.started_at,
            prefilled_tokens=self.prefilled_tokens,
            hop_compute_s=tuple(us / 1e6 for us in self.hop_compute_us),
            hop_queue_s=tuple(us / 1e6 for us in self.hop_queue_us),
        )


class GenerationJob:
    """One generation.

    Args:
        request: what the app asked for.
        model: chosen by it.
        router: opens sessions.
        executor: the thread for embedding, head and sampling.
        send: takes what the app is to be told.
        started_at: when the request came, in trio's time.
        max_wait_s: how long to wait where nobody can run some blocks.
        adapter: that the app chose.

    Raises:
        BadRequest, BadConversation, PromptTooLong, BadSampling: nobody can do what is asked for.
    """

    def __init__(
        self,
        request: Generate,
        model: LocalModel,
        *,
        router: Router,
        executor: Executor,
        send: Send,
        started_at: float,
        max_wait_s: float,
        adapter: JobAdapter = NO_ADAPTER,
    ) -> None:
        self._request = request
        self._adapter = adapter
        self._model = model
        self._router = router
        self._executor = executor
        self._send = send
        self._sampler = Sampler(_sampling_params(request))
        self._prompt = _encode_prompt(request, model)
        self._limit = _check_length(request, model, len(self._prompt), adapter.positions)
        self._clock = _Clock(started_at)
        self._max_wait_s = max_wait_s
        self._session: ChainSession | None = None
        self._news = JobNews(request.job, send, chain=self._chain)

    async def open_session(self, nursery: trio.Nursery, kept: KeptSession | None) -> KeptSession:
        """Gives the session to generate with: the kept one if it still can be used, or a new one.

        Args:
            nursery: holds the task of a session that is opened.
            kept: of an earlier job; closed when it is not used.

        Raises:
            MissingBlocks, HopFailed: what the swarm could not do.
        """
        adapter = self._adapter
        needed = adapter.prompt_rows + len(self._prompt) + self._limit
        if kept is not None:
            is_same = kept.model is self._model and kept.adapter.key == adapter.key
            fits = is_same and kept.session.max_tokens >= needed
            if fits and kept.session.is_open:
                self._session = kept.session
                kept.session.on_news = self._news.on_news
                return kept
            await kept.session.close()
        room = needed
        if self._request.session:
            spare = self._request.max_session_tokens or needed + KEPT_SESSION_SPARE_TOKENS
            most = self._model.identity.config.max_positions - adapter.positions
            room = max(needed, min(spare, most) + adapter.prompt_rows)
        session = await self._router.open_session(
            self._model.identity,
            max_tokens=room,
            nursery=nursery,
            max_wait_s=self._max_wait_s,
            on_news=self._news.on_news,
            adapter=adapter.lent,
            hosted=adapter.hosted,
        )
        self._session = session
        return KeptSession(self._model, session, adapter)

    async def tell_news(self) -> None:
        """Tells the app what happens to the chain, until it is cancelled."""
        await self._news.tell()

    def _chain(self) -> Chain:
        return () if self._session is None else _wire_chain(self._session)

    async def run(self, kept: KeptSession) -> GenerateDone:
        """Generates, and tells the app every step of it; gives the last word, still to be told.

        Raises:
            HopFailed, MissingBlocks, SessionLost: the session is of no more use.

        Cancellation: the session can be used on; ``kept.cached`` says what it has.
        """
        await self._send_chain(kept.session)
        return await self._generate(kept)

    async def _send_chain(self, session: ChainSession) -> None:
        hops = _wire_chain(session)
        text = " -> ".join(f"{hop.start}:{hop.end} at {hop.peer}" for hop in hops)
        await self._send(Progress(job=self._request.job, event="chain", text=text, chain=hops))

    async def _generate(self, kept: KeptSession) -> GenerateDone:
        request, model = self._request, self._model
        stream = TextStream(model.tokenizer, stop=request.stop)
        tokens: list[int] = []
        pieces: list[str] = []
        finish_reason = "length"
        hidden_SD = await self._prefill(kept)
        while True:
            token, next_SD = await self._executor.run(
                model.sample, self._sampler, hidden_SD, self._prompt + tokens
            )
            if not tokens:
                self._clock.first_token_at = trio.current_time()
            tokens.append(token)
            is_end = token in model.eos_ids
            text = "" if is_end else stream.feed(token)
            if is_end or stream.is_stopped or len(tokens) >= self._limit:
                finish_reason = "stop" if is_end else "stop_text" if stream.is_stopped else "length"
                text += stream.finish()
            pieces.append(text)
            news = Generated(job=request.job, tokens=(token,), text=text)
            if is_end or stream.is_stopped or len(tokens) >= self._limit:
                await self._send(news)
                break
            hidden_SD = await self._decode(kept, token, next_SD, news)
        self._clock.ended_at = trio.current_time()
        return GenerateDone(
            job=request.job,
            model=model.identity.name,
            text="".join(pieces),
            tokens=tuple(tokens),
            prompt_tokens=len(self._prompt),
            finish_reason=finish_reason,
            chain=_wire_chain(kept.session),
            timings=self._clock.timings(len(tokens)),
            moves=tuple(self._news.moves),
        )

    async def _prefill(self, kept: KeptSession) -> torch.Tensor:
        """Brings the session to the prompt's end; gives the output's last row, ``[1, hidden]``."""
        shared = _shared_length(kept.cached, self._prompt[:-1])
        del kept.cached[shared:]
        before = self._adapter.prompt_rows
        start = before + shared if kept.has_soft_prompt else 0
        end = before + len(self._prompt)
        self._clock.prefilled_tokens = len(self._prompt) - shared
        done = start

        async def tell_piece(tokens: int) -> None:
            nonlocal done
            done += tokens
            if tokens < end - start:  # there are several pieces
                await self._send(
                    Progress(job=self._request.job, event="prefill", done=done, total=end)
                )

        results = await run_pieces(
            kept.session,
            start,
            end,
            functools.partial(self._make_piece, kept.session),
            is_last_wanted=True,
            on_piece=tell_piece,
        )
        kept.has_soft_prompt = True
        kept.cached = list(self._prompt)
        return self._read_row(kept, results[-1])

    async def _make_piece(self, session: ChainSession, start: int, end: int) -> WireTensor:
        """Some rows of the soft prompt and the prompt, for the wire."""
        before = self._adapter.prompt_rows
        ids = self._prompt[max(0, start - before) : max(0, end - before)]
        parts = []
        if start < before and self._adapter.prompt_PD is not None:
            ends = self._model.ends
            rows_SD = self._adapter.prompt_PD[start:end].to(ends.device, ends.dtype)
            parts.append(
                await self._executor.run(ends.embedding.enter, rows_SD, priority=Priority.PREFILL)
            )
        if ids:
            parts.append(
                await self._executor.run(self._model.embed, ids, priority=Priority.PREFILL)
            )
        return await session.encode(parts[0] if len(parts) == 1 else torch.cat(parts))

    async def _decode(
        self, kept: KeptSession, token: int, hidden_SD: torch.Tensor, news: Generated
    ) -> torch.Tensor:
        """Runs one decode step; gives the output, ``[1, hidden]``.

        The app is told of the token while the step is on its way.
        """
        result = await kept.session.run_step(
            await kept.session.encode(hidden_SD),
            position=self._adapter.prompt_rows + len(kept.cached),
            wanted=Wanted.LAST,
            meanwhile=functools.partial(self._send, news),
        )
        kept.cached.append(token)
        self._clock.on_decode_step(result)
        return self._read_row(kept, result)

    def _read_row(self, kept: KeptSession, result: StepResultRows) -> torch.Tensor:
        if result.hidden is None:
            raise HopFailed(
                "the last hop sent no hidden states where one row was wanted",
                peer=kept.session.chain[-1].peer,
            )
        ends = self._model.ends
        return from_wire(
            result.hidden,
            hidden_size=self._model.identity.config.hidden_size,
            max_tokens=1,
            dtype=ends.dtype,
            device=ends.device,
        )


def _sampling_params(request: Generate) -> SamplingParams:
    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
    )


def _encode_prompt(request: Generate, model: LocalModel) -> list[int]:
    vocabulary = model.identity.config.vocab_size
    if request.prompt_tokens:
        wrong = next((token for token in request.prompt_tokens if token >= vocabulary), None)
        if wrong is not None:
            raise BadRequest(f"token {wrong} is not in the vocabulary of {vocabulary}")
        return list(request.prompt_tokens)
    if request.turns:
        return model.tokenizer.encode_chat(request.turns)
    ids = model.tokenizer.encode(request.prompt)
    if not ids:
        raise BadRequest("the prompt is empty; give some text")
    return ids


def _check_length(
    request: Generate, model: LocalModel, prompt_tokens: int, positions_before: int
) -> int:
    """The most new tokens that this job may make, where an adapter takes some positions."""
    if request.max_new_tokens < 1:
        raise BadRequest("max_new_tokens is 0; at least one token must be asked for")
    most = model.identity.config.max_positions - positions_before
    room = most - prompt_tokens
    if room < 1:
        adapter = f", beside the adapter's {positions_before}," if positions_before else ""
        raise PromptTooLong(
            f"the prompt has {prompt_tokens} tokens, and {model.identity.name} takes "
            f"{most}{adapter} with the answer; shorten it"
        )
    return min(request.max_new_tokens, room)


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


def _wire_chain(session: ChainSession) -> Chain:
    return tuple(ChainHop(peer=hop.peer, start=hop.start, end=hop.end) for hop in session.chain)
