"""Speculation on the CPU platform: the few steps for which SGLang has kernels of its own devices only, in torch.

Letters: B requests, D draft tokens of each. A request's drafts are a tree: token 0 is its root, ``next_token`` leads to
a token's first child, ``next_sibling`` to the next child of the same parent; -1 is none.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType

import torch
from torch import Tensor

from saw_int4.sglang_plugin.cpu_drafts import DraftBackends
from saw_int4.sglang_plugin.names import KV_CACHE_DTYPE


def worker_class(algorithm: str) -> type:
    """SGLang's worker over the functions below. Replaces SGLang's in this process, which has no other device."""
    tree = ModuleType("sglang.kernels.ops.speculative.reconstruct_tree")  # SGLang's does not import without kernels
    tree.reconstruct_indices_from_tree_mask_func = reconstruct_tree
    sys.modules[tree.__name__] = tree
    for module, functions in REPLACED.items():
        for name, function in functions.items():
            if not hasattr(importlib.import_module(module), name):
                raise RuntimeError(f"SGLang has no {module}.{name}: speculation cannot run on the CPU platform.")
            setattr(importlib.import_module(module), name, function)

    from sglang.srt.speculative import spec_utils

    later = inspect.unwrap(spec_utils._select_top_k_tokens_later)  # compiling it takes longer than it saves
    spec_utils._select_top_k_tokens_later = later
    module, name = WORKERS[algorithm]
    sglangs = getattr(importlib.import_module(module), name)

    class CpuWorker(sglangs):
        """SGLang's, for the one attention backend on CPU that verifies drafts."""

        def __init__(self, server_args, *args, **kwargs) -> None:
            if server_args.kv_cache_dtype != KV_CACHE_DTYPE:
                raise ValueError(
                    f"speculation on the CPU platform: --kv-cache-dtype is {server_args.kv_cache_dtype!r}, "
                    f"expected {KV_CACHE_DTYPE}: SGLang's own CPU attention does not verify drafts."
                )
            super().__init__(server_args, *args, **kwargs)

    return CpuWorker


def draft_slots(*, req_pool_indices, req_to_token, start_offset, end_offset, **_) -> Tensor:
    """Slots of the tokens ``start_offset .. end_offset - 1`` of each request, int64, one request after the other."""
    lines = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist())
    return torch.cat([req_to_token[row, start:end] for row, start, end in lines]).to(torch.int64)


def assign_slots(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, batch_size) -> None:
    """Write new slots into each request's line of ``req_to_token``."""
    news = (end_offset - start_offset).tolist()
    slots = out_cache_loc.to(req_to_token.dtype).split(news)
    for row, start, new, own in zip(req_pool_indices.tolist(), start_offset.tolist(), news, slots):
        req_to_token[row, start : start + new] = own


def last_slots(req_to_token: Tensor, req_pool_indices: Tensor, lens: Tensor) -> Tensor:
    """The slot of each request's last token, -1 where it has none."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(req_to_token, req_pool_indices, lens)


def own_slots(req_pool_indices, req_to_token, seq_lens, out_cache_loc, topk, num_cols, **_) -> None:
    """Write the slots of each request's ``topk * num_cols`` drafts, which follow its tokens, into ``out_cache_loc``."""
    places = seq_lens[:, None] + torch.arange(topk * num_cols)
    out_cache_loc.copy_(req_to_token[req_pool_indices].gather(1, places).flatten())


def last_tokens(accept_tokens, accept_lens, bonus_tokens, accept_stride, batch_size) -> None:
    """Write the last accepted token of each request into ``bonus_tokens``."""
    rows = accept_tokens.view(batch_size, accept_stride)
    bonus_tokens.copy_(rows.gather(1, accept_lens[:, None].long() - 1).squeeze(1))


def build_tree(
    parent_list, chosen, seq_lens, tree_mask, positions, index, next_token, next_sibling,
    topk, num_steps, num_drafts, mask_mode,
) -> None:  # fmt: skip
    """Mask, positions and links of the trees that a draft model made.

    Args:
        parent_list: int64 [B, P], for each group of ``topk`` tokens but the first the number of their parent.
        chosen: int64 [B, D - 1], ascending, the numbers of the tokens that became drafts 1 to D - 1.
        tree_mask: bool, flat [B, D, D]; written, as the arguments after it, see ``reconstruct_tree``.
        mask_mode: the layout of ``tree_mask``, which our backend chose.
    """
    trees = torch.eye(num_drafts, dtype=torch.bool).repeat(len(chosen), 1, 1)
    for tree, numbers, parents in zip(trees, chosen.tolist(), parent_list.tolist()):
        drafts = {number: place for place, number in enumerate(numbers, 1)}
        for number, place in drafts.items():
            group = number // topk
            tree[place] |= tree[drafts[parents[group]] if group else 0]
    tree_mask.copy_(trees.flatten())
    reconstruct_tree(trees, seq_lens, positions, index, next_token, next_sibling, len(chosen), num_drafts)


def reconstruct_tree(mask, seq_lens, positions, index, next_token, next_sibling, batch_size, num_drafts) -> None:
    """Positions and links of draft trees from their masks. All but the first two arguments are written.

    Args:
        mask: bool, flat [B, D, D]: draft i sees draft j, which is one of its ancestors or itself.
        seq_lens: [B], lengths without drafts.
        positions: int64, flat [B, D]. index, next_token, next_sibling: int64 [B, D].
    """
    order = torch.arange(num_drafts)
    earlier = order < order[:, None]
    ancestors = mask.view(batch_size, num_drafts, num_drafts).bool() & earlier
    positions.copy_((ancestors.sum(-1) + seq_lens[:, None]).flatten())
    index.copy_(torch.arange(batch_size * num_drafts).view(batch_size, num_drafts))
    parent = torch.where(ancestors, order, -1).amax(-1)
    child = parent[:, None, :] == order[:, None]  # [b, i, k]: k is a child of i
    next_token.copy_(_first(child))
    siblings = (parent[:, None, :] == parent[:, :, None]) & earlier.T & (parent >= 0)[:, None, :]
    next_sibling.copy_(_first(siblings))


