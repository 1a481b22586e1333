"""The plugin proves itself: each seam is checked in the process that uses it, before anything is served.

SGLang swallows a plugin's exceptions, so that a broken seam would mean another cache than the one asked for. Every
check here ends in SystemExit, which nothing swallows.
"""

from __future__ import annotations

import os
import pkgutil

import torch

from saw_int4 import env
from saw_int4.sglang_plugin.names import (
    ATTENTION_BACKEND,
    FINGERPRINT_ATTRIBUTE,
    KV_CACHE_DTYPE,
    TESTED_SGLANG,
    sglang_version,
)


def fail(what: str) -> None:
    """Stop this process: an INT4 cache was asked for and cannot be given."""
    raise SystemExit(
        f"saw_int4: --kv-cache-dtype int4 cannot be served: {what} "
        "No other cache is used in its place. Start without --kv-cache-dtype int4 to serve unquantized."
    )


def tested_version() -> None:
    """RuntimeError on a version of SGLang that was not tested, unless the user insists."""
    version = sglang_version()
    if version not in TESTED_SGLANG and not env.flag(env.ALLOW_UNTESTED_SGLANG):
        raise RuntimeError(
            f"SGLang is {version}, tested are {', '.join(TESTED_SGLANG)}. Install one of these, or set "
            f"{env.ALLOW_UNTESTED_SGLANG}=1 to try this one."
        )


def target_exists(target: str) -> None:
    """RuntimeError when SGLang has no such function."""
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"SGLang has no {target} ({error})") from error


def plugin_in_place() -> None:
    """SystemExit unless registration succeeded and SGLang applied every hook."""
    from saw_int4.sglang_plugin import register

    problems = register.failures()
    if problems:
        fail("; ".join(problems) + ".")


def options_of_parent(server_args) -> env.Options:
    """The options this process shares with its parent. SystemExit when they are missing or differ."""
    expected = getattr(server_args, FINGERPRINT_ATTRIBUTE, None)
    if expected is None:
        fail("the process that started this one did not resolve the INT4 options (its plugin was not active).")
    try:
        options = env.published()
    except (RuntimeError, ValueError, TypeError) as error:
        fail(str(error))
    if options.fingerprint != expected:
        fail(
            f"{env.RESOLVED} says {os.environ[env.RESOLVED]} (fingerprint {options.fingerprint}), the server's "
            f"arguments carry fingerprint {expected}. Do not set {env.RESOLVED} by hand."
        )
    return options


def scheduler_init(original, self, server_args, *args, **kwargs):
    """AROUND Scheduler.__init__: check the seams before, and what was built after."""
    if server_args.kv_cache_dtype != KV_CACHE_DTYPE:
        return original(self, server_args, *args, **kwargs)
    plugin_in_place()
    options_of_parent(server_args)
    result = original(self, server_args, *args, **kwargs)
    runner = self.tp_worker.model_runner
    serving(runner)
    draft_caches(self.draft_worker)
    from saw_int4.sglang_plugin import report

    report.start(self, runner)
    return result


def serving(model_runner) -> None:
    """SystemExit unless this model runner stores and reads the INT4 format that was asked for."""
    from sglang.srt.distributed.parallel_state import get_world_group

    from saw_int4.sglang_plugin.backend import Int4AttentionBackend
    from saw_int4.sglang_plugin.pool import pools_of

    pool(model_runner)
    backend = model_runner.attn_backend
    if type(backend) is not Int4AttentionBackend:
        fail(f"the attention backend is {type(backend).__name__}, expected {ATTENTION_BACKEND}.")
    drafts = model_runner.spec_algorithm
    if not (drafts.is_none() or drafts.is_ngram()) and windows(model_runner.model):
        fail("a draft model for a model with sliding windows was not tested; use --speculative-algorithm NGRAM.")
    bf16 = env.published().bf16_layers
    formats = [f"{p.format.fingerprint} bf16 {bf16}" for p in pools_of(model_runner.token_to_kv_pool)]
    across_ranks(formats, get_world_group().cpu_group)


def draft_caches(worker) -> None:
    """SystemExit unless the draft models of a speculative worker, if it has any, cache in their own dtype."""
    for runner in getattr(getattr(worker, "draft_worker", None), "draft_runners", ()):
        if runner.token_to_kv_pool.dtype != runner.dtype:
            fail(
                f"the draft model's KV pool is {type(runner.token_to_kv_pool).__name__} of "
                f"{runner.token_to_kv_pool.dtype}, expected {runner.dtype}."
            )


def windows(model: torch.nn.Module) -> bool:
    """Whether a layer of the model attends through a sliding window."""
    from saw_int4.sglang_plugin.workspaces import attention_layers

    return any(layer.sliding_window_size >= 0 for layer in attention_layers(model))


def pool(model_runner) -> None:
    """SystemExit unless the KV pool holds INT4 rows of the format that the published options give this model."""
    from saw_int4.sglang_plugin.pool import Int4KVPool, pools_of

    plugin_in_place()
    options = options_of_parent(model_runner.server_args)
    if model_runner.kv_cache_dtype_str != KV_CACHE_DTYPE:
        fail(f"SGLang resolved --kv-cache-dtype to {model_runner.kv_cache_dtype_str!r}.")
    for kv_pool in pools_of(model_runner.token_to_kv_pool):
        if type(kv_pool) is not Int4KVPool:
            fail(f"the KV pool is a {type(kv_pool).__name__}, expected {Int4KVPool.__name__}.")
        expected = options.kv_format(kv_pool.head_dim)
        if len(kv_pool.transforms) != kv_pool.layer_num:  # built now, not at the first token: an artifact may be wrong
            fail(f"the KV pool has {kv_pool.layer_num} layers, its transforms are {len(kv_pool.transforms)}.")
        if kv_pool.format.fingerprint != expected.fingerprint:
            fail(f"the KV pool holds [{kv_pool.format.describe()}], asked for is [{expected.describe()}].")
        for name, buffers in (("K", kv_pool.k_buffer), ("V", kv_pool.v_buffer)):
            for layer, rows in enumerate(buffers):
                in_bf16 = kv_pool.layer_ids[layer] in options.bf16_layer_ids
                row_bytes = 2 * kv_pool.head_dim if in_bf16 else expected.row_bytes
                shape = (kv_pool.size + kv_pool.page_size, kv_pool.head_num, row_bytes)
                if tuple(rows.shape) != shape or rows.dtype != torch.uint8 or not rows.is_contiguous():
                    fail(
                        f"{name} of layer {layer} is {tuple(rows.shape)} {rows.dtype}, expected contiguous {shape} "
                        "uint8."
                    )


def from_every_rank(value, group) -> list:
    """The ``value`` of each rank of the process group, in their order. Every rank must call it."""
    values = [None] * group.size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def across_ranks(fingerprints: list[str], group) -> None:
    """SystemExit unless every rank of the process group holds the same formats."""
    everyone = from_every_rank(sorted(set(fingerprints)), group)
    if any(other != everyone[0] for other in everyone):
        fail(f"the ranks hold different formats: {everyone}. Give every node the same SAW_INT4_* variables.")
