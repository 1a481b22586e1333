"""Random and adversarial inputs of the operators."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from saw_int4 import reference
from saw_int4.format import default_rotation_order, row_bytes

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)


def adversarial_rows(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """``[T, H, D]`` rows: noise, with constant, zero, huge, tiny, shifted, outlier, NaN and infinite rows among it."""
    x = torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(seed))
    hostile = [
        lambda r: r * 0 + 1.5,
        lambda r: r * 0,
        lambda r: -r * 0,
        lambda r: r * 1000,
        lambda r: r * 1e-6,
        lambda r: r * 1e-8,
        lambda r: r + 300,
        lambda r: torch.cat((r[:1] * 0 + 500, r[1:])),
        lambda r: torch.cat((r[:-1], r[-1:] * torch.nan)),
        lambda r: torch.cat((r[:3], r[3:4] * 0 - torch.inf, r[4:])),
        lambda r: r * 1e5,
    ]
    rows = x.view(-1, head_dim)
    for i, change in enumerate(hostile):
        if 2 * i + 1 < len(rows):
            rows[2 * i + 1] = change(rows[2 * i + 1])
    return x.to(dtype)


def key_vectors(heads: int, head_dim: int, seed: int = 0) -> dict[str, Tensor]:
    """A calibrated transform: mean, scale, inv_scale, sign, fp32 ``[H_kv, D]``."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(heads, head_dim, generator=g) * 2 + 0.25
    return {
        "mean": torch.randn(heads, head_dim, generator=g) * 2,
        "scale": scale,
        "inv_scale": 1 / scale,
        "sign": torch.randint(0, 2, (heads, head_dim), generator=g).float() * 2 - 1,
    }


@dataclass(frozen=True)
class DecodeCase:
    """One call of decode_attention, described.

    Attributes:
        seq_lens, q_lens: for each request, tokens in all and query rows.
        rotation_order: None for the largest that head_dim allows.
        sink, tree: with attention sinks, with a random tree mask.
        kv_scale: factor on keys, to make the softmax sharp.
    """

    head_dim: int = 64
    num_q_heads: int = 4
    num_kv_heads: int = 2
    seq_lens: tuple[int, ...] = (33, 1, 70)
    q_lens: tuple[int, ...] = (1, 1, 1)
    page_size: int = 1
    dtype: torch.dtype = torch.bfloat16
    rotation_order: int | None = None
    rotate_v: bool = False
    calibrated: bool = False
    window: int = -1
    logit_cap: float = 0.0
    sink: bool = False
    tree: bool = False
    kv_scale: float = 1.0
    groups: int = 1
    seed: int = 0


