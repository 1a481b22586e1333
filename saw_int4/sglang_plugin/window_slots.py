"""Slots of a sliding-window pool: it has slots of its own, and forgets those of tokens that left the window.

Layers with a window read a slot table of the pass, line i for the batch's i-th request. Of a request only the tokens
are filled in that some new token sees; every other cell holds a slot of an earlier pass, or 0, where no row looks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saw_int4.sglang_plugin.plan import Plan, upload


class WindowSlots:
    """Fills plans; what a captured graph reads stays where it was at the capture.

    Args:
        kv_pool: SGLang's SWAKVPool.
        req_to_token: int32 ``[requests, context]``, slots of the full pool; read in every pass.
        window: most older tokens that a new one sees.
    """

    def __init__(self, kv_pool, req_to_token: Tensor, window: int) -> None:
        self.kv_pool, self.req_to_token, self.window = kv_pool, req_to_token, window
        self._captured = self._eager = self._buffers(0, 0)

    def reserve(self, max_requests: int, max_tokens: int) -> None:
        """Make room for the batches of captured graphs: passes that fit in it use that memory from now on."""
        self._captured = self._buffers(max_requests, max_tokens)

    def fill(self, plan: Plan, forward_batch) -> None:
        """Add places and slots to a plan, without waiting for the device."""
        loc, requests = forward_batch.out_cache_loc, forward_batch.req_pool_indices
        table, places, window_loc = self._room(len(requests), len(loc))
        plan.swa_loc = window_loc[: len(loc)].copy_(self.kv_pool.translate_loc_from_full_to_swa(loc))
        if plan.windowed is not None:  # drafts, with a table of their own
            return
        plan.swa_table = table
        if plan.short is not None and plan.short.batch_rows is None:
            plan.short.batch_rows = places[: len(requests)]

        new = [1] if forward_batch.forward_mode.is_decode() else forward_batch.extend_seq_lens_cpu
        first = (forward_batch.seq_lens - upload(new, loc.device) - self.window).clamp_(min=0)
        tokens = first[:, None] + torch.arange(max(new) + self.window, device=loc.device)
        tokens.clamp_(max=table.shape[1] - 1)
        table[places[: len(requests), None], tokens] = self.translate(self.req_to_token[requests[:, None], tokens])

    def translate(self, slots: Tensor) -> Tensor:
        """int32; 0 for tokens that the pool forgot."""
        return self.kv_pool.translate_loc_from_full_to_swa(slots.long()).clamp_(min=0).to(torch.int32)

    def _room(self, requests: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        for buffers in (self._captured, self._eager):
            if requests <= len(buffers[0]) and tokens <= len(buffers[2]):
                return buffers
        lines, counted = len(self._eager[0]), len(self._captured[0])
        if requests > lines:  # by doubling; as far as sizing counts, while that suffices
            most = counted if requests <= counted else len(self.req_to_token) - 1  # whose first is no request's
            lines = max(requests, min(2 * lines, most))
        tokens = max(tokens, len(self._eager[2]))
        self._eager = buffers = None  # released before there are new ones
        self._eager = self._buffers(lines, tokens)
        return self._eager

    def _buffers(self, requests: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """The table, the numbers of its lines, and slots of new tokens."""
        context, device = self.req_to_token.shape[1], self.req_to_token.device
        return (
            torch.zeros(requests, context, dtype=torch.int32, device=device),
            torch.arange(requests, device=device),
            torch.zeros(tokens, dtype=torch.int64, device=device),
        )
