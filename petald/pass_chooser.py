"""Parallel chains for forward and backward passes, by what the router knows of the swarm."""

from __future__ import annotations

from collections.abc import Sequence

from petald.errors import MissingBlocks
from petald.local_model import ModelIdentity
from petald.parallel_routing import ChainShare, choose_parallel_chains
from petald.router import REPAIR_VIEW_AGE_S, RETRY_VIEW_AGE_S, VIEW_AGE_S, Router
from petald.swarm import SwarmView


class ModelPassChooser:
    """A `petald.lanes.PassChooser` for one model.

    Args:
        router: keeps the view, and the memory of who failed.
        model: whose blocks are to be run.
        hosted: the full name of an adapter that every server must host; none for none.
    """

    def __init__(self, router: Router, model: ModelIdentity, *, hosted: str | None = None) -> None:
        self._router = router
        self._model = model
        self._hosted = hosted

    async def choose_lanes(
        self, *, start: int, end: int, max_lanes: int, excluded: frozenset[str], is_retry: bool
    ) -> Sequence[ChainShare]:
        """Chains of most throughput, by the newest view if an older one does not do.

        Raises:
            MissingBlocks: nobody can run some of the blocks now.
        """

        def choose(view: SwarmView) -> Sequence[ChainShare]:
            return choose_parallel_chains(
                view,
                start=start,
                end=end,
                max_chains=max_lanes,
                penalties_s=self._router.penalties_s(),
                excluded=excluded,
                hosted=self._hosted,
            )

        age_s = REPAIR_VIEW_AGE_S if is_retry else VIEW_AGE_S
        view = await self._router.read_view(self._model, max_age_s=age_s)
        try:
            return choose(view)
        except MissingBlocks:
            newer = await self._router.read_view(self._model, max_age_s=RETRY_VIEW_AGE_S)
            if newer is view:
                raise
            return choose(newer)

    def penalise(self, peer: str) -> None:
        """A peer did not do its part."""
        self._router.penalise(peer)
