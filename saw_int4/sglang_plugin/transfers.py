"""Rows that leave the pool, for storage or for another server: the name by which their format is known there.

Bytes written with one format, transform or model mean nothing under another. SGLang compares a name before it reads
them; without ours it would compare only ``int4``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging

from saw_int4.sglang_plugin.names import KV_CACHE_DTYPE

logger = logging.getLogger(__name__)

STORAGE_BACKENDS = (None, "file")  # those whose keys were shown to carry the model's name, which carries ours


def rows_name(kv_pool) -> str | None:
    """What the rows of a pool are; None when they are not ours."""
    from saw_int4.sglang_plugin.pool import Int4KVPool, pools_of

    parts = pools_of(kv_pool)
    if not all(isinstance(part, Int4KVPool) for part in parts):
        return None
    return "-".join([KV_CACHE_DTYPE, *sorted({part.format.fingerprint for part in parts})])


def pd_kv_layout(original, token_to_kv_pool):
    """AROUND what prefill and decode servers compare before the first transfer."""
    return rows_name(token_to_kv_pool) or original(token_to_kv_pool)


def storage_name(rows: str, layout: str, model_path: str, overrides: str) -> str:
    """What storage keys are given besides the tokens: rows, order of a page's bytes, and the model that made them."""
    from saw_int4.calibration.fingerprint import checkpoint_folder, model_fingerprint

    model = model_fingerprint(checkpoint_folder(model_path))
    return f"{rows}-{hashlib.sha256(repr((layout, model, overrides)).encode()).hexdigest()[:16]}"


_weights_named = True  # False once this process got weights that no checkpoint of its own holds


def storage_config(original, self, *args, **kwargs):
    """AROUND what HiCache's storage backends make their keys of. Also runs when a backend is attached to a server."""
    config = original(self, *args, **kwargs)
    rows = rows_name(self.mem_pool_device)
    if rows is None:
        return config
    if self.storage_backend_type not in STORAGE_BACKENDS:
        raise ValueError(
            f"--kv-cache-dtype int4: the storage backend is {self.storage_backend_type!r}, expected file: only its "
            "keys were shown to name the format. Way out: use file."
        )
    if not _weights_named:
        raise ValueError(
            "--kv-cache-dtype int4: this server got other weights while it ran, which its storage keys cannot name. "
            "Way out: restart it with a checkpoint of them."
        )
    from sglang.srt.runtime_context import get_model

    model = get_model()
    name = storage_name(rows, self.mem_pool_host.layout, model.model_path, model.json_model_override_args)
    logger.info("saw_int4: storage keys of this server end in %s", name)
    return dataclasses.replace(config, model_name=f"{config.model_name}-{name}" if config.model_name else name)


def update_weights(original, self, recv_req):
    """AROUND what gives a running server other weights: rows of them would be stored under the old model's name."""
    global _weights_named
    stored = getattr(self.scheduler.tree_cache, "enable_storage", False)
    if self.scheduler.server_args.kv_cache_dtype != KV_CACHE_DTYPE or not stored:
        # SGLang takes the name of a checkpoint that it loads from disk for the model's.
        _weights_named = original.__name__ == "update_weights_from_disk"
        return original(self, recv_req)
    from sglang.srt.managers import io_struct

    answer = getattr(io_struct, WEIGHT_UPDATES[original.__name__])
    problem = "--kv-cache-dtype int4: storage keys name the model that this server started with. Way out: restart it, "
    return answer(success=False, message=f"{problem}or detach the storage backend first.")


# Methods of SGLang's ``SchedulerWeightUpdaterManager`` that begin an update, and the answers they give.
WEIGHT_UPDATES = {
    "update_weights_from_disk": "UpdateWeightFromDiskReqOutput",
    "update_weights_from_ipc": "UpdateWeightsFromIPCReqOutput",
    "begin_weight_update": "BeginWeightUpdateReqOutput",
}
