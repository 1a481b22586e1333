"""Attention of a draft model on the CPU platform, over its 16-bit cache: SGLang's torch_native, step by step.

Letters: B requests, each with T branches of drafts that grow by a token at every step.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor


class DraftBackends:
    """Attention of a draft model on CPU, in place of SGLang's factory, which knows no backend that runs here."""

    def __init__(self, draft_model_runner, topk: int, speculative_num_steps: int, **_) -> None:
        self._args = draft_model_runner, topk, speculative_num_steps

    def create_decode_backend(self) -> DraftSteps:
        return DraftSteps(*self._args)

    def create_draft_extend_backend(self) -> None:
        """The draft model's own, torch_native, which takes these extends as any other."""


class DraftSteps:
    """A draft model's steps after each other, each of one token for every branch: SGLang's torch_native for each.

    Branch t of a request has its slots at ``seq_len + t * num_steps`` of the request's line.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner, topk: int, num_steps: int) -> None:
        self._table = runner.req_to_token_pool
        self._topk, self._num_steps = topk, num_steps
        self.attn_backends = [_DraftStep(runner, step) for step in range(num_steps - 1)]

    def init_forward_metadata(self, forward_batch) -> None:
        lines = self._table.req_to_token[forward_batch.req_pool_indices]
        lens, steps = forward_batch.seq_lens[:, None], torch.arange(self._num_steps)
        tables = []
        for branch in range(self._topk):
            table = lines.clone()
            own = lines.gather(1, lens + branch * self._num_steps + steps)
            tables.append(table.scatter_(1, lens + steps, own))
        table = torch.stack(tables, 1).flatten(0, 1)
        for backend in self.attn_backends:
            backend.plan(table, forward_batch.seq_lens.repeat_interleave(self._topk))


class _DraftStep(TorchNativeAttnBackend):
    """One step: every branch is a request of its own, with its line of slots."""

    def __init__(self, runner, step: int) -> None:
        super().__init__(runner)
        self._new = step + 1  # drafts of a branch that are in the cache when it attends

    def plan(self, table: Tensor, lens: Tensor) -> None:
        """``table`` [B * T, width]: slots of each branch's tokens; ``lens`` [B * T], how many were there before."""
        self.req_to_token_pool = SimpleNamespace(req_to_token=table)
        self._lens = lens + self._new

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        branches = copy.copy(forward_batch)
        branches.req_pool_indices, branches.seq_lens = torch.arange(len(self._lens)), self._lens
        return super().forward_decode(q, k, v, layer, branches, save_kv_cache)
