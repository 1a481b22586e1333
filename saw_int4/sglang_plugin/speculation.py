"""Verification of drafts: SGLang's tree mask as the bits that decode_attention takes."""

from __future__ import annotations

import torch
from torch import Tensor

from saw_int4.sglang_plugin.plan import Plan, ShortRequests

MAX_DRAFTS = 64  # bits of a row of decode_attention's tree_mask


def tree_bits(custom_mask: Tensor, seq_lens: Tensor, num_drafts: int) -> Tensor:
    """Bit j of row i: draft i of a request sees draft j. Computed on the device, without a wait for it.

    Args:
        custom_mask: bool, flat; each request has ``[num_drafts, seq_len + num_drafts]``, what each draft sees of the
            cached tokens (all of them) and of the drafts.
        seq_lens: int64 [B], lengths without drafts. Requests past the end of the mask are padding.

    Returns:
        int64 [B * num_drafts].
    """
    width = seq_lens + num_drafts
    start = torch.cumsum(width * num_drafts, 0) - width * num_drafts
    draft = torch.arange(num_drafts, device=seq_lens.device)
    place = (start + seq_lens)[:, None, None] + draft[:, None] * width[:, None, None] + draft
    seen = custom_mask[place.clamp_(max=custom_mask.numel() - 1)].to(torch.int64)
    return (seen << draft).sum(-1).flatten()


class VerifyBuffers:
    """What a captured graph of a verification reads: filled anew before each replay."""

    def __init__(self, max_requests: int, max_rows: int, device) -> None:
        self.seq_lens = torch.zeros(max_requests, dtype=torch.int64, device=device)
        self.tree_mask = torch.zeros(max_rows, dtype=torch.int64, device=device)


def plan_verify(forward_batch, buffers: VerifyBuffers | None = None) -> Plan:
    """The drafts of every request as its last query rows; in the buffers' memory where they are given."""
    rows, drafts = forward_batch.req_pool_indices, forward_batch.spec_info.draft_token_num
    seq_lens = forward_batch.seq_lens.to(torch.int64)
    mask = tree_bits(forward_batch.spec_info.custom_mask, seq_lens, drafts)
    seq_lens = seq_lens + drafts
    if buffers is not None and len(rows) <= len(buffers.seq_lens):  # larger batches run without a graph
        seq_lens = buffers.seq_lens[: len(seq_lens)].copy_(seq_lens)
        mask = buffers.tree_mask[: len(mask)].copy_(mask)
    short = ShortRequests(rows, seq_lens, max_q_len=drafts, tree_mask=mask)
    return Plan(short, num_rows=len(rows) * drafts)
