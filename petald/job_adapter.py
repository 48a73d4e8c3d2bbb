"""The adapter of a generation or of a hidden session: where it comes from, and what it means there.

It is read from a folder of this machine and lent to the hops, or hosted by them; a soft prompt is
but rows that stand before the prompt's. Invariant: two jobs have equal keys only if everything that
they compute with an adapter is the same.

Shapes: P rows of a soft prompt, D hidden size.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import torch
import trio

from kernels.adapter_form import row_elements
from kernels.errors import BadAdapter
from kernels.model_config import ModelConfig
from kernels.peft_config import CONFIG_FILE
from kernels.peft_files import TENSORS_FILE, load_adapter
from petald.errors import BadRequest
from petald.lent_adapter import LentAdapter
from petald.local_model import ModelIdentity


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True, eq=False)
class JobAdapter:
    """What a job's steps are run with.

    Attributes:
        key: what it is told from others by.
        lent: works inside the blocks; lent to the hops.
        hosted: the name of one that the hops host; empty for none.
        prompt_PD: rows that come before the prompt's, float32.
    """

    key: Hashable = None
    lent: LentAdapter | None = None
    hosted: str = ""
    prompt_PD: torch.Tensor | None = None

    @property
    def prompt_rows(self) -> int:
        """Rows of the session that come before the prompt's."""
        return 0 if self.prompt_PD is None else self.prompt_PD.shape[0]

    @property
    def positions(self) -> int:
        """Of the model's positions, how many come before the prompt."""
        prefix = 0 if self.lent is None else self.lent.form.prefix_tokens
        return self.prompt_rows + prefix


NO_ADAPTER = JobAdapter()


class AdapterFolders:
    """Reads adapters from folders; one that is in use is not read again while it is unchanged."""

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[Hashable, JobAdapter] = (
            weakref.WeakValueDictionary()
        )

    async def find(self, text: str, model: ModelIdentity) -> JobAdapter:
        """The adapter that an app means.

        Args:
            text: empty for none, a folder's absolute path, or the name of a hosted one.
            model: that it is for.

        Raises:
            BadAdapter: the folder is not there, cannot be read, or does not fit the model.
            BadRequest: it is neither a path nor a name.
        """
        if not text:
            return NO_ADAPTER
        if "/" not in text:
            return JobAdapter(key=text, hosted=text)
        folder = Path(text)
        if not folder.is_absolute() or "\0" in text:
            raise BadRequest(
                f"the adapter {text[:256]!r} is no absolute path; this daemon does not know what "
                "it is relative to"
            )
        key = await trio.to_thread.run_sync(_state_of, folder, model.fingerprint)
        known = self._known.get(key)
        if known is None:
            known = await trio.to_thread.run_sync(_load, folder, model.config, key)
            self._known[key] = known
        return known


def check_lent(adapter: LentAdapter, model: ModelIdentity) -> None:
    """Checks that an adapter can be used for a whole model.

    Raises:
        BadRequest: it is for some blocks alone, or for another model.
    """
    blocks = model.config.num_blocks
    if (adapter.start, adapter.end) != (0, blocks):
        raise BadRequest(
            f"the adapter is for blocks {adapter.start}:{adapter.end}; {model.name} has 0:{blocks}"
        )
    if adapter.values_LE.shape[1] != row_elements(model.config, adapter.form):
        raise BadRequest(f"the adapter was put for another model than {model.name}")


def _state_of(folder: Path, fingerprint: bytes) -> Hashable:
    """What changes when a folder's files do; whoever writes them replaces them."""
    states: list[tuple[int, ...] | None] = []
    for name in (CONFIG_FILE, TENSORS_FILE):
        try:
            status = (folder / name).stat()
        except OSError:
            states.append(None)  # reading it tells what is wrong
        else:
            states.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return (fingerprint, str(folder), *states)


def _load(folder: Path, config: ModelConfig, key: Hashable) -> JobAdapter:
    saved = load_adapter(folder, config)
    if saved.prompt_PD is not None:
        return JobAdapter(key=key, prompt_PD=saved.prompt_PD)
    if saved.form is None or saved.values_LE is None:
        raise BadAdapter(f"{folder} holds neither an adapter of the blocks nor a soft prompt")
    return JobAdapter(key=key, lent=LentAdapter(saved.form, 0, saved.values_LE))
