"""Becomes another program that the kernel ends when the process that started it has died.

Run as a file, without site packages: ``child_launcher.py PARENT_PID PROGRAM ARGUMENTS``. It asks
for the signal and then becomes the program, which keeps it. Doing so in the parent, between fork
and exec, would not be safe beside its threads. Nothing of this project is imported here.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _main() -> None:
    parent, program = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        sys.exit(f"prctl: {os.strerror(number)}")
    if os.getppid() != parent:
        return  # it died before it could be asked for
    os.execv(program[0], program)


if __name__ == "__main__":
    _main()
