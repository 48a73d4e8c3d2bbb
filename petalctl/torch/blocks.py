"""Blocks of a model that run in the swarm, as a module whose gradients are torch's.

Forward sends hidden states through the daemon; backward, their gradient. The weights of the blocks
are constants. Invariant: a forward pass that the daemon keeps is run back, or forgotten.

Shapes: B sequences, S tokens of each, D hidden size, L blocks, E numbers of an adapter's block.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from kernels.model_config import ModelConfig
from p2p.wire.control_messages import Chain, ChainMove, Progress
from p2p.wire.training_messages import (
    AdapterGradient,
    BackwardDone,
    BatchRows,
    ForwardBatch,
    ForwardDone,
    PassTimings,
)
from petalctl.errors import JobError
from petalctl.passes import TrainingClient
from petalctl.torch.adapters import RemoteAdapter
from petalctl.torch.wire_tensors import DTYPES, from_wire, mask_to_wire, to_wire

OnProgress = Callable[[Progress], None]

_Version = tuple[int, int, int, str]


class Daemon:
    """What the app has put on a connection; one for all modules that share the client.

    It does not hold the client, by which it is found.
    """

    def __init__(self) -> None:
        self._put: dict[int, tuple[weakref.ref[RemoteAdapter], _Version | None]] = {}
        self._forgotten: deque[int] = deque()

    def put_adapter(
        self,
        client: TrainingClient,
        adapter: RemoteAdapter,
        model: str,
        values_LE: torch.Tensor | None = None,
    ) -> int:
        """Gives the daemon an adapter, unless it has these very numbers; gives its number there.

        Args:
            client: of the daemon.
            adapter: the adapter.
            model: a name that the daemon routes for.
            values_LE: its numbers, where they are not those that it has now.

        Raises:
            JobError: the daemon does not take it.
        """
        given = adapter.values if values_LE is None else values_LE
        values = given.detach()
        if values.dtype != torch.float64:
            values = values.float()
        # Whoever writes to ``values.data`` changes no version: hence the sum of the bits.
        bits = values.contiguous().view(torch.int32).sum(dtype=torch.int64).item()
        version = (given._version, given.data_ptr(), int(bits), model)
        number = next((n for n, (ref, _) in self._put.items() if ref() is adapter), None)
        if number is None:
            gone = [n for n, (ref, _) in self._put.items() if ref() is None]
            number = gone[0] if gone else len(self._put)
        elif self._put[number][1] == version:
            return number
        self._put[number] = (weakref.ref(adapter), None)  # until all of it is there
        client.put_adapter(
            number,
            shape=adapter.shape,
            start=0,
            end=adapter.config.num_blocks,
            values=to_wire(values),
            model=model,
        )
        self._put[number] = (weakref.ref(adapter), version)
        return number

    def forget_soon(self, forward: int) -> None:
        """Lets the daemon forget a forward pass with the next request; safe in a finaliser."""
        self._forgotten.append(forward)

    def forget_now(self, client: TrainingClient) -> None:
        """Tells the daemon which forward passes it may forget."""
        while self._forgotten:
            client.forget_forward(self._forgotten.popleft())


_daemons: weakref.WeakKeyDictionary[TrainingClient, Daemon] = weakref.WeakKeyDictionary()


def daemon_of(client: TrainingClient) -> Daemon:
    """What is known of a client's daemon."""
    daemon = _daemons.get(client)
    if daemon is None:
        daemon = _daemons[client] = Daemon()
    return daemon


