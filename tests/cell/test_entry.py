"""What a request's entry says is where, after a range of it was lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np

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
        4,
        0.0,
        0.0,
        None,
        planned_with,
        result,
        conditioning="text",
        latents="after step 2",
    )
    one.committed = ("text", "after step 1")
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


def sent(one: Entry, seq: int, kind: str, *produced: str, gpu: int = 0) -> Assignment:
    assignment = Assignment(seq, (one.id,), kind, (gpu,), 0, 1, 0.0, 1.0, (-1,))
    one.sent(assignment, produced)
    return assignment


def test_what_a_picture_adds_to_the_conditioning_is_lost_with_its_range() -> None:
    """And then its pixels are needed again; once it counts they are not, and no GPU knows only the text."""
    picture = np.zeros((64, 64, 3), np.uint8)
    one = replace(entry(), request=GenerateRequest("a star", images=[picture]), committed=(None, None))
    one.commit(sent(one, 1, "encode", "text", "noise"), ("text", "noise"))
    lost = sent(one, 2, "encode_image", "text and picture", "picture under noise", gpu=1)
    assert (one.conditioning, one.knows) == ("text and picture", {1})
    one.outstanding = 0
    one.lose(lost)
    one.roll_back()
    assert (one.conditioning, one.latents) == ("text", "noise")
    assert one.request.images[0].pixels is picture
    again = sent(one, 3, "encode_image", "text and picture", "picture under noise")
    one.commit(again, ("text and picture", "picture under noise"))
    assert one.request.images[0].pixels is None
    one.commit(sent(one, 4, "denoise", "after step 1"), ("after step 1",))
    assert one.committed == ("text and picture", "after step 1")
