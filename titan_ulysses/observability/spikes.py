"""Loss spikes: a logged loss far above the running median of those before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW = 32
"""How many logged losses the median is of."""
_LEAST = 16
"""So many losses must be known before one can be a spike."""
_DEVIATIONS = 8.0
_FLAT = 0.02
"""The least deviation, as a fraction of the median: a flat loss must not make noise a spike."""


class LossSpikes:
    """Says of each logged loss whether it is a spike, given those logged `earlier`.

    That is more than 8 median absolute deviations, scaled to a standard deviation, above the
    median of the last 32 finite losses. A level that stays is the median after 16 of them.
    """

    def __init__(self, earlier: Iterable[float] = ()):
        self._last: deque[float] = deque(earlier, maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        known = [*self._last]
        self._last.append(loss)
        if len(known) < _LEAST:
            return False
        middle = median(known)
        deviation = 1.4826 * median(abs(one - middle) for one in known)
        return loss - middle > _DEVIATIONS * max(deviation, _FLAT * abs(middle))
