"""Speculative decoding: each draft is verified as if it had been decoded on its own."""

from __future__ import annotations

import itertools
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import eagle_head, granite_swa, qwen3
from conftest import CALIBRATED
from server import Server, tiers_and_answers
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.eagle_utils import TreeMaskMode
from test_attention import H_KV, H_Q, PAGE, SLOTS, WINDOW, D, make_backend, make_layer, over_two_parts

from saw_int4 import ops
from saw_int4.format import row_bytes
from saw_int4.sglang_plugin import cpu_drafts, cpu_speculation, speculation, workspaces
from saw_int4.sglang_plugin.names import sglang_version

DRAFTS = 8


def random_trees(requests: int, seed: int = 0) -> torch.Tensor:
    """Masks [B, DRAFTS, DRAFTS]: each draft but the first has a random earlier one as its parent."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.eye(DRAFTS, dtype=torch.bool).repeat(requests, 1, 1)
    for mask in masks:
        for i in range(1, DRAFTS):
            mask[i] |= mask[int(torch.randint(i, (1,), generator=generator))]
    return masks


def full_mask(trees: torch.Tensor, lens: list[int]) -> torch.Tensor:
    """The mask as SGLang's workers hand it over: what each draft sees of the cached tokens too."""
    seen = [torch.cat([torch.ones(DRAFTS, n, dtype=torch.bool), tree], 1).flatten() for n, tree in zip(lens, trees)]
    return torch.cat(seen)


def test_bits_of_the_mask():
    lens = [5, 1, 40]
    trees = random_trees(3)
    bits = speculation.tree_bits(full_mask(trees, lens), torch.tensor(lens), DRAFTS)
    unpacked = (bits.view(3, DRAFTS, 1) >> torch.arange(DRAFTS)) & 1
    assert torch.equal(unpacked.bool(), trees)


def make_verification(backend, trees: torch.Tensor, lens: list[int]):
    table = backend.req_to_token_pool.req_to_token
    slots = torch.cat([table[i, n : n + DRAFTS] for i, n in enumerate(lens)])
    return SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        req_pool_indices=torch.arange(len(lens)),
        seq_lens=torch.tensor(lens),
        out_cache_loc=slots.to(torch.int64),
        spec_info=SimpleNamespace(custom_mask=full_mask(trees, lens), draft_token_num=DRAFTS),
    )


def fill(backend, generator) -> None:
    """Random tokens in every slot."""
    k, v = torch.randn(2, backend.token_to_kv_pool.size + PAGE, H_KV, D, generator=generator).bfloat16()
    backend.token_to_kv_pool._set_quantized_kv_buffer(0, 0, torch.arange(len(k)), k, v)