class RemoteBlocks(nn.Module):
    """The blocks ``[start, end)`` of a model.

    Args:
        model: a name that the daemon routes for; needed where it routes for several.
        start: first block.
        end: the block after the last one; none for the model's end.
        client: a connection; a new one to this machine's daemon if none is given.
        adapter: works inside the blocks, and gets gradients; covers all blocks of the model.
        hosted: the name of an adapter that servers host, to run, and train, on top of.
        pieces_under_way: the most pieces of a batch on their way at once in each chain; 0 lets the
            daemon choose.
        max_wait_s: how long to wait where no server can run some blocks; none lets the daemon's
            configuration say.
        on_progress: called with what happens to the passes.

    Attributes:
        timings: of the last pass.
        moves: blocks that moved to other servers in the last pass.
        chains: the parallel chains of the last pass.
    """

    timings: PassTimings
    moves: tuple[ChainMove, ...]
    chains: tuple[Chain, ...]

    def __init__(
        self,
        model: str = "",
        start: int = 0,
        end: int | None = None,
        *,
        client: TrainingClient | None = None,
        adapter: RemoteAdapter | None = None,
        hosted: str = "",
        pieces_under_way: int = 0,
        max_wait_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.start = start
        self.end = end
        self.client = TrainingClient() if client is None else client
        self.adapter = adapter
        self.hosted = hosted
        self.pieces_under_way = pieces_under_way
        self.max_wait_s = max_wait_s
        self.on_progress = on_progress
        self.timings = PassTimings(total_s=0, pieces=0, hop_compute_s=0, hop_queue_s=0)
        self.moves = ()
        self.chains = ()

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Runs hidden states through the blocks.

        Args:
            hidden_states: ``[B, S, D]``, float64, float32, bfloat16 or float16.
            attention_mask: ``[B, S]``, 0 for padding; none where all tokens are real.

        Returns:
            Hidden states of the same shape, dtype and device.

        Raises:
            ValueError: the shapes do not fit, or numbers are not finite.
            JobError, DaemonUnreachable: the swarm could not do it.
        """
        _check(hidden_states, attention_mask)
        values = None
        if self.adapter is not None:
            values = self.adapter.values
            _check_against(self.adapter.config, hidden_states, self.start, self.end)
        # Within a function of autograd, nothing tells whether there will be a graph.
        is_kept = torch.is_grad_enabled() and (
            hidden_states.requires_grad or (values is not None and values.requires_grad)
        )
        output: torch.Tensor = _RemotePass.apply(  # type: ignore[no-untyped-call]
            hidden_states, values, attention_mask, self, is_kept
        )
        return output

    def extra_repr(self) -> str:
        """What it is, for ``repr``."""
        return f"{self.model or 'the model'}, blocks {self.start}:{self.end or ''}"

    def run_forward(
        self,
        hidden_BSD: torch.Tensor,
        values_LE: torch.Tensor | None,
        mask_BS: torch.Tensor | None,
        *,
        is_kept: bool,
    ) -> tuple[int, torch.Tensor]:
        """Runs a batch; gives the number of the pass, and the output, on the CPU."""
        daemon = daemon_of(self.client)
        daemon.forget_now(self.client)
        number = None
        if self.adapter is not None and values_LE is not None:
            number = daemon.put_adapter(self.client, self.adapter, self.model, values_LE)
        batch, tokens, width = hidden_BSD.shape
        output = _Gatherer(batch * tokens, width, hidden_BSD.dtype)
        request = ForwardBatch(
            job=0,
            model=self.model,
            start=self.start,
            end=self.end or 0,
            sequences=batch,
            tokens=tokens,
            mask=None if mask_BS is None else mask_to_wire(mask_BS),
            adapter=number,
            hosted=self.hosted,
            is_kept=is_kept,
            pieces_under_way=self.pieces_under_way,
            max_wait_s=self.max_wait_s,
        )
        forward, done = self.client.run_forward(
            request,
            to_wire(hidden_BSD.detach().reshape(batch * tokens, width)),
            on_rows=output.take,
            on_progress=self.on_progress,
        )
        self._note(done)
        return forward, output.whole().view(batch, tokens, width)

    def run_backward(
        self, forward: int, gradient_BSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Takes a gradient back through a kept pass; gives the input's and the adapter's."""
        daemon_of(self.client).forget_now(self.client)
        batch, tokens, width = gradient_BSD.shape
        of_input = _Gatherer(batch * tokens, width, gradient_BSD.dtype)
        of_adapter_LE = None if self.adapter is None else torch.zeros_like(self.adapter.values)

        def take(gradient: AdapterGradient) -> None:
            assert of_adapter_LE is not None
            values_LE = from_wire(gradient.values)
            rows = slice(gradient.first, gradient.first + values_LE.shape[0])
            of_adapter_LE[rows] = values_LE.to(of_adapter_LE)

        done = self.client.run_backward(
            forward,
            to_wire(gradient_BSD.detach().reshape(batch * tokens, width)),
            tokens=tokens,
            on_rows=of_input.take,
            on_gradient=take,
            on_progress=self.on_progress,
        )
        self._note(done)
        return of_input.whole().view(batch, tokens, width), of_adapter_LE

    def _note(self, done: ForwardDone | BackwardDone) -> None:
        self.timings = done.timings
        self.moves = done.moves
        self.chains = done.chains


class _Kept:
    """A forward pass that the daemon keeps; lives as long as a graph that may be run back.

    Attributes:
        number: of the pass.
    """

    def __init__(self, daemon: Daemon, number: int) -> None:
        self.number = number
        self._forget = weakref.finalize(self, daemon.forget_soon, number)
        self._forget.atexit = False

    def has_run_back(self) -> None:
        """The daemon has forgotten it."""
        self._forget.detach()


class _RemotePass(torch.autograd.Function):
    """One batch through `RemoteBlocks`, and its gradient back."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_BSD: torch.Tensor,
        values_LE: torch.Tensor | None,
        mask_BS: torch.Tensor | None,
        blocks: RemoteBlocks,
        is_kept: bool,
    ) -> torch.Tensor:
        number, output_BSD = blocks.run_forward(hidden_BSD, values_LE, mask_BS, is_kept=is_kept)
        if is_kept:
            ctx.save_for_backward(hidden_BSD, values_LE, mask_BS)
            ctx.blocks = blocks
            ctx.kept = _Kept(daemon_of(blocks.client), number)
        return output_BSD.to(hidden_BSD.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BSD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_BSD, values_LE, mask_BS = ctx.saved_tensors
        blocks: RemoteBlocks = ctx.blocks
        if not bool(torch.isfinite(gradient_BSD).all()):
            raise ValueError(
                "the gradient has numbers that are not finite; lower the learning rate, or clip "
                "gradients"
            )
        try:
            input_BSD, of_adapter_LE = blocks.run_backward(ctx.kept.number, gradient_BSD)
        except JobError as error:
            if error.code != "unknown_forward":
                raise
            # It was run back already (retain_graph).
            ctx.kept.has_run_back()
            number, _ = blocks.run_forward(hidden_BSD, values_LE, mask_BS, is_kept=True)
            ctx.kept = _Kept(daemon_of(blocks.client), number)
            input_BSD, of_adapter_LE = blocks.run_backward(number, gradient_BSD)
        ctx.kept.has_run_back()
        if of_adapter_LE is not None and values_LE is not None:
            of_adapter_LE = of_adapter_LE.to(values_LE.device)
        return input_BSD.to(hidden_BSD.device), of_adapter_LE, None, None, None


class _Gatherer:
    """Puts rows, as they come, to where they belong in a batch."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        self._rows_SD = torch.empty(rows, width, dtype=dtype)
        self._missing = rows

    def take(self, rows: BatchRows) -> None:
        part_SD = from_wire(rows.hidden)
        self._rows_SD[rows.row : rows.row + part_SD.shape[0]] = part_SD.to(self._rows_SD.dtype)
        self._missing -= part_SD.shape[0]

    def whole(self) -> torch.Tensor:
        if self._missing:
            raise JobError(
                "remote_protocol_error",
                f"the daemon's answer lacks {self._missing} of {len(self._rows_SD)} rows; are "
                "petald and petalctl of one version?",
            )
        return self._rows_SD


def _check_against(config: ModelConfig, hidden: torch.Tensor, start: int, end: int | None) -> None:
    if hidden.shape[2] != config.hidden_size:
        raise ValueError(
            f"hidden states have the shape {list(hidden.shape)}; "
            f"[sequences, tokens, {config.hidden_size}] was expected"
        )
    if not 0 <= start < (config.num_blocks if end is None else end) <= config.num_blocks:
        raise ValueError(
            f"blocks {start}:{'' if end is None else end} are not within 0:{config.num_blocks}"
        )


def _check(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> None:
    if hidden_states.dim() != 3 or 0 in hidden_states.shape:
        raise ValueError(
            f"hidden states have the shape {list(hidden_states.shape)}; "
            "[sequences, tokens, hidden size] was expected"
        )
    if hidden_states.dtype not in DTYPES.values():
        raise ValueError(f"hidden states are {hidden_states.dtype}; floats were expected")
    if mask is not None and mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"the attention mask has the shape {list(mask.shape)}; "
            f"{list(hidden_states.shape[:2])} was expected"
        )
    if not bool(torch.isfinite(hidden_states).all()):
        raise ValueError("hidden states have numbers that are not finite")
