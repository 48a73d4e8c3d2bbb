"""Sessions of single sequences through the whole model, for hidden states.

Shapes: S tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence

import torch

from p2p.wire.training_messages import ROWS_BYTES, OpenHiddenSession, RunHiddenStep
from petalctl.errors import CommandError
from petalctl.passes import TrainingClient
from petalctl.torch.adapters import RemoteAdapter
from petalctl.torch.blocks import daemon_of
from petalctl.torch.wire_tensors import from_wire, to_wire


class HiddenSession:
    """A session; making it opens it on the servers.

    Args:
        client: a connection.
        model: a name that the daemon routes for.
        max_tokens: the most that will be cached.
        adapter: works inside the blocks.
        hosted: the name of an adapter that servers host; empty for none.
        max_wait_s: how long to wait where no server can run some blocks.

    Raises:
        JobError, DaemonUnreachable: it could not be opened.
    """

    def __init__(
        self,
        client: TrainingClient,
        *,
        model: str,
        max_tokens: int,
        adapter: RemoteAdapter | None = None,
        hosted: str = "",
        max_wait_s: float | None = None,
    ) -> None:
        self.client = client
        self._name = secrets.token_hex(8)
        self._position = 0
        number = None if adapter is None else daemon_of(client).put_adapter(client, adapter, model)
        client.open_hidden_session(
            OpenHiddenSession(
                job=0,
                model=model,
                session=self._name,
                max_tokens=max_tokens,
                adapter=number,
                hosted=hosted,
                max_wait_s=max_wait_s,
            )
        )

    def next_step(self, rows_SD: torch.Tensor) -> RunHiddenStep:
        """The step that runs the next rows; it must be run."""
        step = RunHiddenStep(
            job=0, session=self._name, position=self._position, hidden=to_wire(rows_SD)
        )
        self._position += rows_SD.shape[0]
        return step

    def close(self) -> None:
        """Ends it on every server."""
        with contextlib.suppress(CommandError):
            self.client.close_hidden_session(self._name)


def run_sessions(
    sessions: Sequence[HiddenSession], rows: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Runs the next rows of several sessions of one client, all at once.

    Args:
        sessions: of one client.
        rows: ``[S, D]`` for each, at least one; more than a message holds go one part after the
            other.

    Returns:
        The output of each one's last row, ``[D]``, in the dtype and on the device of its rows.

    Raises:
        JobError, DaemonUnreachable: the swarm could not do it.
    """
    parts = [
        torch.split(rows_SD, max(1, ROWS_BYTES // (rows_SD.shape[1] * rows_SD.itemsize)))
        for rows_SD in rows
    ]
    last: list[torch.Tensor] = list(rows)
    for number in range(max(map(len, parts), default=0)):
        chosen = [index for index, own in enumerate(parts) if number < len(own)]
        steps = [sessions[index].next_step(parts[index][number]) for index in chosen]
        answers = sessions[0].client.run_hidden_steps(steps)
        for index, done in zip(chosen, answers, strict=True):
            last[index] = from_wire(done.hidden)[-1].to(rows[index])
    return last