@pytest.mark.both_versions
@pytest.mark.parametrize(("window", "two_parts"), [(-1, False), (WINDOW, False), (WINDOW, True)])
def test_drafts_attend_along_their_branch(monkeypatch, window, two_parts):
    """Each draft's output is that of a decode step over the cached tokens, its ancestors and itself, or the last of
    them: over one pool, and over SGLang's two-part pool."""
    generator = torch.Generator().manual_seed(1)
    module = RadixAttention(H_Q, D, D**-0.5, H_KV, layer_id=0, sliding_window_size=window)
    backend = make_backend(monkeypatch, "kv", calibrated=True, layers=[module])  # of a runner that knows of no window
    backend._verify_buffers = None
    fill(backend, generator)
    lens, trees = [70, 3, 33], random_trees(3, seed=2)
    batch, layer = make_verification(backend, trees, lens), make_layer(sliding_window_size=window)
    q = torch.randn(3 * DRAFTS, H_Q * D, generator=generator).bfloat16()
    k, v = torch.randn(2, 3 * DRAFTS, H_KV * D, generator=generator).bfloat16()
    rows, transform = backend.token_to_kv_pool.rows(0), backend.token_to_kv_pool.transforms[0]
    backend.token_to_kv_pool._set_quantized_kv_buffer(0, 0, batch.out_cache_loc, k, v)
    if two_parts:
        over_two_parts(backend)
        part = backend.token_to_kv_pool.swa_kv_pool
        part.transforms = [transform]
        for own, plain in zip(part.rows(0), rows):
            own[backend.token_to_kv_pool.translate_loc_from_full_to_swa(torch.arange(SLOTS))] = plain[:SLOTS]
    backend.init_forward_metadata(batch)
    out = backend.forward_extend(q, k, v, layer, batch).view(3, DRAFTS, H_Q, D)

    table = backend.req_to_token_pool.req_to_token
    for request, (length, tree) in enumerate(zip(lens, trees)):
        for draft in range(DRAFTS):
            branch = length + tree[draft].nonzero().flatten()
            slots = torch.cat([table[request, :length], table[request, branch]])[None]
            alone = ops.decode_attention(
                q.view(3, DRAFTS, H_Q, D)[request, draft][None],
                *rows,
                slots.contiguous(),
                torch.tensor([0]),
                torch.tensor([slots.shape[1]]),
                sm_scale=layer.scaling,
                window=window,
                rotation_order=D,
                rotate_v=True,
                k_mean=transform.mean,
                k_scale=transform.scale,
                k_sign=transform.sign,
            )
            torch.testing.assert_close(out[request, draft], alone[0], rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(sglang_version() == "0.5.21", reason="draft models are refused")
def test_draft_models_leave_the_cached_tokens_out_of_the_mask(monkeypatch):
    """As the backend asks SGLang to: their masks and ngrams' give the same plan."""
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    backend = make_backend(monkeypatch, "k", calibrated=False)
    lens, trees = [70, 3, 33], random_trees(3, seed=2)
    batch = make_verification(backend, trees, lens)
    full = speculation.plan_verify(batch).short.tree_mask
    assert backend.verify_mask.mode == TreeMaskMode.QLEN_ONLY
    assert not backend.verify_mask.fits(1)
    batch.spec_info = EagleVerifyInput.create_idle_input(topk=4, spec_steps=3, num_verify_tokens=DRAFTS, device="cpu")
    batch.spec_info.custom_mask = trees.flatten()
    assert torch.equal(speculation.plan_verify(batch).short.tree_mask, full)


@pytest.mark.both_versions
def test_captured_graph_sees_the_next_drafts(monkeypatch):
    """A CUDA graph keeps the addresses of its capture: the plan of a replay must lie there too."""
    backend = make_backend(monkeypatch, "k", calibrated=False)
    backend.window = WINDOW
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=4 * DRAFTS)
    backend.init_forward_metadata_out_graph(make_verification(backend, random_trees(4), [1] * 4), in_capture=True)
    captured, windowed = backend.plan.short, backend.plan.windowed
    trees, lens = random_trees(4, seed=5), [60, 2, 9, 31]
    backend.init_forward_metadata_out_graph(make_verification(backend, trees, lens))
    assert captured.seq_lens.tolist() == [n + DRAFTS for n in lens]
    assert torch.equal(captured.tree_mask, speculation.tree_bits(full_mask(trees, lens), torch.tensor(lens), DRAFTS))
    monkeypatch.setattr(workspaces, "DRAFT_CELLS", 3 * (WINDOW + 1))  # a few lines at a time
    fresh = speculation.plan_windows(captured, backend.req_to_token_pool.req_to_token, WINDOW, None)
    for name in ("table_rows", "batch_rows", "seq_lens", "table"):
        assert torch.equal(getattr(windowed, name), getattr(fresh, name))


# ---- what the CPU platform does in place of SGLang's kernels -------------------------------------------------------


def links_of(trees: torch.Tensor, lens: list[int]):
    shape = (len(lens), DRAFTS)
    positions = torch.empty(len(lens) * DRAFTS, dtype=torch.int64)
    index, child, sibling = (torch.empty(shape, dtype=torch.int64) for _ in range(3))
    sizes = (len(lens), DRAFTS)
    cpu_speculation.reconstruct_tree(trees.flatten(), torch.tensor(lens), positions, index, child, sibling, *sizes)
    return positions.view(shape), index, child, sibling


