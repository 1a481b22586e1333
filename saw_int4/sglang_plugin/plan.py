"""Who attends to what in one forward pass: SGLang's ForwardBatch, sorted into the operators' arguments."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# A request of up to this many new tokens goes through decode_attention, which reads the INT4 rows once for all of
# them; a longer one through gather_kv and 16-bit attention. Depends on the request alone: what shares its batch must
# not change its bits.
SHORT_EXTEND = 16


@dataclass
class ShortRequests:
    """Requests for decode_attention.

    Attributes:
        table_rows: int64 [B], their rows in the slot table.
        batch_rows: int64 [B], their places in the batch, which are their rows in the sliding-window table.
        rows: indices of their query rows in the batch, or None when they are the whole batch, in order.
        seq_lens: int64 [B], lengths with the new tokens.
        q_indptr: int32 [B + 1], or None: max_q_len rows each.
        max_q_len: most new tokens of one of them.
        tree_mask: int64, for each query row the new tokens that it sees (bits), or None: those up to itself.
    """

    table_rows: Tensor
    batch_rows: Tensor
    seq_lens: Tensor
    rows: Tensor | None = None
    q_indptr: Tensor | None = None
    max_q_len: int = 1
    tree_mask: Tensor | None = None


@dataclass
class LongRequest:
    """One request for 16-bit attention: its query rows [start, end), its rows in the two slot tables, its lengths."""

    start: int
    end: int
    table_row: int
    batch_row: int
    prefix_len: int
    seq_len: int


@dataclass
class Plan:
    """One forward pass."""

    short: ShortRequests | None
    long: list[LongRequest] = field(default_factory=list)
    num_rows: int = 0  # query rows that belong to a request; rows after them are padding
    swa_loc: Tensor | None = None  # slots of the new tokens in the sliding-window pool, where there is one
    swa_table: Tensor | None = None  # int32 [B, longest], slots of each request's tokens there


def plan_decode(forward_batch) -> Plan:
    """One new token for every request."""
    rows = forward_batch.req_pool_indices
    batch_rows = torch.arange(len(rows), device=rows.device)
    return Plan(ShortRequests(rows, batch_rows, forward_batch.seq_lens), num_rows=len(rows))


def plan_extend(forward_batch) -> Plan:
    """Any number of new tokens for each request."""
    news = [int(n) for n in forward_batch.extend_seq_lens_cpu]
    prefixes = [int(n) for n in forward_batch.extend_prefix_lens_cpu]
    table_rows = forward_batch.req_pool_indices.tolist()
    device = forward_batch.req_pool_indices.device

    short, long, start = [], [], 0
    for i, (new, prefix) in enumerate(zip(news, prefixes)):
        if new <= SHORT_EXTEND:
            short.append((i, start, new))
        else:
            long.append(LongRequest(start, start + new, table_rows[i], i, prefix, prefix + new))
        start += new
    if not short:
        return Plan(None, long, start)

    picked = [i for i, _, _ in short]
    lens = [new for _, _, new in short]
    rows = None
    if long:
        rows = torch.cat([torch.arange(first, first + new) for _, first, new in short]).to(device)
    return Plan(
        ShortRequests(
            table_rows=torch.tensor([table_rows[i] for i in picked], dtype=torch.int64, device=device),
            batch_rows=torch.tensor(picked, dtype=torch.int64, device=device),
            seq_lens=torch.tensor([prefixes[i] + news[i] for i in picked], dtype=torch.int64, device=device),
            rows=rows,
            q_indptr=torch.tensor([0, *lens]).cumsum(0).to(torch.int32).to(device),
            max_q_len=max(lens),
        ),
        long,
        start,
    )


def translate_slots(plan: Plan, forward_batch, kv_pool, req_to_token: Tensor) -> None:
    """Add the slots of a sliding-window pool to a plan.

    Tokens that left the window lost theirs; whatever the mapping says of them, no row of this pass looks there.
    """
    longest = int(forward_batch.seq_lens.max())
    slots = req_to_token[forward_batch.req_pool_indices, :longest].to(torch.int64)
    plan.swa_loc = kv_pool.translate_loc_from_full_to_swa(forward_batch.out_cache_loc)
    plan.swa_table = kv_pool.translate_loc_from_full_to_swa(slots).clamp_(min=0).to(torch.int32)
