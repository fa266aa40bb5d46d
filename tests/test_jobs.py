"""The worker thread, its cache of results, and errors as visitors see them."""

from __future__ import annotations

import asyncio
import time
import weakref
from contextlib import suppress

import gradio as gr
import pytest
import torch

from patchscaler.images import read_picture
from patchscaler.ui.html import explain
from patchscaler.ui.jobs import Jobs, StopEvents
from patchscaler.ui.state import CachedAnalysis, SessionCache


def test_a_job_whose_reader_leaves_stops_at_its_next_item_and_never_two_run_at_once():
    jobs, running, most, produced = Jobs(), [], [], []

    def job():
        running.append(1)
        most.append(len(running))
        try:
            for i in range(1000):
                time.sleep(0.005)
                produced.append(i)
                yield i
        finally:
            running.pop()

    def short():
        yield "next"

    async def join_and_leave():
        for _ in range(20):
            stream = jobs.stream(job)
            assert await anext(stream) == 0
            await stream.aclose()
        return await anext(jobs.stream(short))

    assert asyncio.run(join_and_leave()) == "next"
    assert max(most) == 1 and not running
    assert len(produced) <= 20 * 3


@pytest.mark.parametrize("fault", [SystemExit, KeyboardInterrupt, MemoryError])
def test_no_fault_in_a_job_ends_the_thread(fault):
    jobs = Jobs()

    def job(error):
        yield 1
        if error:
            raise error

    async def read(error):
        return [item async for item in jobs.stream(lambda: job(error))]

    with pytest.raises((RuntimeError, MemoryError)):
        asyncio.run(read(fault()))
    assert asyncio.run(read(None)) == [1]


@pytest.mark.parametrize("fault", [MemoryError, SystemExit])
def test_what_a_failed_job_held_is_free_once_its_error_was_handled(fault, no_collector):
    jobs, made = Jobs(), []

    def job():
        held = torch.zeros(1)
        made.append(weakref.ref(held))
        yield 1
        raise fault

    async def read():
        with suppress(MemoryError, RuntimeError):
            async for _ in jobs.stream(job):
                pass

    asyncio.run(read())
    jobs._threads.shutdown()
    assert made[0]() is None


def test_the_oldest_images_go_first_and_the_newest_always_stays(tiny_pipeline, image):
    analysis = tiny_pipeline.analyze(read_picture(image["path"]))
    known = CachedAnalysis(analysis, None)
    pixels = analysis.coarse[0].numel()
    cache = SessionCache(kept_pixels=2 * pixels)
    for name in "abc":
        cache.put(name, known)
        cache.get("a")  # in use, so "b" is the one that goes
    assert [cache.get(name) is not None for name in "abc"] == [True, False, True]
    small = SessionCache(kept_pixels=1)
    small.put("a", known)
    assert small.get("a") is known


def test_errors_of_the_machine_are_named():
    assert "memory" in explain(torch.OutOfMemoryError("CUDA")).message
    assert "KeyError" in explain(KeyError("<script>")).message
    assert explain(gr.Error("as it is")).message == "as it is"


def test_stop_ends_all_work_of_one_visitor():
    """An example that runs as it is chosen, and a run that waits behind it."""
    events = StopEvents()
    with events.of("a") as first, events.of("b") as other:
        with events.of("a") as second:
            events.stop("a")
            assert first.is_set() and second.is_set() and not other.is_set()
        assert "a" in events
    assert "a" not in events
