"""How long something has said nothing, and from when on that means something. Counted in leases (`lease_s`).

After one lease a worker counts as lost: what it did is given to others, what it does is not waited for. What stands in
the store under a lease lasts for `LASTING_LEASES`: writes may be late, and the store slow. After `HUNG_LEASES` a
process that is there and says nothing hangs, and is killed. A worker that has no controller outlives that of a hung one
several times over, so that the next one finds it (`least_orphan_s`), and requests wait for lost experts until the next
one has had them loaded (`least_reroute_s`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

LASTING_LEASES = 3
HUNG_LEASES = 5
HEARTBEATS = 10  # of a controller to a worker, and back, within a lease
RENEWALS = 10  # of what lasts in the store, within the time that it does
ORPHAN_PATIENCE = 3  # times as long as a controller hangs until it is killed
ORPHAN_SHARE = 0.25  # of the time after which workers end, a controller may hang: the rest is for the next one to come
SUCCESSION_S = 20.0  # for a controller to come however short the leases: a process, the model's shapes, the lead
SUCCESSION_LEASES = 2  # that it then waits: for workers to obey it, and until those that say nothing count as lost


def least_orphan_s(lease_s: float) -> float:
    """The least time for which workers must live without a controller, in seconds."""
    return max(SUCCESSION_S, ORPHAN_PATIENCE * HUNG_LEASES * lease_s)


def least_reroute_s(lease_s: float) -> float:
    """The least time for which requests must wait for experts that nobody holds, in seconds; loading them comes on top.

    Whoever would have had them loaded may hang just then.
    """
    return HUNG_LEASES * lease_s + _succession_s(lease_s)


def hung_after_s(lease_s: float, orphan_timeout_s: float, reroute_timeout_s: float) -> float:
    """How long a controller may not go on until it is killed: as long as a worker, and longer while nobody minds.

    Workers mind who end for want of one, and requests that wait for what the next one does.
    """
    return max(HUNG_LEASES * lease_s, min(ORPHAN_SHARE * orphan_timeout_s, reroute_timeout_s - _succession_s(lease_s)))


def _succession_s(lease_s: float) -> float:
    return SUCCESSION_S + SUCCESSION_LEASES * lease_s


class ListeningTime:
    """Time in which somebody listened, looking about every `look_s`.

    Of a look that comes late little counts, and only at the next one: what was said meanwhile is yet to be read, and
    where the whole machine stood still, whoever is listened to could say nothing either.
    """

    def __init__(self, look_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_s = 2 * look_s
        self._clock = clock
        self._looked_at = clock()
        self._late_s = 0.0  # of the last look, where that came late

    def passed_s(self) -> float:
        """What has come to count since the last look."""
        before, self._looked_at = self._looked_at, self._clock()
        passed_s, is_late = self._looked_at - before, self._looked_at - before > self._most_s
        counts_s = self._late_s + (0.0 if is_late else passed_s)
        self._late_s = self._most_s if is_late else 0.0
        return counts_s
