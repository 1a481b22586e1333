"""The attention backend ``saw_int4``: every key and value is written as an INT4 row, and read back from it.

On a CPU the new tokens' own keys are read back too: a cold prompt, a chunked one and a prefix hit then do the same
arithmetic, and agree bit by bit when their chunk boundaries do. On a GPU a long extend uses them fresh, as 16-bit
numbers: a cold prompt then costs what it costs without INT4, and is as exact.
"""

from __future__ import annotations

import logging

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from saw_int4 import env, ops
from saw_int4.sglang_plugin import bf16_layers, prefill, ragged_prefill, verify, workspaces
from saw_int4.sglang_plugin.plan import Group, Plan, ShortRequests, decode_limit, plan_decode, plan_extend
from saw_int4.sglang_plugin.pool import Int4KVPool, locate, pools_of
from saw_int4.sglang_plugin.speculation import VerifyBuffers, plan_verify, plan_windows, verify_mask
from saw_int4.sglang_plugin.transform import KeyTransform
from saw_int4.sglang_plugin.window_slots import WindowSlots

logger = logging.getLogger(__name__)

SINKS_IN_BF16 = (
    "int4 KV cache: attention layer {} has sinks, which layers in BF16 do not support. "
    f"Way out: leave it out of {env.BF16_LAYERS} (--saw-bf16-layers)."
)


