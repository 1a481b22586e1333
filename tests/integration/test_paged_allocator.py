"""Slots that the CPU platform's paged allocator hands out, at every page size, on either SGLang version."""

from __future__ import annotations

import random

import pytest
import torch

from saw_int4.sglang_plugin.names import sglang_version

pytestmark = pytest.mark.both_versions
PAGES = 24
# Later versions serve page size 1 from another class, with one free list and nothing to align.
PAGE_SIZES = [1, 16, 32, 64, 128] if sglang_version() == "0.5.21" else [16, 32, 64, 128]


def make_allocator(page_size: int):
    if sglang_version() == "0.5.21":
        from saw_int4.sglang_plugin.paged_allocator import TorchPagedAllocator as Allocator
    else:
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator as Allocator
    size = PAGES * page_size
    return Allocator(size, page_size=page_size, dtype=torch.uint4, device="cpu", kvcache=None, need_sort=False)


class Request:
    """The slots of one request, as the scheduler keeps them."""

    def __init__(self) -> None:
        self.slots = torch.empty(0, dtype=torch.int64)

    @property
    def last(self) -> int:
        return int(self.slots[-1]) if len(self.slots) else -1


def lengths(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def extend(allocator, requests: list[Request], news: list[int]) -> bool:
    """Give each request some new tokens; False when pages ran out."""
    before = lengths([len(r.slots) for r in requests])
    after = before + lengths(news)
    last = lengths([r.last for r in requests])
    slots = allocator.alloc_extend(before, before, after, after, last, sum(news))
    if slots is None:
        return False
    assert slots.dtype == torch.int64
    for request, piece in zip(requests, slots.split(news)):
        request.slots = torch.cat([request.slots, piece])
    return True


def decode(allocator, requests: list[Request]) -> bool:
    after = lengths([len(r.slots) + 1 for r in requests])
    slots = allocator.alloc_decode(after, after, lengths([r.last for r in requests]))
    if slots is None:
        return False
    for request, slot in zip(requests, slots):
        request.slots = torch.cat([request.slots, slot[None]])
    return True


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_random_workload(page_size):
    """Pages belong to one request each, tokens of a page are consecutive, and everything comes back."""
    random.seed(page_size)
    allocator, live = make_allocator(page_size), []
    free = allocator.available_size()
    for _ in range(120):
        action = random.random()
        if action < 0.3:
            fresh = [Request() for _ in range(random.randint(1, 3))]
            if extend(allocator, fresh, [random.randint(1, 3 * page_size) for _ in fresh]):
                live += fresh
        elif action < 0.5 and live:
            some = random.sample(live, random.randint(1, len(live)))
            extend(allocator, some, [random.randint(1, 2 * page_size) for _ in some])
        elif action < 0.8 and live:
            decode(allocator, live)
        elif live:
            allocator.free(live.pop(random.randrange(len(live))).slots)
        owners = {}
        for number, request in enumerate(live):
            assert torch.equal(request.slots % page_size, torch.arange(len(request.slots)) % page_size)
            starts = request.slots[::page_size] // page_size
            assert torch.equal(request.slots // page_size, starts.repeat_interleave(page_size)[: len(request.slots)])
            for page in starts.tolist():
                assert owners.setdefault(page, number) == number
                assert 1 <= page <= PAGES
        assert allocator.available_size() == free - len(owners) * page_size
    for request in live:
        allocator.free(request.slots)
    assert allocator.available_size() == free


def test_refuses_when_pages_run_out():
    allocator = make_allocator(16)
    request = Request()
    assert extend(allocator, [request], [PAGES * 16 - 1])
    assert not extend(allocator, [Request()], [1])
    assert decode(allocator, [request])
    assert not decode(allocator, [request])
    allocator.free(request.slots)
    assert extend(allocator, [Request()], [PAGES * 16])
