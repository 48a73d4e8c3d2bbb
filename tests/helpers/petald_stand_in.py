"""A ``petald`` for the tests of what starts daemons: run as a program, with ``--config FILE``.

It tells of readiness and answers reports as a daemon would, and holds the blocks that it was told.
``device`` in the configuration chooses how it goes wrong.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import tomllib
from pathlib import Path

from p2p.wire.control_messages import (
    Generate,
    ModelSwarm,
    StatusReport,
    StatusRequest,
    SwarmReport,
    SwarmRequest,
)
from tests.helpers.control_stand_in import Conversation, done, pieces, run_stand_in


def main() -> None:
    config = tomllib.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    trouble = config.get("serve", {}).get("device", "")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    print(f"petald stands in, bootstrap={config['network']['bootstrap']}", flush=True)
    if trouble == "dies":
        sys.exit("the model is broken")
    if trouble == "ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    peer = f"12D3KooW{Path(config['daemon']['socket']).parent.name}"

    def serve(conversation: Conversation) -> None:
        while (request := conversation.receive()) is not None:
            if isinstance(request, StatusRequest):
                conversation.send(
                    StatusReport(
                        job=request.job,
                        version="0.1.0",
                        peer=peer,
                        addresses=("/ip4/127.0.0.1/tcp/4001",),
                        pid=os.getpid(),
                        uptime_s=1.0,
                        roles=("anchor",),
                        models=(),
                        peers=(),
                        jobs=0,
                    )
                )
            elif isinstance(request, SwarmRequest):
                swarm = ModelSwarm(
                    model=request.model or "tiny",
                    fingerprint="ab" * 32,
                    blocks=4,
                    coverage=(1, 1, 1, 1),
                    servers=(),
                )
                conversation.send(SwarmReport(job=request.job, models=(swarm,)))
            elif isinstance(request, Generate):
                texts = ["It ", "speaks"]
                conversation.send(*pieces(request.job, texts), done(request.job, texts))

    with run_stand_in(serve, Path(config["daemon"]["socket"])):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect(os.environ["NOTIFY_SOCKET"])
            notify.send(b"STATUS=loading\n")
            if trouble != "never ready":
                notify.send(b"READY=1\nSTATUS=serving\n")
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main()
