"""What a request's entry says is where, after a range of it was lost."""

from __future__ import annotations

import asyncio

from deployments.cell.entries import Entry
from tetriserve.request import GenerateRequest, PlannedWith
from tetriserve.scheduler.assignment import Assignment


def entry() -> Entry:
    request = GenerateRequest("a star", 256, 256, num_inference_steps=4)
    loop = asyncio.new_event_loop()
    result = loop.create_future()
    loop.close()
    planned_with = PlannedWith(0.0, {1: 0.1}, 0.0)
    one = Entry(
        "r#0",
        request,
        request,
        0.0,
        0.0,
        None,
        planned_with,
        result,
        conditioning="text",
        latents="after step 2",
    )
    one.committed_latents = "after step 1"
    one.touched, one.knows, one.holders = {0, 1}, {0, 1}, {1}
    return one


def test_after_a_lost_range_no_gpu_is_thought_to_have_anything() -> None:
    """The range may not have reached GPU 1, nor what was sent along with it."""
    one = entry()
    one.lose(Assignment(7, ("r",), "denoise", (1,), 1, 1, 0.0, 1.0, (-1,)))
    one.roll_back()
    assert (one.latents, one.conditioning) == ("after step 1", "text")
    assert one.knows == one.holders == set()
    assert one.touched == {0, 1}  # what is there must still be released
    assert [(part.kind, part.steps, part.gpus) for part in one.lost] == [("denoise", 1, (1,))]


def test_a_lost_range_is_rolled_back_once_nothing_is_in_flight_behind_it() -> None:
    one = entry()
    one.outstanding = 1
    one.roll_back()
    assert one.aborting and one.latents == "after step 2"
    one.outstanding = 0
    one.roll_back()
    assert not one.aborting and one.latents == "after step 1"
