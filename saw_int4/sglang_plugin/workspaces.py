"""What the attention backend allocates beside the KV pool: its sizes, and their sum, which the pool leaves room for."""

from __future__ import annotations

import torch
from sglang.srt.layers.radix_attention import RadixAttention

from saw_int4 import env, ops
from saw_int4.sglang_plugin import ragged_prefill

GATHER_BYTES = 128 << 20  # keys and values that a long extend gathers at a time
DECODE_ROWS = 8192  # query rows that decode_attention's scratch has room for: short extends of a whole prefill chunk
DRAFT_CELLS = 1 << 21  # of drafts' slot tables made at a time: 16 MB for each of a handful of temporaries


def attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    """SGLang's attention layers of a model.

    Raises:
        NotImplementedError: there is none.
    """
    held = getattr(model, "attention_instances", {}).values()  # of models that Transformers implements: no submodules
    layers = [module for module in (*model.modules(), *held) if isinstance(module, RadixAttention)]
    if not layers:
        raise NotImplementedError(
            f"int4 KV cache: no attention layers found in {type(model).__name__}, expected RadixAttention among its "
            "modules or in its attention_instances. Way out: use another --kv-cache-dtype for this model."
        )
    return layers


def widest_window(layers: list[RadixAttention], known: int | None) -> int:
    """Most older tokens that a row of a windowed layer sees; 0: no layer has a window.

    Args:
        known: what the runner knows, which is some models' windows alone.
    """
    return max([known or 0, *(layer.sliding_window_size for layer in layers)])


def gather_tokens(token_bytes: int, window: int) -> int:
    """Tokens gathered at a time. ``token_bytes``: K and V of one in 16 bits, in the layer that has most."""
    return max(GATHER_BYTES // token_bytes, 2 * window)


def decode_shape(layers: list[RadixAttention]) -> tuple[int, int]:
    """Query heads and head_dim of decode_attention's scratch: the most of each that a layer has."""
    return max(layer.tp_q_head_num for layer in layers), max(layer.qk_head_dim for layer in layers)


def decode_rows(graph_rows: int, batch_invariant: bool) -> int:
    """Query rows that decode_attention's scratch is made for, at least.

    Batch-invariant calls pay for every row: those have room for captured graphs, and for more when they come.
    """
    return graph_rows if batch_invariant else max(graph_rows, DECODE_ROWS)


def beside_the_pool(kvc) -> dict[str, int]:
    """Bytes of each of a rank's workspaces on a GPU, by what it is for. ``kvc``: SGLang's KVCacheConfigurator."""
    from sglang.srt.runtime_context import get_exec, get_schedule, get_spec

    layers, device = attention_layers(kvc.model), torch.device(kvc.device, kvc.gpu_id)
    window = widest_window(layers, kvc.sliding_window_size)
    token_bytes = 2 * max(x.tp_k_head_num * x.qk_head_dim for x in layers) * kvc.model_dtype.itemsize
    requests = get_exec().graph.cuda_graph_config.decode.max_bs or 0
    rows = requests * (get_spec().speculative_num_draft_tokens or 1)
    invariant = env.published().batch_invariant
    cells = rows * (window + 1) if window else 0
    drafts = min(cells, DRAFT_CELLS) * 8 * 5 if rows > requests else 0
    # Of captured graphs, and of passes that do not fit them. Without --max-running-requests nobody knows yet how many
    # requests those will have: of more than graphs have, they grow uncounted.
    running = get_schedule().max_running_requests or 0
    lines = requests + max(requests, running) if kvc.is_hybrid_swa else 0
    return {
        "gathered keys and values": gather_tokens(token_bytes, window) * token_bytes,
        "decode_attention": ops.decode_workspace_bytes(
            device, decode_rows(rows, invariant), *decode_shape(layers), batch_invariant=invariant
        ),
        "FlashInfer's plans": ragged_prefill.DEVICE_BYTES,
        "slots of sliding windows": lines * kvc.model_config.context_len * 4 + cells * 4 + drafts,
    }
