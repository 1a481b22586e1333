"""The ladder's quantizers and figures, against arithmetic one can do by hand."""

import math
from dataclasses import replace

import pytest
import tiny_checkpoint
import torch

from saw_int4 import reference
from saw_int4.calibration import fit
from saw_int4.calibration.attention_hook import AttentionCall, load_model
from saw_int4.calibration.statistics import LayerStatistics
from saw_int4.evaluation import ladder, measure, quantizers, report, text, variants
from saw_int4.evaluation.methods import keeping, methods
from saw_int4.evaluation.quantizers import LayerSample

HEADS, D = 2, 64


@pytest.fixture(scope="module")
def sample():
    g = torch.Generator().manual_seed(0)
    k = torch.randn(600, HEADS, D, generator=g) * torch.exp(0.7 * torch.randn(1, HEADS, D, generator=g))
    q, v = torch.randn(600, 2 * HEADS, D, generator=g), torch.randn(600, HEADS, D, generator=g)
    q = q * torch.exp(0.7 * torch.randn(1, 1, D, generator=g)) + torch.randn(1, 1, D, generator=g)
    call = AttentionCall(0, q, k, v, D**-0.5, None)
    return LayerSample(LayerStatistics.of(call, k[0]), k, v)


def logit_error(sample, keys):
    """Mean squared error of q.k over random pairs, weighted by the queries' second moment."""
    error = (keys - sample.k).double()
    return float(torch.einsum("thd,hde,the->", error, sample.statistics.q_moment, error))


@pytest.mark.parametrize("rotate_v", [False, True])
def test_our_rows_are_the_format(sample, rotate_v):
    transform = fit.signed(fit.balanced(sample.statistics), sample.statistics, D)
    keys, values = quantizers.int4_rows(D, rotate_v, {0: transform})(0, sample.k.bfloat16(), sample.v.bfloat16())
    k = sample.k.bfloat16()
    t = reference.transform_keys(k, D, transform.mean, 1 / transform.scale, transform.sign)
    t = reference.dequantize_rows(reference.quantize_rows(t))
    want = reference.hadamard(t * transform.sign, D) * transform.scale + transform.mean
    torch.testing.assert_close(keys, want, rtol=1e-5, atol=1e-5)
    order = D if rotate_v else 1
    v = reference.hadamard(sample.v.bfloat16().float(), order)
    want = reference.hadamard(reference.dequantize_rows(reference.quantize_rows(v)), order)
    torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-5)


def test_uniform_stays_within_half_a_step(sample):
    step = (sample.k.amax(-1) - sample.k.amin(-1)) / 15
    error = (quantizers.uniform(sample.k) - sample.k).abs().amax(-1)
    assert (error <= 0.502 * step + 2e-3 * sample.k.abs().amax(-1)).all()


def test_elaborate_roundings_beat_the_plain_one():
    rows = torch.randn(4096, 1, D, generator=torch.Generator().manual_seed(0))  # as a rotation leaves them

    def error(rounded):
        return float((rounded - rows).square().sum())

    fixed = error(quantizers.fitted(rows))
    assert fixed < 0.99 * error(quantizers.uniform(rows))
    assert error(fit.round_trip(rows)) < 0.9 * fixed  # the grid that suits a row best, of three
    assert error(fit.round_trip(rows, groups=2)) < 0.7 * fixed


def test_comparators_do_what_they_are_for(sample):
    samples = {0: sample}
    plain = quantizers.rotated(D, False, quantizers.uniform, {0: fit.plain(sample.statistics)})
    base = logit_error(sample, plain(0, sample.k, sample.v)[0])
    assert logit_error(sample, quantizers.gptq(samples, D)(0, sample.k, sample.v)[0]) < 0.8 * base
    unrotated = logit_error(sample, quantizers.uniform(sample.k))
    assert logit_error(sample, quantizers.mixed_precision(samples, 1 / 8)(0, sample.k, sample.v)[0]) < unrotated
    scalar, pairs = (quantizers.kmeans(samples, D, channels)(0, sample.k, sample.v) for channels in (1, 2))
    for keys, values in (scalar, pairs):
        assert (keys - sample.k).norm() < 0.15 * sample.k.norm()
        assert (values - sample.v).norm() < 0.15 * sample.v.norm()
    calibrated = fit.fit_layer(sample.statistics, D).transform
    ours = quantizers.int4_rows(D, False, {0: calibrated})(0, sample.k, sample.v)[0]
    assert logit_error(sample, ours) < 0.8 * base
    assert (quantizers.fp8()(0, sample.k, sample.v)[0] - sample.k).abs().max() <= 2**-4 * sample.k.abs().max()


