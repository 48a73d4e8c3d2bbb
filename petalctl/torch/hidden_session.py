"""One sequence's session through the whole model, for hidden states.

Shapes: S tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import secrets

import torch

from p2p.wire.training_messages import OpenHiddenSession, RunHiddenStep
from petalctl.errors import CommandError
from petalctl.passes import TrainingClient
from petalctl.torch.adapters import RemoteAdapter
from petalctl.torch.blocks import daemon_of
from petalctl.torch.wire_tensors import from_wire, to_wire


class HiddenSession:
    """A session; opened by its first step.

    Args:
        client: a connection.
        prompt_SD: the first rows.
        model: a name that the daemon routes for.
        max_tokens: the most that will be cached.
        adapter: works inside the blocks.
        hosted: the name of an adapter that servers host; empty for none.
        max_wait_s: how long to wait where no server can run some blocks.
    """

    def __init__(
        self,
        client: TrainingClient,
        prompt_SD: torch.Tensor,
        *,
        model: str,
        max_tokens: int,
        adapter: RemoteAdapter | None = None,
        hosted: str = "",
        max_wait_s: float | None = None,
    ) -> None:
        self._client = client
        self._prompt_SD = prompt_SD
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

    def run_prompt(self) -> torch.Tensor:
        """Runs the first rows; gives the last one's output, ``[D]``."""
        return self.run(self._prompt_SD)

    def run(self, rows_SD: torch.Tensor) -> torch.Tensor:
        """Runs the next rows; gives the last one's output, ``[D]``.

        Raises:
            JobError, DaemonUnreachable: the swarm could not do it.
        """
        done = self._client.run_hidden_step(
            RunHiddenStep(
                job=0, session=self._name, position=self._position, hidden=to_wire(rows_SD)
            )
        )
        self._position += rows_SD.shape[0]
        return from_wire(done.hidden)[-1].to(rows_SD.dtype)

    def close(self) -> None:
        """Ends it on every server."""
        with contextlib.suppress(CommandError):
            self._client.close_hidden_session(self._name)
