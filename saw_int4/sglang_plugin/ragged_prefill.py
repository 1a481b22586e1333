"""16-bit attention of long extends by FlashInfer's ragged prefill: FA3 on Hopper, FA2 elsewhere.

A call needs a plan, made on the host from its lengths and copied to the GPU. All layers of a pass make the same few
calls, so the plans of the last few are kept, each in a wrapper with buffers of its own.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from saw_int4.sglang_plugin import prefill

logger = logging.getLogger(__name__)

Attend = Callable[..., tuple[Tensor, Tensor | None]]  # called as ``prefill.attend``
PLANS = 4  # kept; FlashInfer takes 8 MB of the GPU's memory and of the host's for each
SHARED_BYTES = 1 << 20  # FlashInfer's room for split keys, of which we make no use
DEVICE_BYTES = SHARED_BYTES + PLANS * (8 << 20)
HEAD_DIMS = (64, 128, 256)  # of FlashInfer's prefill kernels, FA2's and FA3's
DTYPES = (torch.bfloat16, torch.float16)
# Of FlashInfer, of its compiler, of its kernels.
FAILURES = (AssertionError, AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError)


def choose(layers: list, dtype: torch.dtype, device: torch.device) -> tuple[Attend, str]:
    """What computes the long extends of a model on this machine, and its name for the log.

    FlashInfer where every kind of layer passes a trial, which also compiles what FlashInfer has not compiled yet; else
    PyTorch. Once for the whole model: what is chosen does not change while serving.

    Args:
        layers: SGLang's attention layers.
        dtype: of the queries.
    """
    if device.type != "cuda":
        return prefill.attend, "PyTorch's scaled_dot_product_attention"
    try:
        ragged = RaggedPrefill(device)
        for kind in {
            (layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim, layer.sliding_window_size, layer.logit_cap)
            for layer in layers
        }:
            _try(ragged.attend, *kind, dtype, device)
    except FAILURES as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning("saw_int4: FlashInfer does not serve this model's long extends: %s", reason[-1])
        return prefill.attend, "PyTorch's flash attention"
    return ragged.attend, ragged.name


def _try(attend: Attend, H_q: int, H_kv: int, D: int, window: int, logit_cap: float, dtype, device) -> None:
    """A small call of those that serving makes."""
    q, k, v = (torch.zeros(n, h, D, dtype=dtype, device=device) for n, h in ((3, H_q), (5, H_kv), (5, H_kv)))
    sizes = [x for n in (3, 5) for x in (torch.tensor([0, n], dtype=torch.int32, device=device), [n])]
    attend(q, k, v, *sizes, causal=True, sm_scale=1.0, window=window, logit_cap=logit_cap, need_lse=True)
    torch.cuda.synchronize()


class RaggedPrefill:
    """``attend`` as ``prefill.attend``, on one GPU."""

    def __init__(self, device: torch.device) -> None:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        self._kernels = "fa3" if torch.cuda.get_device_capability(device)[0] == 9 else "fa2"
        self.name = f"FlashInfer's {self._kernels.upper()}"
        shared = torch.empty(SHARED_BYTES, dtype=torch.uint8, device=device)
        new = lambda: BatchPrefillWithRaggedKVCacheWrapper(shared, "NHD", backend=self._kernels)  # noqa: E731
        self._free = [new() for _ in range(PLANS)]
        self._planned: OrderedDict[tuple, tuple] = OrderedDict()  # what for: the wrapper, and when its plan was copied

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_indptr: Tensor,
        q_lens: list[int],
        k_indptr: Tensor,
        k_lens: list[int],
        *,
        score_shift: Tensor | None = None,
        need_lse: bool = False,
        **options,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``prefill.attend``, which takes what FlashInfer cannot: a shift of the scores before the cap."""
        if score_shift is not None:
            options |= {"score_shift": score_shift, "need_lse": need_lse}
            return prefill.attend(q, k, v, q_indptr, q_lens, k_indptr, k_lens, **options)
        wrapper = self._wrapper(q_lens, k_lens, q, k.shape[1], **options)
        if not need_lse:
            return wrapper.run(q, k, v), None
        out, lse = wrapper.run(q, k, v, return_lse=True)
        return out, lse * math.log(2)  # FlashInfer's is of base 2

    def _wrapper(
        self,
        q_lens: list[int],
        k_lens: list[int],
        q: Tensor,
        H_kv: int,
        *,
        causal: bool,
        sm_scale: float,
        window: int = -1,
        logit_cap: float = 0.0,
    ):
        """The wrapper that is planned for a call."""
        _, H_q, D = q.shape
        window, logit_cap = window if causal and window >= 0 else -1, max(logit_cap, 0.0)
        key = (tuple(q_lens), tuple(k_lens), H_q, H_kv, D, q.dtype, causal, sm_scale, window, logit_cap)
        if key in self._planned:
            self._planned.move_to_end(key)
            return self._planned[key][0]
        if D not in HEAD_DIMS or q.dtype not in DTYPES:
            raise ValueError(f"its prefill got head_dim {D} in {q.dtype}, expected one of {HEAD_DIMS} in 16 bits")
        if self._free:
            wrapper, copied = self._free.pop(), torch.cuda.Event()
        else:  # of the oldest plan, whose host buffer may be overwritten once the GPU has its copy
            wrapper, copied = self._planned.popitem(last=False)[1]
            copied.synchronize()
        indptrs = [torch.tensor([0, *accumulate(lens)], dtype=torch.int32) for lens in (q_lens, k_lens)]
        wrapper.plan(
            *indptrs,
            H_q,
            H_kv,
            D,
            causal=causal,
            sm_scale=sm_scale,
            window_left=window,
            logits_soft_cap=logit_cap,
            q_data_type=q.dtype,
            disable_split_kv=True,
        )
        copied.record()
        self._planned[key] = wrapper, copied
        return wrapper
