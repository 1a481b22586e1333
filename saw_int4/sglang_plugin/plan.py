"""Who attends to what in one forward pass: SGLang's ForwardBatch, sorted into the operators' arguments.

Lengths come from the host's lists, which SGLang keeps for every extend; nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor


def decode_limit(group: int, cuda: bool) -> int:
    """Most new tokens of a request that go through decode_attention; more go through gather_kv and 16-bit attention.

    The unit is reading a cached token's K and V in 16 bits. decode_attention reads 0.27 of it for every pass of 32
    query rows of a KV head, and computed as long as 0.6 when 32 rows took 2.2 times as long as 4 (now 1.3 times). The
    other way reads 0.27, writes 1 and reads 1: 2.3, whatever the rows. So four passes at most: 128 rows, 128 / group
    tokens. Measured for one request of 16384 tokens (benchmarks/results/h100_2026-11-26_kernels.txt), 32 new ones take
    62 us this way and 213 the other, 128 take 195 and 218: FlashInfer's FA3 gives each query head one SM then. Several
    requests share the others, so the limit stays where the arithmetic has it. The 16 for a CPU was not measured.

    Depends on the model alone: what shares a request's batch must not change its bits.
    """
    return max(1, 128 // group) if cuda else 16


@dataclass
class ShortRequests:
    """Requests for decode_attention.

    Attributes:
        table_rows: int64 [B], their rows in the slot table.
        batch_rows: int64 [B], their places in the batch, which are their lines in the sliding-window table; None: all
            of the batch, in order.
        rows: indices of their query rows in the batch, or None when they are the whole batch, in order.
        seq_lens: int64 [B], lengths with the new tokens.
        q_indptr: int32 [B + 1], or None: max_q_len rows each.
        max_q_len: most new tokens of one of them.
        tree_mask: int64, for each query row the new tokens that it sees (bits), or None: those up to itself.
        table: int32, a slot table of their own, where slots of a page do not lie together; None: the layers' table.
    """

    table_rows: Tensor
    seq_lens: Tensor
    batch_rows: Tensor | None = None
    rows: Tensor | None = None
    q_indptr: Tensor | None = None
    max_q_len: int = 1
    tree_mask: Tensor | None = None
    table: Tensor | None = None


@dataclass(frozen=True)
class Span:
    """Consecutive new tokens of one request: query rows [start, end) of the batch see its tokens [low, high).

    The last end - start of those tokens are the span's own; ``place`` is the request's place in the batch.
    """

    start: int
    end: int
    low: int
    high: int
    place: int

    @property
    def num_rows(self) -> int:
        return self.end - self.start

    @property
    def num_keys(self) -> int:
        return self.high - self.low


@dataclass(frozen=True)
class Keys:
    """Keys of one call of 16-bit attention, packed one span after the other.

    Attributes:
        lens: how many each span has.
        indptr: int32 [spans + 1], where each span's start.
        slots: int32 [N], where the rows of all of them lie in the cache.
        causal: whether they end with the spans' own tokens; else every one is older than every row.
        own: int64, places among the N of the spans' own tokens where those are used fresh, else None.
    """

    lens: list[int]
    indptr: Tensor
    slots: Tensor
    causal: bool
    own: Tensor | None


@dataclass(frozen=True)
class Group:
    """Spans that share calls of 16-bit attention.

    Attributes:
        rows: their query rows: a slice of the batch where they lie together, else indices.
        lens, indptr: how many rows each has, and where each one's start (int32).
        pieces: their keys, in calls that fit the workspace; empty for prompts without a prefix, whose keys are the
            rows' own and need no cache.
    """

    rows: slice | Tensor
    lens: list[int]
    indptr: Tensor
    pieces: list[Keys]


@dataclass
class Plan:
    """One forward pass.

    Attributes:
        short: what goes through decode_attention.
        windowed: the same for layers with a sliding window, where that differs.
        long: every other request, whole: its span has no window yet.
        table_rows: int64 [B], the requests' rows in the slot table.
        num_rows: query rows that belong to a request; rows after them are padding.
        swa_loc: slots of the new tokens in the sliding-window pool, where there is one.
        swa_table: int32, a line for each request of the batch, slots of its tokens there.
    """

    short: ShortRequests | None
    long: list[Span] = field(default_factory=list)
    windowed: ShortRequests | None = None
    table_rows: Tensor | None = None
    num_rows: int = 0
    swa_loc: Tensor | None = None
    swa_table: Tensor | None = None
    _groups: dict[tuple[int, bool, bool], list[Group]] = field(default_factory=dict)

    def groups(self, window: int, is_swa: bool, fresh: bool, table: Tensor, capacity: int) -> list[Group]:
        """The long requests for layers with this window; made once in a pass.

        Args:
            fresh: whether the new tokens' keys and values are used as they are, not as the cache holds them.
            table: the slot table of these layers.
            capacity: keys that one call may gather.
        """
        key = (window, is_swa, fresh)
        if key not in self._groups:
            rows = None if is_swa else self.table_rows
            arranged = arrange(self.long, window, capacity, fresh)
            self._groups[key] = [_group(spans, pieces, table, rows, fresh) for spans, pieces in arranged]
        return self._groups[key]


def plan_decode(forward_batch) -> Plan:
    """One new token for every request. Captured graphs keep reading these tensors: the runner's own."""
    rows = forward_batch.req_pool_indices
    return Plan(ShortRequests(rows, forward_batch.seq_lens), num_rows=len(rows))


