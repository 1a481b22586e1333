"""Verification of drafts: SGLang's tree mask as the bits that decode_attention takes.

A draft model keeps its own cache in 16 bits, with an attention backend of SGLang's: it has a layer or a few.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.verify_mask import VerifyMask
from sglang.srt.speculative.eagle_info import EagleVerifyInput
from sglang.srt.speculative.eagle_utils import TreeMaskMode
from torch import Tensor

from saw_int4.sglang_plugin import workspaces
from saw_int4.sglang_plugin.plan import Plan, ShortRequests


def tree_bits(custom_mask: Tensor, seen_lens: Tensor, num_drafts: int) -> Tensor:
    """Bit j of row i: draft i of a request sees draft j. Computed on the device, without a wait for it.

    Args:
        custom_mask: bool, flat; each request has ``[num_drafts, seen_len + num_drafts]``, what each draft sees of the
            cached tokens (all of them) and of the drafts.
        seen_lens: int64 [B], how many cached tokens the mask tells of. Requests past the end of it are padding.

    Returns:
        int64 [B * num_drafts].
    """
    width = seen_lens + num_drafts
    start = torch.cumsum(width * num_drafts, 0) - width * num_drafts
    draft = torch.arange(num_drafts, device=seen_lens.device)
    place = (start + seen_lens)[:, None, None] + draft[:, None] * width[:, None, None] + draft
    seen = custom_mask[place.clamp_(max=custom_mask.numel() - 1)].to(torch.int64)
    return (seen << draft).sum(-1).flatten()


class VerifyBuffers:
    """What a captured graph of a verification reads: filled anew before each replay."""

    def __init__(self, max_requests: int, max_rows: int, window: int, device) -> None:
        self.seq_lens = torch.zeros(max_requests, dtype=torch.int64, device=device)
        self.tree_mask = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.lines = torch.zeros(max_rows if window else 0, window + 1, dtype=torch.int32, device=device)
        self.line_lens = torch.zeros(len(self.lines), dtype=torch.int64, device=device)
        self.line_numbers = torch.arange(len(self.lines), device=device)


def verify_mask(device) -> VerifyMask:
    """The layout of draft models' masks, which SGLang asks a backend for. Of no size: each comes with its drafts."""
    return VerifyMask(torch.empty(0, dtype=torch.bool, device=device), TreeMaskMode.QLEN_ONLY, max_bs=0)


def plan_verify(forward_batch, buffers: VerifyBuffers | None = None) -> Plan:
    """The drafts of every request as its last query rows; in the buffers' memory where they are given."""
    rows, drafts = forward_batch.req_pool_indices, forward_batch.spec_info.draft_token_num
    seq_lens = forward_batch.seq_lens.to(torch.int64)
    # Draft models leave the cached tokens out, as the backend's verify_mask asks them to; ngrams do not ask.
    seen_lens = torch.zeros_like(seq_lens) if isinstance(forward_batch.spec_info, EagleVerifyInput) else seq_lens
    mask = tree_bits(forward_batch.spec_info.custom_mask, seen_lens, drafts)
    seq_lens = seq_lens + drafts
    if buffers is not None and len(rows) <= len(buffers.seq_lens):  # larger batches run without a graph
        seq_lens = buffers.seq_lens[: len(seq_lens)].copy_(seq_lens)
        mask = buffers.tree_mask[: len(mask)].copy_(mask)
    short = ShortRequests(rows, seq_lens, max_q_len=drafts, tree_mask=mask)
    return Plan(short, num_rows=len(rows) * drafts)


def plan_windows(short: ShortRequests, table: Tensor, window: int, window_slots, buffers: VerifyBuffers | None = None):
    """Every draft as a request of its own, with a line of slots: the last tokens that it sees, and itself.

    A draft's window is counted from its depth in the tree, which its place among the request's rows is not.

    Args:
        table: int32, slots of the requests' tokens.
        window: most older tokens that one sees.
        window_slots: where windows have a pool of their own, the ``WindowSlots`` of it.
        buffers: see ``plan_verify``.
    """
    drafts, device = short.max_q_len, table.device
    seen = (short.tree_mask[:, None] >> torch.arange(drafts, device=device)) & 1
    branch = seen.argsort(dim=1, descending=True, stable=True)  # places of a draft's ancestors and its own, in order
    cached = (short.seq_lens - drafts)[:, None].expand(-1, drafts).reshape(-1, 1)
    length = cached + seen.sum(dim=1, keepdim=True)
    first = (length - window - 1).clamp_(min=0)
    requests, rows = short.table_rows[:, None].expand(-1, drafts).reshape(-1, 1), len(cached)
    if buffers is not None and rows <= len(buffers.lines):
        lines, line_lens, numbers = (x[:rows] for x in (buffers.lines, buffers.line_lens, buffers.line_numbers))
    else:
        lines = torch.empty(rows, window + 1, dtype=torch.int32, device=device)
        line_lens, numbers = torch.empty_like(cached[:, 0]), torch.arange(rows, device=device)
    line_lens.copy_((length - first)[:, 0])
    step = max(1, workspaces.DRAFT_CELLS // (window + 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        tokens = first[part] + torch.arange(window + 1, device=device)
        places = cached[part] + branch[part].gather(1, (tokens - cached[part]).clamp_(0, drafts - 1))
        tokens = torch.where(tokens < cached[part], tokens, places).clamp_(max=table.shape[1] - 1)
        slots = table[requests[part], tokens]
        lines[part] = slots if window_slots is None else window_slots.translate(slots)
    return ShortRequests(numbers, line_lens, batch_rows=numbers, table=lines)
