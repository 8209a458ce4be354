"""Who may enter a shared queue: nobody's flood keeps another client out, and no place is wasted on nobody."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tetriserve.scheduler.admission import Admission


class Queue:
    """Open requests by client; ends one at random."""

    def __init__(self, admission: Admission, dice: random.Random) -> None:
        self.admission, self.dice = admission, dice
        self.open: Counter[str | None] = Counter()

    def enter(self, client: str | None) -> bool:
        entered = self.admission.refusal(client, +self.open) is None
        self.open[client] += entered
        return entered

    def flood(self, *clients: str) -> None:
        """Each asks until all of them are refused."""
        asking = list(clients)
        while asking:
            client = self.dice.choice(asking)
            if not self.enter(client):
                asking.remove(client)

    def end_one(self) -> None:
        self.open[self.dice.choice(list((+self.open).elements()))] -= 1


PLACES = st.integers(1, 300)
SEEDS = st.integers(0, 2**32)


@given(PLACES, SEEDS, st.integers(1, 6))
def test_one_flood_after_the_other_fills_the_queue_but_for_the_reserve(
    places: int, seed: int, clients: int
) -> None:
    admission = Admission(places, shared=True)
    queue = Queue(admission, random.Random(seed))
    queue.flood(*(f"c{i}" for i in range(clients)))
    total = sum(queue.open.values())
    assert places - admission.reserve <= total <= places
    if places > 1:  # so small that a newcomer's place costs little, so large that it is there
        assert 1 <= admission.reserve <= max(1, places / 8 + 1)


@given(PLACES.filter(lambda places: places > 1), SEEDS, st.integers(1, 5))
def test_a_newcomer_finds_room_and_soon_its_share_though_others_flood(
    places: int, seed: int, flooding: int
) -> None:
    """The others fill the queue first and grab at every place that is freed, before the newcomer does."""
    admission = Admission(places, shared=True)
    queue = Queue(admission, random.Random(seed))
    others = [f"c{i}" for i in range(flooding)]
    queue.flood(others[0])
    assert queue.enter("new")  # whoever came first alone has left room
    queue.flood(*others)
    share = admission.share(flooding + 1)
    for _ in range(100 * places):
        if queue.open["new"] >= share:
            break
        queue.end_one()
        queue.flood(*others)
        queue.enter("new")
    assert queue.open["new"] >= min(share, admission.share(len(+queue.open)))


@given(PLACES, SEEDS)
def test_below_the_share_only_a_full_queue_refuses(places: int, seed: int) -> None:
    dice = random.Random(seed)
    admission = Admission(places, shared=True)
    queue = Queue(admission, dice)
    for _ in range(300):
        if dice.random() < 0.3 and +queue.open:
            queue.end_one()
        client = dice.choice("abcd")
        share = admission.share(len({*+queue.open, client}))
        below, room = queue.open[client] < share, sum(queue.open.values()) < places
        entered = queue.enter(client)
        assert entered or not (below and room)
        assert sum(queue.open.values()) <= places


@given(PLACES, st.integers(1, 300))
def test_one_client_alone_has_every_place(places: int, per_client: int) -> None:
    """Where nobody else is expected nothing is kept; the limit for each client is a limit all the same."""
    queue = Queue(Admission(places), random.Random(0))
    assert sum(queue.enter(None) for _ in range(2 * places)) == places
    queue = Queue(Admission(places, per_client, shared=True), random.Random(0))
    assert sum(queue.enter("a") for _ in range(2 * places)) <= per_client
    if per_client < places:
        assert queue.enter("b")
