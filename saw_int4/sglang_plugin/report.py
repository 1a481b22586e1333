"""What a server says about its cache: one line at start-up, server info, and Prometheus."""

from __future__ import annotations

import logging

from saw_int4 import env
from saw_int4.sglang_plugin import register, verify
from saw_int4.sglang_plugin.names import KV_CACHE_DTYPE
from saw_int4.sglang_plugin.pool import pools_of

logger = logging.getLogger(__name__)

_ON_ALL_RANKS = "_saw_int4_bytes_per_token"  # where a scheduler keeps the sum of every rank's


def describe(model_runner) -> dict:
    """The format and the sizes of a rank's INT4 cache, for server info and metrics: of its layers, its KV heads."""
    parts = pools_of(model_runner.token_to_kv_pool)
    lead = parts[0]
    return {
        "dtype": KV_CACHE_DTYPE,
        "format": lead.format.describe(),
        "fingerprint": lead.format.fingerprint,
        "row_bytes": lead.format.row_bytes,
        "bits_per_element": lead.format.bits_per_element,
        "capacity_ratio": lead.format.capacity_ratio,
        "bf16_layers": sorted(env.published().bf16_layer_ids),
        "layers": sorted(layer for part in parts for layer in part.layer_ids),
        "capacity_tokens": model_runner.max_total_num_tokens,
        "bytes_per_token": sum(p.bytes_per_token for p in parts),
        "bfloat16_bytes_per_token": sum(p.layer_num * p.head_num * p.head_dim * 2 * 2 for p in parts),
        "allocated_bytes": int(sum(sum(p.get_kv_size_bytes()) for p in parts)),
    }


def start(scheduler, model_runner) -> None:
    """Log the format once, export it when SGLang's metrics are on, and ask all ranks for their share of a token."""
    from sglang.srt.distributed.parallel_state import get_world_group

    info = describe(model_runner)
    shares = verify.from_every_rank(info["bytes_per_token"], get_world_group().cpu_group)
    setattr(scheduler, _ON_ALL_RANKS, sum(shares))
    logger.info(
        "saw_int4: serving [%s], layers in BF16 %s, %d tokens, %d bytes per token, seams %s",
        info["format"],
        info["bf16_layers"] or "none",
        info["capacity_tokens"],
        info["bytes_per_token"],
        " and ".join(sorted(set(register.seams().values()))),
    )
    if scheduler.server_args.enable_metrics:
        _export(info)


def internal_state(original, self, recv_req):
    """AROUND Scheduler.get_internal_state: ``/server_info`` gains the key ``kv_cache_format``.

    Of the rank that answers, the first of its replica, and a token's bytes on all of the replica's ranks.
    """
    result = original(self, recv_req)
    if self.server_args.kv_cache_dtype == KV_CACHE_DTYPE:
        total = {"bytes_per_token_on_all_ranks": getattr(self, _ON_ALL_RANKS)}
        result.internal_state["kv_cache_format"] = describe(self.tp_worker.model_runner) | total
    return result


# Prometheus gauges, by what they show of ``describe``.
GAUGES = {
    "capacity_tokens": "Tokens that the KV cache of this rank holds.",
    "bytes_per_token": "Bytes of KV cache that one token takes on this rank.",
    "allocated_bytes": "Bytes that the KV cache takes on this rank.",
}


def _export(info: dict) -> None:
    from prometheus_client import Gauge
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    ranks = {name: str(getattr(parallel, name) or 0) for name in ("tp_rank", "pp_rank", "dp_rank")}
    labels = {"format": info["format"], "fingerprint": info["fingerprint"], **ranks}
    for name, meaning in GAUGES.items():
        gauge = Gauge(f"saw_int4_kv_{name}", meaning, labelnames=list(labels), multiprocess_mode="mostrecent")
        gauge.labels(**labels).set(info[name])
