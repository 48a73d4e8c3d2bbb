"""How much a server gives its swarm, as a figure that keeps still.

Pure. Placement weighs what servers say of themselves against each other, so whenever one says
something else, others find better places. What is measured swings, though: by a tenth from minute
to minute on an idle machine, and more where its owner works. What is told is therefore a mean over
much of what was measured, told anew only where it has come to be another figure; and what lasts for
minutes and is no swing any more begins the mean anew.
"""

from __future__ import annotations

import math

LONG_S = 1800.0
"""Of the mean that is told. Of measurements that err by a tenth, each minute anew, it errs by a
hundredth or two."""

LONG_RATIO = 1.05
"""So many times what is told, or as much less, the mean must be: a few times its error."""

SHORT_S = 300.0
SHORT_RATIO = 1.25
"""The mean over a short time must be so many times what is told to be taken in its place: it errs
by three hundredths, and whoever has another load, or another cooling, need not wait for half an
hour."""


class SteadyRate:
    """One figure; see the module.

    Args:
        rate: what was measured first; above zero.
        over_s: for how long that stands.

    Attributes:
        value: what is told.
    """

    def __init__(self, rate: float, *, over_s: float = 60.0) -> None:
        self.value = rate
        self._long, self._short = _Mean(rate, over_s, LONG_S), _Mean(rate, over_s, SHORT_S)

    def on_measured(self, rate: float, over_s: float) -> None:
        """Something was measured.

        Args:
            rate: above zero.
            over_s: for how long it stands.
        """
        for mean in (self._long, self._short):
            mean.add(rate, over_s)
        if _differ(self._short.value, self.value, SHORT_RATIO):
            self.value = self._short.value
            self._long = _Mean(self.value, self._short.known_s, LONG_S)
        elif _differ(self._long.value, self.value, LONG_RATIO):
            self.value = self._long.value


class _Mean:
    """A geometric mean over what is known, in which what is older than some time counts less."""

    def __init__(self, rate: float, known_s: float, settle_s: float) -> None:
        self.value, self.known_s, self._settle_s = rate, known_s, settle_s

    def add(self, rate: float, over_s: float) -> None:
        self.known_s = min(self.known_s + over_s, self._settle_s)
        if self.known_s > 0:
            weight = min(1.0, over_s / self.known_s)
            self.value = math.exp((1 - weight) * math.log(self.value) + weight * math.log(rate))


def _differ(one: float, other: float, ratio: float) -> bool:
    return max(one / other, other / one) > ratio
