"""When a server that may host any of several models takes another one than it has.

Pure: a driver feeds what the swarms of all the models are like, and does what `on_look` says.
Taking another model is dear, since nothing that is loaded helps with it: so it is done where that
closes a gap, or lifts the worst served of the two models clearly, only after a second look at a
time by chance, and seldom. Invariant: a server never leaves blocks that nobody else serves and
stays on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from petald.span_choice import ModelOffer, choose_span

M = TypeVar("M", bound=Hashable)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceSettings:
    """How another model is weighed.

    Attributes:
        look_s: between two looks at the swarms of all the models, about.
        confirm_s: between the first look that finds another model better and the second, on
            average. Servers that see the same gap look at different times, and the later ones see
            the claim of the first.
        known_s: what was announced so long ago is in every view that is read now: see
            `petald.move_actions`.
        stay_s: a model is kept for so long where no blocks of another one are without a server.
        urgent_stay_s: where some are.
        min_gain: by so many times the worst served of the two models must be lifted.
    """

    look_s: float = 120.0
    confirm_s: float = 60.0
    known_s: float = 45.0
    stay_s: float = 3600.0
    urgent_stay_s: float = 60.0
    min_gain: float = 1.25


class ModelChoice(Generic[M]):
    """Decides for one server, from when it serves a model.

    Args:
        current: the model that it serves.
        settings: how others are weighed.
        now: the time, in seconds.
        rng: of delays, and of choices among equals.
    """

    def __init__(
        self, current: M, *, settings: ChoiceSettings, now: float, rng: random.Random
    ) -> None:
        self._current = current
        self._settings = settings
        self._since = now
        self._rng = rng
        self._is_confirming = False
        self._deadline = now + self._some(settings.look_s)

    def next_deadline(self) -> float:
        """When the swarms are to be looked at next."""
        return self._deadline

    def on_look(
        self, span: tuple[int, int], offers: Mapping[M, ModelOffer], now: float
    ) -> M | None:
        """Looks at the swarms.

        Args:
            span: that is served now.
            offers: of all the models, the current one among them; this server is in no load.
            now: when the reading of the views began.

        Returns:
            The model to take, where two looks have found one; none: stay.
        """
        settings = self._settings
        found = self.find_better(span, offers, now)
        was_confirming, self._is_confirming = self._is_confirming, found is not None
        wait_s = settings.look_s if found is None else settings.confirm_s
        self._deadline = now + self._some(wait_s)
        return found if was_confirming else None

    def on_stayed(self, now: float) -> None:
        """The model that was to be taken was not, after all."""
        self._is_confirming = False
        self._deadline = now + self._some(self._settings.look_s)

    def find_better(
        self, span: tuple[int, int], offers: Mapping[M, ModelOffer], now: float
    ) -> M | None:
        """The model that needs this server more than the current one does; see `on_look`."""
        settings = self._settings
        own = offers[self._current]
        start, end = span
        stayed_s = now - self._since
        is_gap_L = (own.load.planned_L == 0) & own.is_here  # what is not here it cannot cover
        is_gap_L[start:end] = False
        if stayed_s < settings.urgent_stay_s or is_gap_L.any() or not can_leave(own, span):
            return None
        gains: dict[M, tuple[float, float]] = {}
        for name, offer in offers.items():
            if name == self._current or offer.capacity.fit < 1:
                continue
            covered = offer.coverable
            lift = self._lift(own, span, offer)
            if covered or (stayed_s >= settings.stay_s and lift >= settings.min_gain):
                gains[name] = covered, lift
        if not gains:
            return None
        most = max(gains.values())
        return self._rng.choice([name for name, gain in gains.items() if gain == most])

    def _lift(self, own: ModelOffer, span: tuple[int, int], other: ModelOffer) -> float:
        """By how many times the worst served of the two models gains, should this server change."""
        start, end = span
        without_own_L = own.load.throughput_L / own.load.share
        with_own_L = without_own_L.copy()
        with_own_L[start:end] += own.load.speed_of(own.capacity) / (end - start)
        new_start, new_end = choose_span(other.load, other.capacity, rng=self._rng)
        before_new_L = other.load.throughput_L / other.load.share
        with_new_L = before_new_L.copy()
        with_new_L[new_start:new_end] += other.load.speed_of(other.capacity) / (new_end - new_start)
        before = min(float(with_own_L.min()), float(before_new_L.min()))
        after = min(float(without_own_L.min()), float(with_new_L.min()))
        if before <= 0:
            return math.inf if after > 0 else 0.0
        return after / before

    def _some(self, mean_s: float) -> float:
        return mean_s * self._rng.uniform(0.5, 1.5)


def can_leave(own: ModelOffer, span: tuple[int, int]) -> bool:
    """Whether somebody else serves every block of a span, and stays on it."""
    return bool((own.load.settled_L[slice(*span)] > 0).all())