def plan_extend(forward_batch, limit: int, fresh: bool) -> Plan:
    """Any number of new tokens for each request.

    Args:
        limit: most new tokens of a request for decode_attention, see ``decode_limit``.
        fresh: see ``Plan.groups``. Prompts without a prefix then read nothing from the cache, however short.
    """
    table_rows = forward_batch.req_pool_indices.to(torch.int64)
    short, long, start = [], [], 0
    lens = zip(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu)
    for place, (prefix, new) in enumerate((int(p), int(n)) for p, n in lens):
        span = Span(start, start + new, 0, prefix + new, place)
        start += new
        (short if new <= limit and (prefix or not fresh) else long).append(span)
    long = [span for span in long if span.num_rows]
    plan = Plan(None, long, table_rows=table_rows, num_rows=start)
    if short:
        places = upload([s.place for s in short], table_rows.device)
        plan.short = ShortRequests(
            table_rows=table_rows[places],
            batch_rows=places,
            seq_lens=upload([s.high for s in short], table_rows.device),
            rows=_rows(short, table_rows.device) if long else None,
            q_indptr=_indptr([s.num_rows for s in short], table_rows.device),
            max_q_len=max(s.num_rows for s in short),
        )
    return plan


def arrange(long: list[Span], window: int, capacity: int, fresh: bool) -> list[tuple[list[Span], list[list[Span]]]]:
    """Which spans share a call, and which keys each of their calls takes.

    Requests are packed in order while their keys fit; one with more keys is cut, its rows into spans whose own tokens
    fill half of the workspace at most, its keys into pieces from the end on.

    Returns:
        Groups: their spans, and for each call the keys of each span as spans too. No calls: the prompts without a
        prefix, of which there is at most one group.
    """
    cold = [span for span in long if fresh and span.high == span.num_rows]
    groups = [(cold, [])] if cold else []
    packed: list[Span] = []

    def flush() -> None:
        if packed:
            groups.append((list(packed), [list(packed)]))
            packed.clear()

    for request in long:
        if request in cold:
            continue
        for span in _blocks(request, window, capacity):
            if span.num_keys > capacity:
                flush()
                cuts = range(span.high, span.low, -capacity)
                pieces = [[Span(span.start, span.end, max(span.low, c - capacity), c, span.place)] for c in cuts]
                groups.append(([span], pieces))
                continue
            if sum(s.num_keys for s in packed) + span.num_keys > capacity:
                flush()
            packed.append(span)
    flush()
    return groups


def _blocks(request: Span, window: int, capacity: int) -> list[Span]:
    """A request as spans that see what its rows see; more than one where its keys do not fit."""
    prefix = request.high - request.num_rows
    step = request.num_rows if _seen(request.num_rows, prefix, window) <= capacity else capacity // 2
    blocks = []
    for first in range(0, request.num_rows, step):
        last = min(first + step, request.num_rows)
        high = prefix + last
        low = high - _seen(last - first, prefix + first, window)
        blocks.append(Span(request.start + first, request.start + last, low, high, request.place))
    return blocks


def _seen(new: int, prefix: int, window: int) -> int:
    """Keys in sight of ``new`` rows after a prefix."""
    return new + (min(prefix, window) if window >= 0 else prefix)


def _group(spans: list[Span], pieces: list[list[Span]], table: Tensor, table_rows: Tensor | None, fresh) -> Group:
    """``table_rows`` None: requests lie in the table as in the batch."""
    lens, device = [s.num_rows for s in spans], table.device
    together = all(a.end == b.start for a, b in zip(spans, spans[1:]))
    rows = slice(spans[0].start, spans[-1].end) if together else _rows(spans, device)
    return Group(rows, lens, _indptr(lens, device), [_keys(piece, spans, table, table_rows, fresh) for piece in pieces])


def _keys(piece: list[Span], spans: list[Span], table: Tensor, table_rows: Tensor | None, fresh: bool) -> Keys:
    lens, device = [s.num_keys for s in piece], table.device
    lines = upload([s.place for s in piece], device)
    lines = lines if table_rows is None else table_rows[lines]
    lines = lines.repeat_interleave(upload(lens, device), output_size=sum(lens))
    slots = table[lines, _ranges([s.low for s in piece], lens, device)]
    causal = piece[-1].high == spans[-1].high
    own = None
    if causal and fresh:
        ends = list(accumulate(lens))
        own = _ranges([end - s.num_rows for end, s in zip(ends, spans)], [s.num_rows for s in spans], device)
    return Keys(lens, _indptr(lens, device), slots, causal, own)


def _rows(spans: list[Span], device) -> Tensor:
    return _ranges([s.start for s in spans], [s.num_rows for s in spans], device)


def _ranges(starts: list[int], lens: list[int], device) -> Tensor:
    """The numbers start .. start + len - 1 of each, one range after the other, int64."""
    shifts = [start - end + n for start, end, n in zip(starts, accumulate(lens), lens)]
    total = sum(lens)
    shifts = upload(shifts, device).repeat_interleave(upload(lens, device), output_size=total)
    return torch.arange(total, device=device) + shifts


def _indptr(lens: list[int], device) -> Tensor:
    return upload([0, *accumulate(lens)], device).to(torch.int32)


def upload(numbers: list[int], device) -> Tensor:
    """int64, without waiting for the device."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
