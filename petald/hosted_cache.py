"""A session's cache in the arena of a hosted span, and the adapters that the session runs with.

The adapters' prefixes are the first tokens of the sequence in the arena. Nobody outside sees them:
positions and lengths here are the session's own. Invariant: the prefixes stay where they are,
whatever is cut back. Used on the device's thread alone.
"""

from __future__ import annotations

import torch

from kernels.adapter import SpanAdapter
from kernels.kv_cache import CacheArena, SequenceCache
from kernels.span import Span


class HostedCache:
    """One session's; made by `open_hosted_cache`.

    Attributes:
        sequence: the arena's, prefixes included.
        adapters: of the session, in the order of their prefixes.
        prefix_tokens: of all adapters together.
    """

    def __init__(self, sequence: SequenceCache, adapters: tuple[SpanAdapter, ...]) -> None:
        self.sequence = sequence
        self.adapters = adapters
        self.prefix_tokens = count_prefix_tokens(adapters)

    @property
    def length(self) -> int:
        """How many tokens of the session are cached."""
        return self.sequence.length - self.prefix_tokens

    @property
    def shape(self) -> tuple[int, int]:
        """Key and value heads, and head size."""
        return self.sequence.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.sequence.dtype

    @property
    def row_bytes(self) -> int:
        """What one token's keys, or its values, take in one block."""
        return self.sequence.row_bytes

    def extend(self, length: int) -> None:
        """As `SequenceCache.extend`."""
        self.sequence.extend(self.prefix_tokens + length)

    def truncate(self, length: int) -> None:
        """As `SequenceCache.truncate`."""
        self.sequence.truncate(self.prefix_tokens + length)

    def read(self, block: int, position: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `SequenceCache.read`."""
        return self.sequence.read(block, self.prefix_tokens + position, tokens)

    def write(
        self, block: int, position: int, keys_KTH: torch.Tensor, values_KTH: torch.Tensor
    ) -> None:
        """As `SequenceCache.write`."""
        self.sequence.write(block, self.prefix_tokens + position, keys_KTH, values_KTH)

    def close(self) -> None:
        """Gives the room back; may be called again."""
        self.sequence.close()


def open_hosted_cache(
    arena: CacheArena, span: Span, max_tokens: int, adapters: tuple[SpanAdapter, ...]
) -> HostedCache:
    """Promises room for a session and its adapters' prefixes, and writes these.

    Raises:
        CacheFull: there is not so much left.
    """
    sequence = arena.open(max_tokens + count_prefix_tokens(adapters))
    try:
        span.write_prefixes(sequence, adapters)
    except BaseException:
        sequence.close()
        raise
    return HostedCache(sequence, adapters)


def count_prefix_tokens(adapters: tuple[SpanAdapter, ...]) -> int:
    """How many tokens stand before every session with these adapters."""
    return sum(adapter.prefix_tokens for adapter in adapters)
