"""From a configuration to a running daemon and an exit status."""

from __future__ import annotations

import trio

from kernels.errors import KernelError
from p2p.errors import P2PError
from petald.config import Config
from petald.daemon import run_daemon
from petald.errors import PetaldError, leaves
from petald.log import configure_logging, get_logger

log = get_logger(__name__)


def run(config: Config) -> int:
    """Runs the daemon; gives 0 after a signal, 1 when it could not start or had to give up."""
    configure_logging(config.daemon)
    status = 0
    try:
        trio.run(run_daemon, config)
    except* (PetaldError, P2PError, KernelError) as group:
        for error in leaves(group):
            code = getattr(error, "code", "error")
            log.error("petald cannot go on", code=code, reason=str(error))
        status = 1
    return status
