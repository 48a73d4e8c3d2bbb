"""What an adapter looks like on the wire, to servers and to the daemon of one's own machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from p2p.wire.message import Bound

Rank = Annotated[int, Bound(0, 1024)]
PrefixTokens = Annotated[int, Bound(0, 4096)]
Scaling = Annotated[float, Bound(-1e6, 1e6)]
Target = Annotated[str, Bound(1, 64)]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterShape:
    """An adapter without its numbers; see `kernels.adapter_form.AdapterForm`.

    Attributes:
        targets: the linear layers with a low-rank pair, by their names in the checkpoint.
        rank: of the pairs.
        scaling: of their product.
        prefix_tokens: keys and values before every sequence.
    """

    targets: Annotated[tuple[Target, ...], Bound(0, 16)] = ()
    rank: Rank = 0
    scaling: Scaling = 1.0
    prefix_tokens: PrefixTokens = 0