def _first(flags: Tensor) -> Tensor:
    """Index of the first true one along the last dimension, -1 where there is none."""
    return torch.where(flags.any(-1), flags.int().argmax(-1), -1)


def verify_tree(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrieve_index,
    retrieve_next_token,
    retrieve_next_sibling,
    target_predict,
    topk=-1,
):
    """Walk each tree from its root along the target's own tokens, as far as they were drafted.

    Args:
        predicts: int32, flat [B * D]; written with the target's token after every accepted one.
        accept_index: int32 [B, depth], filled with -1; written with the accepted drafts, the root first.
        accept_token_num: int32 [B]; written with the number of accepted drafts, the root not counted.
        candidates, target_predict: [B, D] the drafts, and the target's token after each of them.
        retrieve_index: [B, D], place of a draft in the batch.

    Returns:
        The three that were written.
    """
    for b in range(candidates.shape[0]):
        node, accepted = 0, 0
        while True:
            wanted = target_predict[b, node]
            predicts[retrieve_index[b, node]] = wanted
            accept_index[b, accepted] = retrieve_index[b, node]
            node = int(retrieve_next_token[b, node])
            while node >= 0 and candidates[b, node] != wanted:
                node = int(retrieve_next_sibling[b, node])
            if node < 0 or accepted + 1 == accept_index.shape[1]:
                break
            accepted += 1
        accept_token_num[b] = accepted
    return predicts, accept_index, accept_token_num


def sample_tree(
    *, uniform_samples, target_probs, threshold_single, threshold_acc, retrive_index, retrive_next_token,
    retrive_next_sibling, predicts, accept_index, accept_token_num, candidates, **_,
) -> None:  # fmt: skip
    """The same, where the target's token after each draft is sampled: answers are distributed as without drafts."""
    if threshold_single < 1 or threshold_acc < 1:
        raise NotImplementedError("speculation on the CPU platform: acceptance thresholds below 1.")
    cumulative = target_probs.cumsum(-1)
    wanted = torch.searchsorted(cumulative, uniform_samples[..., None].float() * cumulative[..., -1:], right=True)
    wanted = wanted.clamp_(max=target_probs.shape[-1] - 1).squeeze(-1)
    links = (retrive_index, retrive_next_token, retrive_next_sibling)
    verify_tree(predicts, accept_index, accept_token_num, candidates, *links, wanted)


def keep_top_k(probs: Tensor, top_ks: Tensor) -> Tensor:
    """Probabilities [N, V] of the ``top_ks`` [N] likeliest tokens, renormalized."""
    ranks = probs.argsort(-1, descending=True).argsort(-1)
    kept = probs.masked_fill(ranks >= top_ks[:, None], 0)
    return kept / kept.sum(-1, keepdim=True)


def keep_top_p(probs: Tensor, top_ps: Tensor) -> Tensor:
    """Probabilities [N, V] of the likeliest tokens that together reach ``top_ps`` [N], renormalized."""
    from sglang.srt.layers.sampler import top_p_normalize_probs_torch

    return top_p_normalize_probs_torch(probs, top_ps)


def front_slots(num_front: Tensor, out_cache_loc: Tensor, front_out_cache_loc: Tensor) -> None:
    """Pack the first ``num_front[b]`` of each request's draft slots [B * D] into the last argument."""
    windows = out_cache_loc.view(len(num_front), -1)
    packed = windows[torch.arange(windows.shape[1]) < num_front[:, None]]
    front_out_cache_loc[: len(packed)] = packed


def accepted_slots(accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor, size: int) -> None:
    """Pack the slots of the accepted drafts into the third argument."""
    packed = out_cache_loc[accept_index[accept_index >= 0].long()]
    accept_out_cache_loc[: len(packed)] = packed


# What SGLang's modules call, by the name under which each of them knows it.
REPLACED = {
    "sglang.srt.mem_cache.allocation": {
        "assign_req_to_token_pool_func": assign_slots,
        "get_last_loc_triton": last_slots,
    },
    "sglang.srt.speculative.spec_utils": {
        "fill_front_out_cache_loc_func": front_slots,
        "fill_accept_out_cache_loc_func": accepted_slots,
    },
    "sglang.srt.speculative.eagle_worker_v2": {
        "DraftBackendFactory": DraftBackends,
    },
    "sglang.srt.speculative.eagle_worker_common": {
        "assign_draft_cache_locs_contiguous_func": own_slots,
        "fill_bonus_tokens_func": last_tokens,
    },
    "sglang.srt.speculative.eagle_utils": {
        "build_tree_kernel_efficient_func": build_tree,
        "verify_tree_greedy_func": verify_tree,
        "tree_speculative_sampling_target_only": sample_tree,
        "top_k_renorm_prob": keep_top_k,
        "top_p_renorm_prob": keep_top_p,
    },
}

WORKERS = {
    "NGRAM": ("sglang.srt.speculative.ngram_worker", "NGRAMWorker"),
    "EAGLE": ("sglang.srt.speculative.eagle_worker_v2", "EAGLEWorkerV2"),
    "STANDALONE": ("sglang.srt.speculative.standalone_worker_v2", "StandaloneWorkerV2"),
}
