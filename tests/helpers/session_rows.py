"""What a model computes, as arithmetic that any lost, doubled or misplaced row changes for good.

A block keeps a running digest of its inputs, as attention sees all tokens before, and its output
depends on that digest and the block's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FIRST, SECOND, MASK = 6364136223846793005, 1442695040888963407, (1 << 61) - 1
PREFILL_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SimRows:
    """Rows of one number each."""

    values: tuple[int, ...]
    codec = "raw"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.values), 1)


class ListHistory:
    """A `History` in a list."""

    open_histories = 0

    def __init__(self) -> None:
        self.values: list[int] = []
        ListHistory.open_histories += 1

    @property
    def rows(self) -> int:
        return len(self.values)

    def append(self, hidden: SimRows) -> None:
        self.values += hidden.values

    def truncate(self, rows: int) -> None:
        del self.values[rows:]

    def read(self, start: int, end: int) -> SimRows:
        assert 0 <= start < end <= len(self.values)
        return SimRows(tuple(self.values[start:end]))

    def close(self) -> None:
        ListHistory.open_histories -= 1


def mix(one: int, other: int) -> int:
    return ((one * FIRST + other * SECOND + 1) ^ (one >> 29)) & MASK


class SimBlocks:
    """Some consecutive blocks, with their cache.

    Args:
        tells_steps_apart: the outputs show how long the step was that they came of.
        last_bits: of whoever computes here; 0 where all compute alike.
    """

    def __init__(
        self, start: int, end: int, *, tells_steps_apart: bool = False, last_bits: int = 0
    ) -> None:
        self.start, self.end = start, end
        self.tells_steps_apart = tells_steps_apart
        self.last_bits = last_bits
        self.inputs: list[int] = []
        self.digests: list[list[int]] = [[] for _ in range(start, end)]

    def run(self, position: int, values: Sequence[int]) -> tuple[int, ...]:
        """The outputs of one step."""
        del self.inputs[position:]
        self.inputs += values
        outputs = []
        for digests in self.digests:
            del digests[position:]
        columns = [(d, block + self.last_bits) for block, d in enumerate(self.digests, self.start)]
        for value in values:
            for digests, block in columns:
                if self.tells_steps_apart:
                    value = mix(value, len(values))
                before = digests[-1] if digests else 7
                # `mix`, twice, without the calls: most of a test's time is spent here.
                digest = ((before * FIRST + value * SECOND + 1) ^ (before >> 29)) & MASK
                digests.append(digest)
                value = ((digest * FIRST + block * SECOND + 1) ^ (digest >> 29)) & MASK
            outputs.append(value)
        return tuple(outputs)

    def copy_block(self, other: SimBlocks, block: int, tokens: int) -> None:
        """Takes over what another has cached in one block; the first one tells of the inputs."""
        if not block:
            self.inputs = other.inputs[:tokens]
        self.digests[block] = other.digests[block][:tokens]


def expected_tokens(
    num_blocks: int, prompt: tuple[int, ...], count: int, *, tells_steps_apart: bool = False
) -> list[int]:
    """What an undisturbed chain makes of a prompt."""
    model = SimBlocks(0, num_blocks, tells_steps_apart=tells_steps_apart)
    last = 0
    for start in range(0, len(prompt), PREFILL_TOKENS):
        last = model.run(start, prompt[start : start + PREFILL_TOKENS])[-1]
    made = []
    for position in range(len(prompt), len(prompt) + count):
        made.append(last % 1009)
        if len(made) < count:
            last = model.run(position, (made[-1],))[-1]
    return made
