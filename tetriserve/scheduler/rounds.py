"""The round state machine: events in, plans out, with `now` passed in (design: "One brain").

The Ray actor and the simulator drive this same object; only the executor and the clock differ. Planning is
split in two so that a caller may run the policy elsewhere: `snapshot` -> policy -> `commit`. Whatever
happens in between (arrivals, cancellations, lost GPUs) is respected at commit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from solver.problem import Entry, Job, Packing, Phase, Policy, Snapshot, least_work_s, step_together_s
from tetriserve.scheduler.assignment import EPSILON_S, Assignment, OpenRequest, RoundPlan, fits
from tetriserve.scheduler.committed import Committed
from tetriserve.scheduler.load import RecentLoad
from tetriserve.scheduler.predictions import Predictions
from tetriserve.scheduler.promises import is_missed


class RoundScheduler:
    """Keeps the open requests and the board, and turns a policy's packings into committed assignments.

    Args:
        policy: decides; see `solver.policies`.
        n_gpus: GPUs of the cell, numbered from 0.
        round_s: fixed round length; None derives it from the open requests: `policy.round_steps` steps of the
            largest open shape at its fastest degree (packing.md, "Round structure").
        min_round_s: floor of the derived length; keeps the per-range overhead of an executor small.
        lead_s: how long before a GPU frees its next work is committed; 0 in simulation. An executor sets it
            to what planning and dispatch take, so that GPUs do not wait for the brain.
        max_batch: so many requests may share a step; 1: none do.

    `committed` is what runs and waits on the GPUs, `predictions` says when what is open will be done.
    """

    def __init__(
        self,
        policy: Policy,
        n_gpus: int,
        *,
        round_s: float | None = None,
        min_round_s: float = 0.0,
        lead_s: float = 0.0,
        max_batch: int = 1,
    ) -> None:
        if n_gpus < 1:
            raise ValueError(f"n_gpus must be at least 1, got {n_gpus}")
        self.n_gpus = n_gpus
        self.turn(policy, round_s=round_s, min_round_s=min_round_s, lead_s=lead_s, max_batch=max_batch)
        self._boundary_s = -math.inf
        self._seq = 0
        self._load = RecentLoad()
        self._open: dict[str, OpenRequest] = {}
        self.committed = Committed(n_gpus)
        self.predictions = Predictions(self._open, self.committed)

    def turn(
        self,
        policy: Policy,
        *,
        round_s: float | None,
        min_round_s: float,
        lead_s: float,
        max_batch: int,
    ) -> None:
        """Go on with these knobs from the next plan on; what is committed stays."""
        if round_s is not None and not 0 < round_s < math.inf:
            raise ValueError(f"round_s must be a positive number of seconds, got {round_s}")
        self.policy = policy
        self.lead_s = lead_s
        self._round_s = round_s
        self._min_round_s = min_round_s
        self.max_batch = max_batch

    # ---- events -------------------------------------------------------------------------------------------

    def arrived(
        self,
        request_id: str,
        phases: Sequence[Phase],
        now_s: float,
        deadline_s: float = math.inf,
        *,
        priority: int = 0,
        drop_late: bool = False,
        reject_infeasible: bool = False,
        client: str | None = None,
        cheaper: Sequence[Phase] = (),
    ) -> None:
        """A request enters with its chain of phases, and one that may be taken instead where it would be late. Raises
        ValueError on a duplicate id or a chain that no GPU set can run."""
        if request_id in self._open:
            raise ValueError(f"request {request_id} is already open")
        for phase in phases:
            if phase.steps < 1 or not fits((phase,), self.n_gpus):
                raise ValueError(f"request {request_id}: no GPU set can run its {phase.kind} phase")
        self._open[request_id] = OpenRequest(
            request_id,
            now_s,
            deadline_s,
            tuple(phases),
            priority,
            drop_late,
            reject_infeasible,
            client,
            ready_s=now_s,
            alone_s=least_work_s(phases),
            cheaper=tuple(cheaper),
        )
        self._load.arrived(phases, deadline_s - now_s, now_s, self.max_batch)

    def finished(self, seq: int, now_s: float) -> bool:
        """A step range was reported done. True when it was the last one of its request, which then leaves."""
        assignment = self.committed.retire(seq, now_s)
        done = False
        for request_id in assignment.request_ids:
            request = self._open.get(request_id)
            if request is None:
                continue
            request.outstanding.remove(seq)
            request.confirmed += assignment.steps
            request.ready_s = now_s
            if request.confirmed >= request.total:
                del self._open[request_id]
                done = True
        self._predict(now_s)
        return done

    def aborted(self, seq: int, now_s: float) -> None:
        """A step range did not happen: its steps do not count and will be planned again (promise 3).

        Ranges of the same request committed behind it must be reported aborted too; planning waits for that.
        """
        assignment = self.committed.retire(seq, now_s)
        for request_id in assignment.request_ids:
            request = self._open.get(request_id)
            if request is None:
                continue
            request.outstanding.remove(seq)
            request.aborting = bool(request.outstanding)
            request.ready_s = now_s
            if not request.aborting:
                request.committed = request.confirmed
        self._predict(now_s)

    def widened(self, request_id: str, degree: int, n_gpus: int) -> bool:
        """Its denoising steps do not fit into memory at `degree`: from now on only wider ones are planned.

        False, and nothing is changed, when it is not open or no wider degree fits `n_gpus` GPUs.
        """
        request = self._open.get(request_id)
        if request is None:
            return False
        phases = tuple(
            replace(p, step_s={d: s for d, s in p.step_s.items() if d > degree}) if p.kind == "denoise" else p
            for p in request.phases
        )
        if not fits(phases, n_gpus):
            return False
        request.phases = phases
        return True

    def part(self, request_id: str) -> None:
        """Its denoising steps are shared with nobody any more."""
        request = self._open.get(request_id)
        if request is not None:
            request.phases = tuple(replace(phase, company="") for phase in request.phases)

    def crowded(self, batch: int) -> None:
        """So many requests in a step were too many for the memory: from now on fewer share one."""
        self.max_batch = min(self.max_batch, max(1, batch - 1))

    def phases_of(self, request_id: str) -> tuple[Phase, ...]:
        """The chain of an open request as it is planned."""
        return self._open[request_id].phases

    def stranded(self, n_gpus: int) -> list[str]:
        """Requests that cannot run when only `n_gpus` GPUs are left; the caller ends and cancels them."""
        return [request.id for request in self._open.values() if not fits(request.phases, n_gpus)]

    def cancelled(self, request_id: str) -> bool:
        """Forget an open request; ranges already committed still run. False when it is not open."""
        return self._open.pop(request_id, None) is not None

    def gpu_lost(self, gpu: int) -> None:
        """Take a GPU off the board. Its outstanding assignments must be reported aborted by the caller."""
        self.committed.lose(gpu)
        for request in self._open.values():
            request.gpus = tuple(g for g in request.gpus if g != gpu)

    def gpu_back(self, gpu: int, now_s: float) -> None:
        self.committed.regain(gpu, now_s)

    def expired(self, now_s: float) -> list[str]:
        """Requests with `drop_late` that can no longer be on time; the caller ends and cancels them."""
        return [
            request.id
            for request in self._open.values()
            if request.drop_late and not request.outstanding and request.job().is_late(now_s)
        ]

    def infeasible(self, snapshot: Snapshot, packing: Packing) -> list[str]:
        """Requests with `reject_infeasible` that this packing, the first to see them, does not have on time.

        To be asked between policy and commit; the caller ends and cancels them. The others have a promise from now
        on, which counts more than any number of requests without one.
        """
        rejected = []
        for job in snapshot.jobs:
            request = self._open.get(job.id)
            if request is None or not request.reject_infeasible:
                continue
            request.reject_infeasible = False
            request.promised = not is_missed(job, packing, snapshot.now_s)
            if not request.promised:
                rejected.append(job.id)
        return rejected

    # ---- decisions ----------------------------------------------------------------------------------------

    def is_due(self, now_s: float) -> bool:
        """Whether this is an instant of decision: any, or for policies with fixed rounds only a boundary
        (and any instant at which the whole cell is idle)."""
        at_boundary = now_s + self.lead_s >= self._boundary_s - EPSILON_S
        return self.policy.replans_on_arrival or at_boundary or not self.committed

    def snapshot(self, now_s: float) -> Snapshot:
        """The board as the policy shall see it. Moves the round boundary on when `now_s` has reached it."""
        self._predict(now_s)
        for request in self._open.values():
            request.cheapen(now_s)
        jobs = tuple(request.job() for request in self._open.values() if request.plannable)
        round_s = self.round_s(jobs)
        if now_s + self.lead_s >= self._boundary_s - EPSILON_S:
            self._boundary_s = max(now_s, self._boundary_s if self.committed else now_s) + round_s
        return Snapshot(
            now_s=now_s,
            round_s=round_s,
            free_at_s=tuple(self.committed.free_at_s),
            jobs=jobs,
            next_boundary_s=self._boundary_s,
            expected=self._load.expected(now_s),
            newcomer_slack_s=max(self._load.slack_s(now_s), self._min_round_s),
            max_batch=self.max_batch,
        )

    def commit(self, snapshot: Snapshot, packing: Packing, now_s: float) -> RoundPlan:
        """Commit the entries that start within the window, cut to whole steps that reach the boundary."""
        self._predict(now_s)
        self.predictions.note(snapshot, packing)
        for request in self._open.values():
            request.set_aside = request.id in packing.set_aside
        window_s = max(snapshot.now_s, now_s) + self.lead_s + EPSILON_S
        if not self.policy.replans_on_arrival:  # nobody asks again within the round
            window_s = max(window_s, self._boundary_s - EPSILON_S)
        # an entry planned behind one that could not be committed must wait for the next decision
        blocked_gpus: set[int] = set()
        blocked_jobs: set[str] = set()
        committed = []
        for entry in sorted(packing.entries, key=lambda e: (e.start_s, e.end_s)):
            if entry.start_s > window_s:
                break
            free = blocked_gpus.isdisjoint(entry.gpus) and blocked_jobs.isdisjoint(entry.job_ids)
            assignment = self._commit_entry(entry, now_s) if free else None
            if assignment is not None:
                committed.append(assignment)
            if assignment is None or assignment.steps < entry.steps:
                blocked_gpus.update(entry.gpus)
                blocked_jobs.update(entry.job_ids)
        return RoundPlan(tuple(committed), self._boundary_s)

    def plan(self, now_s: float) -> RoundPlan:
        """Snapshot, policy and commit in one go; empty when no decision is due."""
        if not self.is_due(now_s):
            return RoundPlan((), self._boundary_s)
        snapshot = self.snapshot(now_s)
        if not snapshot.jobs:
            return RoundPlan((), self._boundary_s)
        return self.commit(snapshot, self.policy(snapshot), now_s)

    def next_wakeup_s(self, now_s: float) -> float:
        """When to decide next if nothing happens before: a boundary, a GPU about to be free; inf if idle."""
        if not any(request.plannable for request in self._open.values()):
            return math.inf
        instants = [self._boundary_s - self.lead_s]
        if self.policy.replans_on_arrival:
            instants += [free_at - self.lead_s for free_at in self.committed.free_at_s]
        ahead = [t for t in instants if now_s + EPSILON_S < t < math.inf]
        # an overdue boundary (only reports can free a GPU now) is looked at again one round later
        return min(ahead, default=now_s + self.round_s(()))

    def round_s(self, jobs: Iterable[Job] = ()) -> float:
        """The round length for these jobs; for none, for all that is open."""
        if self._round_s is not None:
            return self._round_s
        chains = [job.phases for job in jobs] or [request.phases for request in self._open.values()]
        steps = [p.fastest_step_s for chain in chains for p in chain if p.kind == "denoise"]
        return max(self.policy.round_steps * max(steps, default=0.0), self._min_round_s, 1e-3)

    # ---- state for others ---------------------------------------------------------------------------------

    @property
    def open_ids(self) -> list[str]:
        return list(self._open)

    @property
    def running(self) -> list[Assignment]:
        """Assignments committed and not yet reported, in plan order."""
        return self.committed.running

    # ---- inside -------------------------------------------------------------------------------------------

    def _predict(self, now_s: float) -> None:
        """Bring the GPUs' `free_at_s` and the requests' `ready_s` up to date with what is known now."""
        for request_id, ready_s in self.committed.update(now_s).items():
            if request_id in self._open:
                self._open[request_id].ready_s = ready_s

    def _commit_entry(self, entry: Entry, now_s: float) -> Assignment | None:
        """As far as it can be had: without those of its requests that are gone or somewhere else by now."""
        requests, phases = [], []
        for job_id in entry.job_ids:
            request = self._open.get(job_id)
            if request is None or not request.plannable:
                continue
            phase = request.remaining()[0]
            if phase.kind == entry.kind and entry.degree in phase.step_s:
                requests.append(request)
                phases.append(phase)
        if not requests or not self.committed.takes(entry.gpus):
            return None
        seconds = step_together_s(phases, entry.degree)
        ready_s = max(request.ready_s for request in requests)
        start_s = max(now_s, ready_s, *(self.committed.free_at_s[gpu] for gpu in entry.gpus))
        # a range that starts in a later round reaches for that round's boundary
        ahead_s = self._boundary_s - start_s
        if ahead_s <= EPSILON_S:
            ahead_s += self.round_s() * math.ceil((EPSILON_S - ahead_s) / self.round_s())
        reach = math.ceil(ahead_s / max(seconds, EPSILON_S) - 1e-6)
        steps = min(entry.steps, max(1, reach), *(phase.steps for phase in phases))
        end_s = start_s + steps * seconds
        assignment = Assignment(
            seq=self._seq,
            request_ids=tuple(request.id for request in requests),
            kind=entry.kind,
            gpus=entry.gpus,
            first_steps=tuple(request.first_step() for request in requests),
            steps=steps,
            start_s=start_s,
            end_s=end_s,
            after=self.committed.last_seqs(entry.gpus),
            others=len(self._open) - len(requests),
            component=phases[0].component,
        )
        self._seq += 1
        self.committed.add(assignment)
        for request in requests:
            request.committed += steps
            request.gpus = entry.gpus
            request.outstanding.append(assignment.seq)
        self._predict(now_s)
        return assignment
