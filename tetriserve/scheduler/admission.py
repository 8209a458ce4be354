"""Who may enter a queue that several clients share, so that the flood of one does not keep another out.

What was let in is never put out again, so fairness is decided at the door: the last places are kept for clients
that have less than their equal share of all the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RESERVE_SHARE = 8
"""One place in so many is kept: a newcomer finds room at once, the flood of a client alone loses little."""


@dataclass(frozen=True)
class Admission:
    """The limits of one queue.

    Attributes:
        places: requests that may be open at a time.
        per_client: ... of one client; None for as many as there are places.
        shared: whether more than one client is expected; else nothing is kept for others.
    """

    places: int
    per_client: int | None = None
    shared: bool = False

    @property
    def reserve(self) -> int:
        """Places kept for those below their share."""
        return min(-(-self.places // RESERVE_SHARE), self.places - 1) if self.shared else 0

    def share(self, clients: int) -> int:
        """The equal share of each of so many clients, at least one place."""
        return max(1, (self.places - self.reserve) // clients)

    def refusal(self, client: str | None, open_requests: Mapping[str | None, int]) -> str | None:
        """Why one more request of `client` may not enter, or None.

        Args:
            open_requests: by client, those with none left out.
        """
        total, own = sum(open_requests.values()), open_requests.get(client, 0)
        if total >= self.places:
            return f"{total} requests are open, allowed are {self.places}"
        if self.per_client is not None and own >= self.per_client:
            return f"{own} requests of this client are open, allowed are {self.per_client}"
        share = self.share(len({*open_requests, client}))
        if total >= self.places - self.reserve and own >= share:
            return (
                f"{own} requests of this client are open, its share is {share}, and the last {self.reserve} places "
                "are kept for others"
            )
        return None