@pytest.mark.skipif(sglang_version() == "0.5.21", reason="has no ngram worker for platforms outside SGLang")
def test_links_are_those_of_sglang():
    cpu_speculation.worker_class("NGRAM")
    from sglang.srt.speculative.ngram_worker import _derive_tree_links

    lens = [7] * 20
    trees = random_trees(20)
    positions, index, child, sibling = links_of(trees, lens)
    expected = _derive_tree_links(np.asarray(trees), 20, DRAFTS)
    assert torch.equal(child, expected[0]) and torch.equal(sibling, expected[1])
    assert torch.equal(positions, 7 + trees.sum(-1) - 1)
    assert index.flatten().tolist() == list(range(20 * DRAFTS))


def test_trees_of_a_draft_model():
    """Two tokens at a time: level 1 is 0 and 1, each has two children (2 and 3, 4 and 5), of which 3 and 4 go on."""
    parents, chosen = torch.tensor([[-1, 0, 1, 3, 4]]), torch.tensor([[0, 1, 3, 4, 6, 7, 8]])
    ancestry = {1: [1], 2: [2], 3: [1, 3], 4: [2, 4], 5: [1, 3, 5], 6: [1, 3, 6], 7: [2, 4, 7]}  # of drafts 1 to 7
    mask = torch.empty(DRAFTS * DRAFTS, dtype=torch.bool)
    positions = torch.empty(DRAFTS, dtype=torch.int64)
    links = [torch.empty(1, DRAFTS, dtype=torch.int64) for _ in range(3)]
    sizes = (2, 3, DRAFTS, TreeMaskMode.QLEN_ONLY)
    cpu_speculation.build_tree(parents, chosen, torch.tensor([50]), mask, positions, *links, *sizes)
    seen = {row: mask.view(DRAFTS, DRAFTS)[row].nonzero().flatten().tolist() for row in range(DRAFTS)}
    assert seen == {0: [0], **{row: [0, *line] for row, line in ancestry.items()}}
    assert positions.tolist() == [50, 51, 51, 52, 52, 53, 53, 53]
    index, child, sibling = (x[0].tolist() for x in links)
    assert index == list(range(DRAFTS))
    assert child == [1, 3, 4, 5, 7, -1, -1, -1]
    assert sibling == [-1, 2, -1, -1, -1, 6, -1, -1]


def test_branches_of_a_draft_model_attend_to_their_own_drafts():
    """Each of two steps, two branches of two requests: as one attention over the request's tokens and the branch's."""
    generator = torch.Generator().manual_seed(0)
    lens, topk, steps, heads, dim = torch.tensor([5, 9]), 2, 3, 2, 16
    slots = torch.randperm(64, generator=generator).view(2, 32)
    keys, values = torch.randn(2, 64, heads, dim, generator=generator)
    pool = SimpleNamespace(get_key_buffer=lambda _: keys, get_value_buffer=lambda _: values)
    table = SimpleNamespace(req_to_token=slots.to(torch.int32))
    runner = SimpleNamespace(device="cpu", req_to_token_pool=table, token_to_kv_pool=pool)
    drafts = cpu_drafts.DraftBackends(runner, topk, steps).create_decode_backend()
    batch = SimpleNamespace(req_pool_indices=torch.arange(2), seq_lens=lens, out_cache_loc=None, encoder_lens=None)
    drafts.init_forward_metadata(batch)
    layer = make_layer(tp_q_head_num=heads, tp_k_head_num=heads, qk_head_dim=dim, v_head_dim=dim, scaling=0.25)
    for step, backend in enumerate(drafts.attn_backends):
        q = torch.randn(2 * topk, heads * dim, generator=generator)
        out = backend.forward_decode(q, None, None, layer, batch, save_kv_cache=False).view(2, topk, heads, dim)
        for request, branch in itertools.product(range(2), range(topk)):
            n = int(lens[request])
            own = slots[request, n + branch * steps :][: step + 1]
            seen = torch.cat([slots[request, :n], own])
            logits = torch.einsum("hd,nhd->hn", q.view(2, topk, heads, dim)[request, branch], keys[seen])
            expected = torch.einsum("hn,nhd->hd", (logits * layer.scaling).softmax(-1), values[seen])
            torch.testing.assert_close(out[request, branch], expected)