def test_layers_are_left_alone(sample):
    def broken(layer, k, v):
        return k + 1, v + 1

    kept = quantizers.except_layers(broken, {3})
    assert torch.equal(kept(3, sample.k, sample.v)[0], sample.k)
    assert torch.equal(kept(2, sample.k, sample.v)[0], sample.k + 1)
    alone = quantizers.only_layer(broken, 3)
    assert torch.equal(alone(2, sample.k, sample.v)[1], sample.v)
    assert torch.equal(alone(3, sample.k, sample.v)[1], sample.v + 1)


@pytest.mark.parametrize(("head_dim", "bits"), [(64, 4.5), (128, 4.25), (256, 4.125)])
def test_bits_count_the_parameters(head_dim, bits):
    known = methods(head_dim)
    assert known["bf16"].bits(head_dim, 30) == 16
    assert {m.bits(head_dim, 30) for m in known.values() if m.ours} == {bits, 4 + 64 / head_dim}
    edges = keeping(known["calibrated-kv"], "first:1+last:1", 30)
    assert edges.bits(head_dim, 30) == pytest.approx((2 * 16 + 28 * bits) / 30)
    assert known["calibrated-kv-2g"].bits(head_dim, 30) == 4 + 64 / head_dim
    assert known["mixed"].bits(head_dim, 30) == pytest.approx(((7 * 4 + 8) / 8 + 4 + 96 / head_dim) / 2)


def test_figures_by_hand():
    """Two tokens of vocabulary, 300 positions: logits (0, 0) against (0, ln 3)."""
    ids = torch.ones(301, dtype=torch.int64)
    exact, found = torch.zeros(301, 2), torch.tensor([[0.0, math.log(3)]]).repeat(301, 1)
    row = measure.summarize([measure.compare(exact, found, ids)])
    assert row["tokens"] == 300
    assert row["reference_perplexity"] == pytest.approx(2)
    assert row["perplexity"] == pytest.approx(4 / 3)
    assert row["ratio"] == pytest.approx(2 / 3)
    assert row["kl"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)
    assert row["ratio_low"] == pytest.approx(row["ratio_high"], rel=1e-5)  # every block is the same
    assert row["top1_agreement"] == 0  # argmax of a tie is the first


def test_interval_covers_the_truth():
    """Over 200 repetitions of 40 blocks, a 95 % interval misses the mean about 10 times."""
    g = torch.Generator().manual_seed(0)
    missed = 0
    for _ in range(200):
        mean, margin = measure.interval((torch.randn(40, generator=g) + 1).tolist())
        missed += abs(mean - 1) > margin
    assert 3 <= missed <= 22


def test_windows():
    found = text.windows(torch.arange(100), 30, 3)
    assert [(int(w[0]), len(w)) for w in found] == [(0, 30), (35, 30), (70, 30)]
    with pytest.raises(ValueError, match="4 windows of 30 need 120"):
        text.windows(torch.arange(100), 30, 4)
    opened = text.windows(torch.arange(100), 30, 3, bos=0)
    assert [(int(w[0]), int(w[1]), len(w)) for w in opened] == [(0, 1, 30), (0, 36, 30), (0, 71, 30)]
    assert int(text.windows(torch.arange(100), 30, 3, bos=7)[1][0]) == 35  # a text that does not open with it


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_checkpoint.write(folder)
    return ladder.Settings(str(model), context=192, windows=2, calibration_tokens=640, generate=4, needle=64)


def test_ladder_fills_resumes_and_reports(settings, tmp_path, monkeypatch):
    names = ["bf16", "bdr-32", "calibrated-kv"]
    ladder.Ladder(settings, tmp_path).run(names[:2])
    again = ladder.Ladder(settings, tmp_path)
    assert len(again.cells) == 2 * 2 + 2 * 2 + 2 * 5 * 2  # windows, greedy, needle at five depths of two haystacks
    calls = []
    original = measure.compare
    monkeypatch.setattr(measure, "compare", lambda *args: calls.append(1) or original(*args))
    again.run(names)
    assert len(calls) == 2  # the new method's windows alone
    rows = again.results()
    assert [row["method"] for row in rows] == names
    assert rows[0]["ratio"] == 1 and rows[0]["kl"] == 0
    assert rows[0]["greedy_until_parting"] == 4 and rows[0]["greedy_margin"] == 0
    assert 0 < rows[2]["kl"] < rows[1]["kl"]
    table = report.table(rows)
    assert all(name in table for name in names) and "needle" in table
    assert rows[0]["needles"] == 10 and set(rows[0]["needle_exact_by_depth"]) == set(ladder.NEEDLE_DEPTHS)


