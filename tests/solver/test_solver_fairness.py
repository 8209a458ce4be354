"""Clients share the board: the flood of one does not keep another's requests from being on time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from solver.fairness import fair_weights
from solver.ilp import IlpPolicy
from solver.problem import Job, Packing, Phase, Snapshot

DUE_S = 5.0
LIMIT_S = 1.0


def job(name: str, client: str | None, seconds: float, steps: int) -> Job:
    phases = (Phase("denoise", steps, {1: seconds / steps}),)
    return Job(name, 0.0, DUE_S, 0.0, phases, slo_s=DUE_S, client=client)


def planned(jobs: list[Job]) -> Packing:
    return IlpPolicy(LIMIT_S)(Snapshot(0.0, 0.5, (0.0, 0.0), tuple(jobs)))


def on_time(packing: Packing, jobs: list[Job]) -> set[str]:
    """Who gets all its steps until it is due."""
    done: dict[str, int] = {}
    for entry in packing.entries:
        if entry.end_s <= DUE_S + 1e-6:
            done[entry.job_ids[0]] = done.get(entry.job_ids[0], 0) + entry.steps
    return {one.id for one in jobs if done.get(one.id) == one.phases[0].steps}


def flood(client: str | None) -> list[Job]:
    return [job(f"small{i}", client, 1.0, 2) for i in range(30)]


def test_a_flood_does_not_keep_another_client_out() -> None:
    alone = [*flood(None), job("large", None, 4.0, 8)]
    assert "large" not in on_time(planned(alone), alone)  # ten small ones count more
    shared = [*flood("a"), job("large", "b", 4.0, 8)]
    met = on_time(planned(shared), shared)
    assert "large" in met and len(met) >= 6


def test_what_exceeds_a_share_does_not_keep_the_flood_out() -> None:
    """Half of two GPUs for five seconds are a share: five small ones of `a`, but one large one of `b`."""
    jobs = [*flood("a"), *(job(f"large{i}", "b", 4.0, 8) for i in range(4))]
    met = on_time(planned(jobs), jobs)
    assert len([name for name in met if name.startswith("large")]) == 1
    assert len([name for name in met if name.startswith("small")]) >= 5


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.01, 10.0)), min_size=1, max_size=30),
    st.integers(1, 16),
)
def test_shares(requests: list[tuple[str, float]], n_gpus: int) -> None:
    clients, gpus = zip(*requests, strict=True)
    weights = fair_weights(clients, gpus, n_gpus)
    within = [i for i, weight in enumerate(weights) if weight > 1]
    if len(set(clients)) == 1:
        assert not within
    assert sum(gpus[i] for i in within) <= n_gpus + 1e-6
    if within:  # one of them is worth all that exceed the shares
        assert weights[within[0]] >= len(requests) - len(within)
    for client in set(clients):
        mine = [gpus[i] for i in range(len(gpus)) if clients[i] == client and i not in within]
        kept = [gpus[i] for i in within if clients[i] == client]
        assert not mine or not kept or max(kept) <= min(mine)