def walk(trees, candidates, target):
    requests = len(trees)
    _, *links = links_of(trees, [3] * requests)
    predicts = torch.zeros(requests * DRAFTS, dtype=torch.int32)
    accepted = torch.full((requests, DRAFTS), -1, dtype=torch.int32)
    counts = torch.zeros(requests, dtype=torch.int32)
    return cpu_speculation.verify_tree(predicts, accepted, counts, candidates, *links, target)


@pytest.mark.both_versions
def test_acceptance():
    """Two branches under the root; the target follows the second one for two tokens, then leaves it."""
    tree = torch.eye(DRAFTS, dtype=torch.bool)
    for child, parent in ((1, 0), (2, 1), (3, 0), (4, 3), (5, 3), (6, 5), (7, 0)):
        tree[child] |= tree[parent]
    candidates = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17]])
    target = torch.tensor([[13, 0, 0, 15, 0, 99, 0, 0]])
    predicts, accepted, counts = walk(tree[None], candidates, target)
    assert accepted[0].tolist() == [0, 3, 5] + [-1] * 5
    assert counts.tolist() == [2]
    assert predicts[[0, 3, 5]].tolist() == [13, 15, 99]

    slots = torch.arange(100, 108)
    source, destination = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    cpu_speculation.accepted_slots(accepted, slots, source, 8)
    cpu_speculation.front_slots(counts + 1, slots, destination)
    assert source.tolist() == [100, 103, 105] + [0] * 5
    assert destination.tolist() == [100, 101, 102] + [0] * 5


@pytest.mark.both_versions
def test_sampled_answers_are_distributed_as_without_drafts():
    requests, vocabulary = 4000, 4
    torch.manual_seed(0)
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).repeat(requests, DRAFTS, 1)
    candidates = torch.randint(vocabulary, (requests, DRAFTS))
    _, *links = links_of(random_trees(1).repeat(requests, 1, 1), [3] * requests)
    predicts = torch.zeros(requests * DRAFTS, dtype=torch.int32)
    accepted = torch.full((requests, DRAFTS), -1, dtype=torch.int32)
    cpu_speculation.sample_tree(
        predicts=predicts,
        accept_index=accepted,
        accept_token_num=torch.zeros(requests, dtype=torch.int32),
        candidates=candidates,
        retrive_index=links[0],
        retrive_next_token=links[1],
        retrive_next_sibling=links[2],
        uniform_samples=torch.rand(requests, DRAFTS),
        target_probs=probs,
        threshold_single=1.0,
        threshold_acc=1.0,
    )
    for place in (0, 1):  # the first token, and the second where a draft was accepted
        rows = accepted[:, place]
        tokens = predicts[rows[rows >= 0].long()]
        shares = torch.bincount(tokens, minlength=vocabulary) / len(tokens)
        assert len(tokens) > 1000
        assert (shares - probs[0, 0]).abs().max() < 0.04


# ---- the served engine ----------------------------------------------------------------------------------------------


NGRAM = ["--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(DRAFTS)]
STEPS = 4


def draft_model(algorithm: str, path: Path, topk: int) -> list[str]:
    """Flags for drafts of so many steps by a model, its likeliest ``topk`` tokens each."""
    drafts = STEPS + 1 if topk == 1 else DRAFTS
    flags = f"--speculative-algorithm {algorithm} --speculative-draft-model-path {path} --speculative-num-steps {STEPS}"
    return f"{flags} --speculative-eagle-topk {topk} --speculative-num-draft-tokens {drafts}".split()


@pytest.fixture(scope="module", params=["ngram", "standalone"])
def drafting_server(request, model, logs):
    """As ``int4_server``, with drafts: ngrams, as trees; the same model over a 16-bit cache, as chains in pages."""
    drafts = NGRAM if request.param == "ngram" else [*draft_model("STANDALONE", model, 1), "--page-size", str(PAGE)]
    args = ["--kv-cache-dtype", "int4", "--max-total-tokens", "1024", "--context-length", "512", *drafts]
    kept = {"SGLANG_JIT_CACHE_DIR": str(Path.home() / ".cache/sglang/jit")}  # SGLang compiles its ngram corpus once
    server = Server(model, logs / f"{request.param}.log", *args, HOME=str(logs), **kept, **CALIBRATED)
    try:
        yield server.ready()
    finally:
        server.stop()


PROMPTS = [
    "Count: one two three four one two three four one two three four one two",
    "The capital of France is",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a, b):",
]