def test_layers_in_bf16_and_what_they_take_away(settings, tmp_path):
    run = ladder.Ladder(replace(settings, generate=0, needle=0), tmp_path)
    run.run(["bf16", "bdr-32", "bdr-32@0+2", "bdr-32@first:3"])
    exact, all_of_them, one_of_them, none_of_them = run.results()
    assert none_of_them["method"] == "bdr-32@first:3" and one_of_them["bits"] == pytest.approx((2 * 16 + 5) / 3)
    assert none_of_them["kl"] == exact["kl"] == 0
    assert 0 < one_of_them["kl"] < all_of_them["kl"]
    layers = run.sensitivity("bdr-32")
    assert sorted(row["layer"] for row in layers) == [0, 1, 2]
    assert layers[0]["kl_of_all"] > layers[0]["kl"] >= layers[-1]["kl"] > 0
    assert layers[0]["extra_bits_in_bf16"] == pytest.approx((16 - 5) / 3)
    assert "bits that BF16 adds" in report.sensitivity_table(layers)
    assert run.model.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "kept"), [("bf16", "0"), ("bdr-32", ""), ("bdr-32", "3"), ("bdr-32", "x")])
def test_layers_that_cannot_stay_are_refused(name, kept):
    with pytest.raises(ValueError, match="layers in BF16|not in this model|no layer"):
        keeping(methods(32)[name], kept, 3)


def test_a_model_that_copies_finds_the_needle(settings, tmp_path, monkeypatch):
    """The logits of a perfect reader: after the question, what followed its last words in the haystack."""
    run = ladder.Ladder(settings, tmp_path)

    def perfect(model, ids, quantizer):
        ids = ids.tolist()
        out = torch.zeros(len(ids), run.model.config.vocab_size)
        for end in range(12, len(ids)):
            earlier = [i for i in range(12, end - 1) if ids[i - 12 : i] == ids[end - 11 : end + 1]]
            if earlier:
                out[end, ids[earlier[0]]] = 50.0
        return out

    haystack = run.tokens(text.topics())[:64]
    monkeypatch.setattr(measure, "logits", perfect)
    found = [measure.needle(run.model, run.tokenizer, haystack, depth, 3, None) for depth in (0.1, 0.9)]
    assert all(x["exact"] and x["logprob"] > -0.01 for x in found)
    monkeypatch.setattr(measure, "logits", lambda *args: torch.roll(perfect(*args), 1, 1))
    assert not measure.needle(run.model, run.tokenizer, haystack, 0.5, 3, None)["exact"]


def test_variant_keeps_the_function_and_bites(settings, tmp_path):
    split = ladder.Ladder(ladder.Settings(settings.model, "rope-pair", context=192, windows=1), tmp_path)
    plain = ladder.Ladder(ladder.Settings(settings.model, None, context=192, windows=1), tmp_path)
    ids = plain.tokens(text.topics())[:192]
    a, b = (measure.logits(x.model, ids, None).float() for x in (plain, split))
    assert (a - b).abs().max() < 0.1 * a.std()
    k = split.model.model.layers[0].self_attn.k_proj.weight.float().view(2, 32, -1).norm(dim=-1)
    assert (k[:, [5, 21]] > 5 * k.median()).all()


@pytest.mark.parametrize(("names", "kv_heads", "same"), [("rope-pair+multi-head", 4, True), ("key-bias", 2, False)])
def test_a_changed_model_is_a_checkpoint(settings, tmp_path, names, kv_heads, same):
    model, tokenizer = load_model(settings.model)
    ids = tokenizer(text.topics(), return_tensors="pt").input_ids[0][:192]
    before = measure.logits(model, ids, None).float()
    changed = measure.logits(variants.changed(model, names), ids, None).float()
    assert ((changed - before).abs().max() < 0.1 * before.std()) == same
    variants.save(model, tokenizer, tmp_path)
    saved, _ = load_model(str(tmp_path))
    assert saved.config.num_key_value_heads == kv_heads
    assert torch.equal(measure.logits(saved, ids, None).float(), changed)


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="variant 'rope' is unknown"):
        variants.changed(None, "rope")


def test_generation_reads_the_cache_through_the_quantizer(settings, tmp_path):
    """Token by token with a cache, greedy decoding equals recomputing everything."""
    run = ladder.Ladder(settings, tmp_path)
    quantizer = quantizers.int4_rows(32, True)
    prompt = run.tokens(text.topics())[:48]
    tokens = measure.generate(run.model, prompt, 6, quantizer)
    whole = measure.logits(run.model, torch.cat([prompt, torch.tensor(tokens[:-1])]), quantizer)
    margin = whole[47:].float().topk(2, -1).values
    agree = whole[47:].argmax(-1).tolist()
    for got, want, (best, second) in zip(tokens, agree, margin.tolist()):
        assert got == want or best - second < 0.05  # bfloat16 products of other shapes may break a tie


def test_unknown_method_is_named(settings, tmp_path):
    with pytest.raises(ValueError, match="method 'bdr-7' is unknown for head_dim 32"):
        ladder.Ladder(settings, tmp_path).run(["bdr-7"])