class Int4AttentionBackend(AttentionBackend):
    """Decode and short extends through decode_attention, long extends through gather_kv and 16-bit attention."""

    needs_cpu_seq_lens = False  # decode reads lengths on the device; extends have their own on the host

    def __init__(self, model_runner) -> None:
        super().__init__()
        verify.pool(model_runner)
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.page_size = model_runner.page_size
        self.plan: Plan | None = None
        layers = workspaces.attention_layers(model_runner.model)
        self.window = workspaces.widest_window(layers, model_runner.sliding_window_size)
        self.window_slots: WindowSlots | None = None
        if hasattr(self.token_to_kv_pool, "swa_kv_pool"):
            table, kept = self.req_to_token_pool.req_to_token, model_runner.sliding_window_size
            self.window_slots = WindowSlots(self.token_to_kv_pool, table, kept)
        self._workspaces: list[torch.Tensor] = []  # only the last is in use; captured graphs hold the others' addresses
        self._workspace_rows = self._graph_rows = 0
        self._workspace_shape = workspaces.decode_shape(layers)
        self._batch_invariant = env.published().batch_invariant
        self._verify_buffers: VerifyBuffers | None = None  # where verifications are captured
        self._verify_mask = verify_mask(self.token_to_kv_pool.device)
        self._bf16_layers = bf16_layers.backend_for(model_runner)
        # As pool.locate finds them; all are checked now, not at the first request.
        self._layers = {layer.layer_id: self._check_layer(layer) for layer in layers}
        self._check_sinks(model_runner.model)

        cuda = torch.device(self.token_to_kv_pool.device).type == "cuda"
        self.fresh = cuda
        pools, model = pools_of(self.token_to_kv_pool), model_runner.model_config
        self.decode_limit = decode_limit(model.num_attention_heads // model.get_total_num_kv_heads(), cuda)
        token_bytes = 2 * max(p.head_num * p.head_dim for p in pools) * model_runner.dtype.itemsize
        self.capacity = workspaces.gather_tokens(token_bytes, self.window)
        self._gathered = torch.empty(
            self.capacity * token_bytes, dtype=torch.uint8, device=self.token_to_kv_pool.device
        )
        self._attend, kernel_name = ragged_prefill.choose(layers, model_runner.dtype, self._gathered.device)
        logger.info(
            "saw_int4: attention on %s: saw_int4 kernels for decode and extends of up to %d tokens; %s for longer "
            "ones, their own keys %s, %d cached tokens at a time (%d MB)",
            "CUDA" if cuda else "CPU",
            self.decode_limit,
            kernel_name,
            "fresh" if self.fresh else "read back",
            self.capacity,
            self._gathered.numel() >> 20,
        )

    # ---- metadata ------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch) -> None:
        """For a pass without a graph."""
        self._make_plan(forward_batch)
        self._bf16_layers.init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False) -> None:
        """For a graph's capture, and before it is replayed."""
        self._make_plan(forward_batch)
        self._bf16_layers.init_forward_metadata_out_graph(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch) -> None:
        self._bf16_layers.init_forward_metadata_in_graph(forward_batch)

    def _make_plan(self, forward_batch) -> None:
        """A captured graph keeps reading the tensors that a decode plan holds: the runner's own."""
        mode = forward_batch.forward_mode
        if mode.is_decode():
            self.plan = plan_decode(forward_batch)
        elif mode.is_target_verify():
            self.plan = plan_verify(forward_batch, self._verify_buffers)
            if self.window:
                table = self.req_to_token_pool.req_to_token
                self.plan.windowed = plan_windows(
                    self.plan.short, table, self.window, self.window_slots, self._verify_buffers
                )
        elif mode.is_extend() and not mode.is_draft_extend_v2():
            self.plan = plan_extend(forward_batch, self.decode_limit, self.fresh)
        elif mode.is_idle():
            return
        else:
            raise NotImplementedError(f"int4 KV cache: the backend does not serve forward mode {mode.name}.")
        if self.window_slots is not None:
            self.window_slots.fill(self.plan, forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        if self.window_slots is not None:
            self.window_slots.reserve(max_bs, max_num_tokens)
        self._bf16_layers.init_cuda_graph_state(max_bs, max_num_tokens)
        self._graph_rows = max_num_tokens
        self._verify_buffers = VerifyBuffers(max_bs, max_num_tokens, self.window, self.token_to_kv_pool.device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def shared_read_ends(self, fm) -> SharedReadEnds:
        """The kernels read req_to_token themselves, until the last layer."""
        return SharedReadEnds.UNKNOWN

    @property
    def verify_mask(self):
        return self._verify_mask

    def support_triton(self) -> bool:
        return torch.cuda.is_available()

    def _workspace(self, q: torch.Tensor, rows: int) -> torch.Tensor | None:
        """Scratch of decode_attention for so many query rows; grows in the eager pass before a capture, not in it."""
        rows = max(rows, workspaces.decode_rows(self._graph_rows, self._batch_invariant))
        if q.is_cuda and rows > self._workspace_rows:
            shape, invariant = self._workspace_shape, self._batch_invariant
            self._workspaces.append(ops.decode_workspace(q.device, rows, *shape, batch_invariant=invariant))
            self._workspace_rows = rows
        return self._workspaces[-1] if self._workspaces else None

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def _forward(self, q, k, v, layer, forward_batch, save_kv_cache, *, sinks=None, **unknown):
        unknown = [name for name, value in unknown.items() if value is not None]
        if unknown:
            raise NotImplementedError(
                f"int4 KV cache: layer {layer.layer_id} passes {', '.join(unknown)} to attention, which the backend "
                "does not know. Way out: use another --kv-cache-dtype for this model."
            )
        pool, local, is_swa = self._layer(layer)
        if pool.in_bf16(local):
            if sinks is not None:
                raise NotImplementedError(SINKS_IN_BF16.format(layer.layer_id))
            return self._bf16_layers.forward(q, k, v, layer, forward_batch, save_kv_cache)
        if save_kv_cache and k is not None:
            loc = KVWriteLoc(forward_batch.out_cache_loc, self.plan.swa_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v)
        # Through the public getters: they wait for rows that are still being loaded.
        rows = [buffer.view(torch.uint8) for buffer in self.token_to_kv_pool.get_kv_buffer(layer.layer_id)]

        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        options = dict(
            sm_scale=layer.scaling,
            logit_cap=layer.logit_cap,
            window=layer.sliding_window_size,
            sinks=None if sinks is None else sinks.float(),
        )
        table = self.plan.swa_table if is_swa else self.req_to_token_pool.req_to_token
        windowed = layer.sliding_window_size >= 0 and self.plan.windowed is not None
        short = self.plan.windowed if windowed else self.plan.short
        if short is not None:
            self._short(short, q, rows, table, is_swa, out, pool, pool.transforms[local], options)
        if self.plan.long:
            new = None
            if self.fresh and k is not None:
                new = tuple(x.view(-1, pool.head_num, pool.head_dim) for x in (k, v))
            groups = self.plan.groups(options["window"], is_swa, new is not None, table, self.capacity)
            for group in groups:
                self._long(group, q, new, rows, out, pool, pool.transforms[local], **options)
        out[self.plan.num_rows :] = 0
        return out.view(out.shape[0], -1)

    def _short(
        self, short: ShortRequests, q, rows, table, is_swa, out, pool: Int4KVPool, transform: KeyTransform, options
    ) -> None:
        n = self.plan.num_rows
        whole = short.rows is None
        q = q[:n] if whole else q[short.rows]
        result = ops.decode_attention(
            q,
            *rows,
            table if short.table is None else short.table,
            (short.batch_rows if is_swa else short.table_rows).to(torch.int64),
            short.seq_lens.to(torch.int64),
            short.q_indptr,
            max_q_len=short.max_q_len,
            tree_mask=short.tree_mask,
            page_size=self.page_size if short.table is None else 1,
            batch_invariant=self._batch_invariant,
            workspace=self._workspace(q, len(short.seq_lens) * short.max_q_len),
            rotation_order=pool.format.rotation_order,
            rotate_v=pool.format.rotate_v,
            k_mean=transform.mean,
            k_scale=transform.scale,
            k_sign=transform.sign,
            out=out[:n] if whole else None,
            **options,
        )
        if not whole:
            out[short.rows] = result

    def _long(
        self, group: Group, q, new, rows, out, pool: Int4KVPool, transform: KeyTransform, *,
        sm_scale, logit_cap, window, sinks,
    ) -> None:  # fmt: skip
        """16-bit attention. ``new``: K and V of the batch's tokens, used as they are; None: as the cache has them."""
        order, rotate_v = pool.format.rotation_order, pool.format.rotate_v
        q = q[group.rows]
        if new is not None:
            new = [x[group.rows] for x in new]
        options = dict(sm_scale=sm_scale, window=window, logit_cap=logit_cap)
        options["need_lse"] = sinks is not None or len(group.pieces) > 1
        if not group.pieces:
            sizes = (group.indptr, group.lens)
            result, lse = self._attend(q, *new, *sizes, *sizes, causal=True, **options)
        else:
            if new is not None:
                new[0] = ops.transform_rows(
                    new[0], rotation_order=order, mean=transform.mean, mul=transform.inv_scale, sign=transform.sign
                )
                new[1] = ops.transform_rows(new[1], rotation_order=order) if rotate_v else new[1]
            shift = None  # what centred keys leave out of every score: softmax does not see it, a cap and sinks do
            if transform.mean is not None and (logit_cap > 0 or sinks is not None):
                mean = transform.mean.repeat_interleave(q.shape[1] // pool.head_num, 0)
                shift = torch.einsum("thd,hd->th", q.float(), mean)
            result, lse = self._pieces(
                group,
                ops.transform_rows(q, rotation_order=order, mul=transform.scale, sign=transform.sign),
                new,
                rows,
                pool,
                score_shift=shift if logit_cap > 0 else None,
                **options,
            )
            if rotate_v:
                result = ops.transform_rows(result, rotation_order=order)
            if shift is not None and logit_cap <= 0:
                lse = lse + shift * sm_scale
        out[group.rows] = result if sinks is None else prefill.add_sinks(result, lse, sinks)

    def _pieces(self, group: Group, q, new, rows, pool: Int4KVPool, **options):
        """Attention and its denominators in the transformed space, one workspace of keys after the other."""
        total = None
        for keys in group.pieces:
            N, size = len(keys.slots), pool.head_num * pool.head_dim
            k, v = self._gathered.view(q.dtype)[: 2 * N * size].view(2, N, pool.head_num, pool.head_dim)
            ops.gather_kv(*rows, keys.slots, k, v)
            if keys.own is not None:
                k[keys.own], v[keys.own] = new
            part = self._attend(
                q, k, v, group.indptr, group.lens, keys.indptr, keys.lens, causal=keys.causal, **options
            )
            total = part if total is None else prefill.merge(*total, *part)
        return total

    # ---- layers --------------------------------------------------------------------------------------------------

    def _layer(self, layer) -> tuple[Int4KVPool, int, bool]:
        """Where a layer's rows are (see pool.locate); refuses layers that we would compute wrongly."""
        if layer.layer_id not in self._layers:
            self._layers[layer.layer_id] = self._check_layer(layer)
        return self._layers[layer.layer_id]

    def _check_layer(self, layer) -> tuple[Int4KVPool, int, bool]:
        pool, local, is_swa = locate(self.token_to_kv_pool, layer.layer_id)
        problem = None
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
            problem = "is not causal self-attention"
        elif (layer.qk_head_dim, layer.v_head_dim) != (pool.head_dim, pool.head_dim):
            problem = f"has head_dim {layer.qk_head_dim} and {layer.v_head_dim}, the pool {pool.head_dim}"
        elif layer.tp_k_head_num != pool.head_num:
            problem = f"has {layer.tp_k_head_num} KV heads, the pool {pool.head_num}"
        elif layer.xai_temperature_len > 0:
            problem = "scales its logits by position"
        elif layer.use_irope:
            problem = "attends in chunks"
        elif self.window_slots is not None and not is_swa and layer.sliding_window_size >= 0:
            problem = f"has window {layer.sliding_window_size}, outside of the sliding-window pool"
        elif is_swa and not 0 <= layer.sliding_window_size <= self.window_slots.window:
            problem = f"has window {layer.sliding_window_size}, its pool keeps {self.window_slots.window} older tokens"
        elif pool.in_bf16(local) and layer.logit_cap > 0:
            problem = "caps its logits, which was not tested for layers in BF16"
        elif layer.logit_cap > 0 and layer.logit_capping_method != "tanh":
            problem = f"caps its logits by {layer.logit_capping_method}"
        if problem is not None:
            raise NotImplementedError(
                f"int4 KV cache: attention layer {layer.layer_id} {problem}. "
                "Way out: use another --kv-cache-dtype for this model."
            )
        return pool, local, is_swa

    def _check_sinks(self, model: torch.nn.Module) -> None:
        """Refuses layers in BF16 beside sinks: the module that holds both passes them to attention."""
        for module in model.modules():
            if not any("sink" in name for name, _ in module.named_parameters(recurse=False)):
                continue
            for layer in module.children():
                pool, local, _ = self._layers.get(getattr(layer, "layer_id", None), (None, 0, False))
                if pool is not None and pool.in_bf16(local):
                    raise NotImplementedError(SINKS_IN_BF16.format(layer.layer_id))