@pytest.mark.skipif(sglang_version() == "0.5.21", reason="has no ngram worker for platforms outside SGLang")
def test_answers(drafting_server, int4_server, tokenizer):
    """Greedy answers and their log probabilities are those of decoding, up to what BF16 rounds otherwise.

    Other numbers of rows round otherwise, and near a tie that decides a token: compared is what comes before.
    """
    lengths = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        drafted, plain = (s.generate(ids, 48, return_logprob=True)["meta_info"] for s in (drafting_server, int4_server))
        assert drafted["completion_tokens"] == 48
        lengths.append(drafted["spec_accept_length"])
        pairs = list(zip(drafted["output_token_logprobs"], plain["output_token_logprobs"], strict=True))
        common = list(itertools.takewhile(lambda pair: pair[0][1] == pair[1][1], pairs))
        gap = sum(abs(ours[0] - theirs[0]) for ours, theirs in common) / max(1, len(common))
        print(f"{lengths[-1]:.2f} tokens a pass, {len(common)} tokens in common, log probabilities {gap:.4f} apart")
        assert len(common) >= 8
        assert gap < 0.08  # 0.02 was measured
    assert max(lengths) > 2


@pytest.mark.skipif(sglang_version() == "0.5.21", reason="has no ngram worker for platforms outside SGLang")
def test_sampling_and_batches(drafting_server, text_ids):
    """Requests of different lengths, sampled, verified together; nothing is left behind."""
    sampling = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "max_new_tokens": 12, "ignore_eos": True}
    body = {"input_ids": [text_ids[100 : 100 + n] for n in (3, 60, 17, 41)], "sampling_params": sampling}
    answers = drafting_server.call("/generate", body)
    assert [a["meta_info"]["completion_tokens"] for a in answers] == [12] * 4
    drafting_server.flush()
    assert drafting_server.state()["test_free_tokens"] == 1024


@pytest.mark.skipif(sglang_version() == "0.5.21", reason="has no worker for platforms outside SGLang")
def test_acceptance_is_that_of_the_two_caches(drafting_server, bf16_server, text_ids):
    """The model drafts for itself with a 16-bit cache: drafts fail where 4 bits decide otherwise, and only there.

    Where they do, the BF16 server says: it is given the answers, and names its own token at every place.
    """
    if "STANDALONE" not in drafting_server.text():
        pytest.skip("ngrams do not draft by a model")
    length, passes, expected = 48, 0, 0
    for start in (0, 7000, 14_000):
        ids = text_ids[start : start + 120]
        meta = drafting_server.generate(ids, length, return_logprob=True)["meta_info"]
        answer = [token for _, token, _ in meta["output_token_logprobs"]]
        passes += meta["spec_verify_ct"]
        options = dict(return_logprob=True, logprob_start_len=len(ids) - 1, top_logprobs_num=1)
        read = bf16_server.generate(ids + answer, 1, **options)["meta_info"]["input_top_logprobs"][-length:]
        agrees = [top[0][1] == token for top, token in zip(read, answer, strict=True)]
        place = 1  # the first token comes from the prompt
        while place < length:
            run = len(list(itertools.takewhile(bool, agrees[place : place + STEPS])))
            place, expected = place + run + 1, expected + 1
    print(f"{3 * length / passes:.2f} tokens a pass, {3 * length / expected:.2f} expected")
    assert passes == pytest.approx(expected, rel=0.15)
    assert 3 * length / passes > 3


