"""Long extends through FlashInfer: what is asked of it, by a stand-in. On a GPU test_attention runs FlashInfer."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from saw_int4.sglang_plugin import prefill, ragged_prefill
from saw_int4.sglang_plugin.ragged_prefill import PLANS, RaggedPrefill, choose

pytestmark = pytest.mark.both_versions

H_Q, H_KV, D = 4, 2, 64


class Wrapper:
    """Does what FlashInfer's documentation says of its ragged wrapper: indptrs on the host, LSE of base 2."""

    made: list[Wrapper] = []

    def __init__(self, workspace, layout, backend):
        assert (layout, backend) == ("NHD", "fa3")
        self.plans = []
        self.made.append(self)

    def plan(self, q_indptr, k_indptr, *heads_and_dim, **options):
        assert heads_and_dim == (H_Q, H_KV, D)
        assert (q_indptr.device.type, q_indptr.dtype, k_indptr.dtype) == ("cpu", torch.int32, torch.int32)
        self.plans.append((q_indptr, k_indptr, options))

    def run(self, q, k, v, return_lse=False):
        q_indptr, k_indptr, options = self.plans[-1]
        assert q.dtype == options["q_data_type"]
        out, lse = prefill.attend(
            q,
            k,
            v,
            q_indptr,
            q_indptr.diff().tolist(),
            k_indptr,
            k_indptr.diff().tolist(),
            causal=options["causal"],
            sm_scale=options["sm_scale"],
            window=options["window_left"],
            logit_cap=options["logits_soft_cap"],
            need_lse=return_lse,
        )
        return (out, lse / math.log(2)) if return_lse else out


class Event:
    """A CUDA event, which a CPU does not have."""

    waited = 0

    def record(self):
        pass

    def synchronize(self):
        Event.waited += 1


@pytest.fixture
def ragged(monkeypatch) -> RaggedPrefill:
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithRaggedKVCacheWrapper=Wrapper))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Wrapper, "made", [])
    monkeypatch.setattr(Event, "waited", 0)
    return RaggedPrefill(torch.device("cpu"))


def call(attend, q_lens: list[int], k_lens: list[int], dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    shapes = ((sum(q_lens), H_Q), (sum(k_lens), H_KV), (sum(k_lens), H_KV))
    q, k, v = (torch.randn(*shape, D, dtype=dtype) for shape in shapes)
    return attend(q, k, v, None, q_lens, None, k_lens, **{"causal": True, "sm_scale": 0.1, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"need_lse": True},
        {"need_lse": True, "causal": False},
        {"need_lse": True, "window": 4},
        {"need_lse": True, "causal": False, "window": 4},  # keys older than every row, all of them in its window
        {"logit_cap": 2.0},
        {"logit_cap": 2.0, "need_lse": True, "score_shift": torch.linspace(-1, 1, 12 * H_Q).view(12, H_Q)},
    ],
)
def test_computes_as_pytorch_does(ragged, options):
    ours, theirs = (call(attend, [7, 5], [9, 20], **options) for attend in (ragged.attend, prefill.attend))
    for got, want in zip(ours, theirs):
        assert (got is None) == (want is None)
        assert got is None or torch.allclose(got, want, atol=1e-6)
    assert bool(sum(len(wrapper.plans) for wrapper in Wrapper.made)) == ("score_shift" not in options)


def test_layers_share_plans(ragged):
    """As many plans as there are kinds of calls; one more takes the oldest one's place once the GPU has its copy."""
    plans = lambda: sum(len(wrapper.plans) for wrapper in Wrapper.made)  # noqa: E731
    for _ in range(3):  # layers
        for n in range(PLANS):
            call(ragged.attend, [3 + n], [5 + n], window=4 if n else -1)
    assert (plans(), Event.waited, len(Wrapper.made)) == (PLANS, 0, PLANS)
    call(ragged.attend, [100], [100])
    assert (plans(), Event.waited) == (PLANS + 1, 1)
    call(ragged.attend, [4], [6], window=4)
    assert plans() == PLANS + 1  # not the oldest
    call(ragged.attend, [3], [5])
    assert (plans(), Event.waited, len(Wrapper.made)) == (PLANS + 2, 2, PLANS)


def layer(**changes):
    kind = dict(tp_q_head_num=H_Q, tp_k_head_num=H_KV, qk_head_dim=D, sliding_window_size=-1, logit_cap=0.0)
    return SimpleNamespace(**{**kind, **changes})


def test_choice(ragged, monkeypatch):
    """FlashInfer where it takes every kind of layer: decided by trials, before anything is served."""
    assert choose([layer()], torch.float32, torch.device("cpu")) == (
        prefill.attend,
        "PyTorch's scaled_dot_product_attention",
    )
    gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(ragged_prefill, "RaggedPrefill", lambda device: ragged)
    tried = []
    monkeypatch.setattr(ragged_prefill, "_try", lambda attend, *kind: tried.append(kind))
    kinds = [layer(), layer(), layer(sliding_window_size=512)]
    assert choose(kinds, torch.bfloat16, gpu) == (ragged.attend, "FlashInfer's FA3")
    assert sorted(kind[3] for kind in tried) == [-1, 512]


@pytest.mark.parametrize("why", ["not installed", "head_dim 80", "float32"])
def test_falls_back_to_pytorch_and_says_so(ragged, monkeypatch, caplog, why):
    if why == "not installed":
        monkeypatch.setitem(sys.modules, "flashinfer", None)
    else:
        monkeypatch.setattr(ragged_prefill, "RaggedPrefill", lambda device: ragged)
        dtype = torch.float32 if why == "float32" else torch.bfloat16
        monkeypatch.setattr(ragged_prefill, "_try", lambda attend, *kind: call(attend, [3], [5], dtype))
        monkeypatch.setattr(sys.modules[__name__], "D", 80 if why == "head_dim 80" else D)
    with caplog.at_level("WARNING"):
        chosen = choose([layer()], torch.bfloat16, SimpleNamespace(type="cuda"))
    assert chosen == (prefill.attend, "PyTorch's flash attention")
    assert "FlashInfer does not serve" in caplog.text
    assert why in caplog.text or why == "not installed"