@dataclass
class DecodeInputs:
    """Tensors of a DecodeCase. ``options``: the keyword arguments shared by operator and oracle."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slot_table: Tensor
    table_rows: Tensor
    seq_lens: Tensor
    q_indptr: Tensor | None
    page_size: int
    options: dict = field(default_factory=dict)

    def positional(self) -> tuple:
        return self.q, self.k_cache, self.v_cache, self.slot_table, self.table_rows, self.seq_lens, self.q_indptr

    def to(self, device: torch.device) -> DecodeInputs:
        """A copy on another device."""
        move = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items() if k != "options"}
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return DecodeInputs(**move, options=options)


def make_slot_table(seq_lens: tuple[int, ...], page_size: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Shuffled pages for each request.

    Returns:
        (slot_table int32 ``[B + 2, max_len]`` with rows in no order and unused entries out of range, table_rows int64
        ``[B]``, number of slots). Page 0 belongs to nobody.
    """
    g = torch.Generator().manual_seed(seed)
    pages = [-(-n // page_size) for n in seq_lens]
    shuffled = (torch.randperm(sum(pages), generator=g) + 1).tolist()
    table_rows = torch.randperm(len(seq_lens) + 2, generator=g)[: len(seq_lens)]
    width = max([1, *(p * page_size for p in pages)])
    slot_table = torch.full((len(seq_lens) + 2, width), 2**31 - 1, dtype=torch.int32)
    for row, length, count in zip(table_rows.tolist(), seq_lens, pages):
        mine, shuffled = shuffled[:count], shuffled[count:]
        slots = [page * page_size + i for page in mine for i in range(page_size)][:length]
        slot_table[row, :length] = torch.tensor(slots, dtype=torch.int32)
    return slot_table, table_rows, (sum(pages) + 1) * page_size


def make_decode(case: DecodeCase) -> DecodeInputs:
    """Build the tensors of a case on the CPU. Unused slots of the caches are poisoned with NaN rows."""
    g = torch.Generator().manual_seed(case.seed)
    D, H_q, H_kv = case.head_dim, case.num_q_heads, case.num_kv_heads
    slot_table, table_rows, num_slots = make_slot_table(case.seq_lens, case.page_size, case.seed)
    order = default_rotation_order(D) if case.rotation_order is None else case.rotation_order
    vectors = key_vectors(H_kv, D, case.seed) if case.calibrated else {}

    tokens = sum(case.seq_lens)
    k = torch.randn(tokens, H_kv, D, generator=g) * case.kv_scale + vectors.get("mean", torch.zeros(H_kv, D))
    v = torch.randn(tokens, H_kv, D, generator=g) * torch.rand(tokens, 1, 1, generator=g) * 2 + 0.5
    caches = [torch.full((num_slots, H_kv, row_bytes(D, case.groups)), 0xFF, dtype=torch.uint8) for _ in range(2)]
    used = [slot_table[r, :n] for r, n in zip(table_rows.tolist(), case.seq_lens)]
    k_options = {f"k_{name}": vectors[name] for name in ("mean", "inv_scale", "sign") if vectors}
    slots = torch.cat([torch.empty(0, dtype=torch.int64), *(u.long() for u in used)])
    reference.append_kv(k, v, *caches, slots, rotation_order=order, rotate_v=case.rotate_v, **k_options)

    uniform = len(set(case.q_lens)) <= 1
    q_indptr = None if uniform else torch.tensor([0, *case.q_lens]).cumsum(0).to(torch.int32)
    rows = sum(case.q_lens)
    options = dict(
        sm_scale=D**-0.5,
        max_q_len=max([1, *case.q_lens]),
        rotation_order=order,
        rotate_v=case.rotate_v,
        logit_cap=case.logit_cap,
        window=case.window,
        **{f"k_{name}": vectors[name] for name in ("mean", "scale", "sign") if vectors},
    )
    if case.sink:
        options["sinks"] = torch.randn(H_q, generator=g)
    if case.tree:
        bits = torch.randint(0, 2**31, (rows,), generator=g)
        own = torch.cat([1 << torch.arange(n) for n in case.q_lens])  # a row sees itself
        options["tree_mask"] = bits | own
    return DecodeInputs(
        q=torch.randn(rows, H_q, D, generator=g).to(case.dtype),
        k_cache=caches[0],
        v_cache=caches[1],
        slot_table=slot_table,
        table_rows=table_rows,
        seq_lens=torch.tensor(case.seq_lens, dtype=torch.int64),
        q_indptr=q_indptr,
        page_size=case.page_size,
        options=options,
    )


def sixteen_bit_error(inputs: DecodeInputs, expected: Tensor, expected_lse: Tensor) -> tuple[float, float]:
    """What plain attention in q's dtype gets wrong on the same cache: the yardstick for a kernel's error.

    K and V are dequantized and rounded to q's dtype, and so are q, logits' operands and softmax weights; sums are
    fp32, as in any 16-bit attention kernel.

    Returns:
        Largest absolute error of (out, lse) against the oracle, over finite values.
    """
    dtype, options = inputs.q.dtype, dict(inputs.options)
    order, group = options["rotation_order"], inputs.q.shape[1] // inputs.k_cache.shape[1]
    worst, worst_lse = 0.0, 0.0
    for b, seq_len in enumerate(inputs.seq_lens.tolist()):
        n = options["max_q_len"]
        start = b * n if inputs.q_indptr is None else int(inputs.q_indptr[b])
        end = start + n if inputs.q_indptr is None else int(inputs.q_indptr[b + 1])
        if not seq_len or start == end:
            continue
        slots = inputs.slot_table[inputs.table_rows[b], :seq_len].long()
        k = reference.dequantize_rows(inputs.k_cache[slots])
        k = reference.hadamard(k * options.get("k_sign", 1.0), order)
        k = k * options.get("k_scale", 1.0) + options.get("k_mean", 0.0)
        v = reference.hadamard(reference.dequantize_rows(inputs.v_cache[slots]), order if options["rotate_v"] else 1)
        k, v = (x.to(dtype).float().repeat_interleave(group, 1) for x in (k, v))
        logits = torch.einsum("nhd,thd->hnt", inputs.q[start:end].float(), k) * options["sm_scale"]
        if options["logit_cap"] > 0:
            logits = options["logit_cap"] * torch.tanh(logits / options["logit_cap"])
        tree = options.get("tree_mask")
        masks = None if tree is None else tree[start:end].tolist()
        seen = reference.visible_tokens(seq_len, end - start, options["window"], masks)
        logits = logits.masked_fill(~seen, -torch.inf)
        if "sinks" in options:
            sinks = options["sinks"][:, None, None].expand(-1, end - start, 1)
            logits, v = torch.cat((logits, sinks), -1), torch.cat((v, torch.zeros_like(v[:1])))
        lse = logits.logsumexp(-1)
        out = torch.einsum("hnt,thd->nhd", (logits - lse[..., None]).exp().to(dtype).float(), v).to(dtype)
        for got, want, is_lse in ((out, expected[start:end], False), (lse.T, expected_lse[start:end], True)):
            error = (got.double() - want).abs()
            error = float(error[error.isfinite()].max()) if error.isfinite().any() else 0.0
            worst, worst_lse = (worst, max(worst_lse, error)) if is_lse else (max(worst, error), worst_lse)
    return worst, worst_lse