TINY = ["--kv-cache-dtype", "int4", "--context-length", "256"]


def read_again(server, ids: list[int], room: int) -> float:
    """An answer's tokens for each pass. Its log probabilities are those that the server gives it as a prompt, and
    nothing is left of it in the pool."""
    free = server.state()["test_free_tokens"]
    meta = server.generate(ids, room, return_logprob=True)["meta_info"]
    answer = meta["output_token_logprobs"]
    assert len(answer) == room
    server.flush()
    assert server.state()["test_free_tokens"] == free
    again = server.prompt_logprobs(ids + [token for _, token, _ in answer[:150]])[-150:]  # room for drafts after it
    gap = sum(abs(said[0] - read) for said, read in zip(answer, again)) / 150
    print(f"{meta['spec_accept_length']:.2f} tokens a pass, log probabilities {gap:.3f} apart when read again")
    assert gap < 0.2  # BF16 rounds otherwise with other numbers of rows, and codes amplify that
    return meta["spec_accept_length"]


@pytest.mark.skipif(sglang_version() == "0.5.21", reason="has no worker for platforms outside SGLang")
def test_eagle_to_the_end(model, tmp_path, logs):
    """A draft model's cache is counted; drafts go on to the end of the context, as trees. The tiny model soon repeats
    itself, which is what this EAGLE head drafts."""
    args = draft_model("EAGLE", eagle_head(model, tmp_path / "head"), 4)
    token_bytes = 3 * 2 * 2 * row_bytes(128) + 2 * 2 * 32 * 2  # the draft's layer has two heads of 32 in BF16
    free = {"SAW_TEST_CACHE_BYTES": str(512 * token_bytes)}
    server = Server(qwen3(model, tmp_path / "model"), logs / "eagle-tiny.log", *TINY, *args, **free)
    try:
        server.ready()
        assert server.info()["max_total_num_tokens"] == server.state()["test_free_tokens"] == 512
        ids = list(range(100, 120)) * 3
        assert read_again(server, ids, 256 - len(ids) - STEPS * 4) > 1.5  # SGLang keeps as much for EAGLE's drafts
    finally:
        server.stop()


@pytest.mark.skipif(sglang_version() == "0.5.21", reason="has no worker for platforms outside SGLang")
def test_windows_and_tiers(model, tmp_path, logs):
    """Ngrams as chains in pages of 16 tokens, for a model with sinks and with windows in a pool of their own, whose
    rows go to host memory and files."""
    tiers = "--enable-hierarchical-cache --hicache-ratio 4 --hicache-io-backend direct --hicache-storage-backend file"
    tiers += " --hicache-storage-prefetch-policy wait_complete --enable-cache-report --max-total-tokens 512"
    tiers += " --page-size 16 --chunked-prefill-size 64"  # a prompt of 200 is cut where its hit will end
    early = ["--hicache-storage-backend-extra-config", '{"prefetch_threshold": 16}']
    variables = {"SAW_TEST_CACHE_BYTES": str(512 * 4 * 2 * 2 * row_bytes(64))}
    variables |= {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(tmp_path)}
    args = [*TINY, *NGRAM, "--speculative-ngram-max-bfs-breadth", "1", *tiers.split(), *early]
    server = Server(granite_swa(model, tmp_path / "model"), logs / "ngram-tiny.log", *args, **variables)
    try:
        server.ready()
        assert "SWAKVPool mem usage" in server.text()
        assert read_again(server, list(range(100, 120)) * 3, 190) > 1.5
        tiers, (cold, *hits) = tiers_and_answers(server, 200, 16, 1)
        assert tiers[1:] == ["device", "host", "storage"]
        assert hits == [cold] * 3
        with pytest.raises(urllib.error.HTTPError) as refused:  # its rows would be stored under the old model's name
            server.call("/update_weights_from_disk", {"model_path": str(tmp_path / "model")})
        assert b"storage keys name the model" in refused.value.read()
    finally:
        server.stop()
