"""Calibration: exact in real arithmetic, never worse than the rotation alone, never used where it does not belong."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_checkpoint
import torch
from safetensors.torch import load_file, save_file

from saw_int4 import cli, reference
from saw_int4.calibration import artifact, attention_hook, automatic, fit
from saw_int4.calibration.attention_hook import AttentionCall
from saw_int4.calibration.calibrate import calibrate
from saw_int4.calibration.fingerprint import model_fingerprint
from saw_int4.calibration.statistics import HeldOut, LayerStatistics

MODEL = os.environ.get("SAW_INT4_TEST_MODEL")
HEADS, GROUP, D = 2, 3, 64


def attention_call(seed=0, tokens=512, bias=0.0, head_dim=D):
    """Random attention with channels of very different spread and keys that attract the queries."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(1, HEADS, head_dim, generator=g))
    k = torch.randn(tokens, HEADS, head_dim, generator=g) * spread + bias * torch.randn(1, HEADS, head_dim, generator=g)
    q = torch.randn(tokens, HEADS * GROUP, head_dim, generator=g) + torch.randn(1, 1, head_dim, generator=g)
    v = torch.randn(tokens, HEADS, head_dim, generator=g)
    return AttentionCall(0, q, k, v, head_dim**-0.5 * 0.5, None)


def statistics_of(call):
    return LayerStatistics.of(call, call.k[0] + 0.1)


def random_transform(seed, head_dim=D):
    g = torch.Generator().manual_seed(seed)
    shape = (HEADS, head_dim)
    sign = torch.where(torch.rand(shape, generator=g) < 0.5, -1.0, 1.0)
    return fit.KeyTransform(3 * torch.randn(shape, generator=g), torch.exp(torch.randn(shape, generator=g)), sign)


# ---- exactness, in float64 ----


def in_transformed_space(q, k, transform, order):
    """Queries and keys as a backend holds them, and the shift of every logit of a query row, all float64."""
    mean, scale, sign = (x.double() for x in transform)
    keys = reference.hadamard((k - mean) / scale, order) * sign
    queries = reference.hadamard(q * scale.repeat_interleave(GROUP, 0), order) * sign.repeat_interleave(GROUP, 0)
    shift = torch.einsum("nhd,hd->nh", q, mean.repeat_interleave(GROUP, 0))
    return queries, keys, shift


def merge(pieces):
    """Attention over disjoint sets of keys from (out, lse) of each."""
    lse = torch.stack([piece[1] for piece in pieces])
    weight = (lse - torch.logsumexp(lse, 0)).exp()
    return (weight[..., None] * torch.stack([piece[0] for piece in pieces])).sum(0), torch.logsumexp(lse, 0)


@pytest.mark.parametrize("order", [1, 16, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_transform_changes_no_attention_output(order, seed):
    call = attention_call(seed, tokens=24, bias=5.0)
    q, k, v = (x.double() for x in (call.q[-5:], call.k, call.v))
    queries, keys, shift = in_transformed_space(q, k, random_transform(seed), order)
    seen = reference.visible_tokens(24, 5)
    want, want_lse = reference.attention(q, k, v, seen, call.sm_scale)
    got, lse = reference.attention(queries, keys, v, seen, call.sm_scale)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse + shift * call.sm_scale, want_lse, rtol=0, atol=1e-11)


@pytest.mark.parametrize("cached", [0, 1, 13, 19])
def test_cached_and_fresh_keys_merge_by_lse(cached):
    """A prefix from the cache and a fresh chunk, both transformed, merged in pieces: chunked prefill's arithmetic."""
    call = attention_call(2, tokens=24, bias=5.0)
    q, k, v = (x.double() for x in (call.q[-5:], call.k, call.v))
    queries, keys, _ = in_transformed_space(q, k, random_transform(3), D)
    seen = reference.visible_tokens(24, 5)
    want, _ = reference.attention(q, k, v, seen, call.sm_scale)
    pieces = [(0, cached), (cached, 19), (19, 24)]
    found = [reference.attention(queries, keys[a:b], v[a:b], seen[:, a:b], call.sm_scale) for a, b in pieces if b > a]
    torch.testing.assert_close(merge(found)[0], want, rtol=0, atol=1e-12)


def test_keys_of_one_row_must_share_one_mean():
    """The test above is sharp: fresh keys left uncentred give another result."""
    call = attention_call(2, tokens=24, bias=5.0)
    q, k, v = (x.double() for x in (call.q[-5:], call.k, call.v))
    transform = random_transform(3)
    queries, keys, _ = in_transformed_space(q, k, transform, D)
    _, uncentred, _ = in_transformed_space(q, k, transform._replace(mean=torch.zeros(HEADS, D)), D)
    keys[19:] = uncentred[19:]
    seen = reference.visible_tokens(24, 5)
    want, _ = reference.attention(q, k, v, seen, call.sm_scale)
    assert (reference.attention(queries, keys, v, seen, call.sm_scale)[0] - want).abs().max() > 1e-2


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("rows", [20, 3])
def test_the_hook_is_attention_with_sinks(window, rows):
    """What calibration runs a model with, against the formula in float64."""
    call = attention_call(9, tokens=20)._replace(window=window)
    call = call._replace(q=call.q[-rows:])
    sinks = torch.randn(HEADS * GROUP)
    q, k, v = (x.transpose(0, 1)[None] for x in (call.q, call.k, call.v))
    module = SimpleNamespace(layer_idx=0)
    for s_aux in (None, sinks):
        got, _ = attention_hook._attention(module, q, k, v, None, call.sm_scale, sliding_window=window, s_aux=s_aux)
        want, lse = reference.attention(*(x.double() for x in (call.q, call.k, call.v)), call.visible(), call.sm_scale)
        if s_aux is not None:
            want = want * (lse - sinks.double()).sigmoid()[..., None]
        torch.testing.assert_close(got[0].double(), want, rtol=1e-4, atol=1e-4)


def test_forward_and_backward_are_inverse():
    """Up to a rounding of every one of the 2 * 6 butterflies and 4 factors, each at most of the row's norm."""
    transform, k = random_transform(4), attention_call(4).k
    there = transform.forward(k, D)
    norm = torch.linalg.vector_norm(there, dim=-1, keepdim=True)
    limit = torch.finfo(torch.float32).eps * (16 * norm * transform.scale + 2 * transform.mean.abs())
    assert ((transform.backward(there, D) - k).abs() <= limit).all()


# ---- the fit ----


@pytest.mark.parametrize("order", [1, 16, 64])
@pytest.mark.parametrize("bias", [0.0, 300.0])
def test_fit_never_loses_to_the_rotation_alone(order, bias):
    found = fit.fit_layer(statistics_of(attention_call(5, bias=bias)), order)
    assert all(kl <= plain for kl, plain in zip(found.kl, found.kl_plain))
    if bias:
        assert sum(found.kl) < 0.05 * sum(found.kl_plain)


@pytest.mark.parametrize("bias", [0.0, 300.0])
def test_fit_does_not_lose_on_tokens_that_took_no_part(bias):
    call = attention_call(5, tokens=1024, bias=bias)
    statistics = statistics_of(call._replace(q=call.q[:512], k=call.k[:512], v=call.v[:512]))
    others = HeldOut.of(call, 512)
    exact = fit.attention_logits(others)

    def divergence(transform):
        return fit.key_divergence(others, exact, transform, D)

    plain = divergence(fit.plain(statistics))
    assert (divergence(fit.fit_layer(statistics, D).transform) < plain).all()
    assert (divergence(random_transform(0)) > plain).any()  # a transform that does not fit loses


def test_fit_does_not_see_how_a_checkpoint_splits_scale():
    """Keys of a RoPE pair times 16 and queries divided by it: the same K', up to rounding."""
    call = attention_call(6)
    pair = torch.ones(D)
    pair[[5, 5 + D // 2]] = 16.0
    other = call._replace(k=call.k * pair, q=call.q / pair)
    first = statistics_of(call).first_key
    mine = fit.fit_layer(LayerStatistics.of(call, first), D)
    theirs = fit.fit_layer(LayerStatistics.of(other, first * pair), D)
    balanced = [h for h in range(HEADS) if mine.choice[h] == fit.BALANCED]
    assert balanced and mine.choice == theirs.choice
    a, b = mine.transform.forward(call.k, D)[:, balanced], theirs.transform.forward(other.k, D)[:, balanced]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_first_key_falls_on_the_grid(groups):
    statistics = statistics_of(attention_call(7))
    loose = fit.signed(fit.balanced(statistics), statistics, D)
    tight = fit.align(loose, statistics, D, groups)

    def error(transform):
        key = transform.forward(statistics.first_key[None], D)
        return float((fit.round_trip(key, groups) - key).norm())

    assert error(tight) < 1e-2 * error(loose)
    moved = ((tight.mean - loose.mean) / loose.scale).norm() / D**0.5
    step = (
        loose.forward(statistics.first_key[None], D).amax() - loose.forward(statistics.first_key[None], D).amin()
    ) / 15
    assert moved < step


def test_signs_turn_the_constant_vector_to_the_queries():
    statistics = statistics_of(attention_call(8))
    loose = fit.balanced(statistics)

    def share(transform):
        q = transform.queries(attention_call(8).q, D).unflatten(1, (HEADS, GROUP))
        return (q.sum(-1).square() / D).sum() / q.square().sum()

    assert share(fit.signed(loose, statistics, D)) > 3 * share(loose)


@pytest.mark.parametrize("groups", [1, 2])
def test_fitted_together_signs_and_s_leave_less_noise(groups):
    """By the rounding itself: the logits of held-out queries, against s and signs fitted one after the other."""
    call = attention_call(8, tokens=1024)
    g = torch.Generator().manual_seed(1)
    directions = torch.randn(2, D, generator=g)  # along which keys, and queries too, spread more than along others
    k, q = (x + torch.randn(*x.shape[:2], 2, generator=g) @ directions for x in (call.k, call.q))
    call = call._replace(k=k, q=q)
    statistics = statistics_of(call._replace(q=call.q[:768], k=call.k[:768], v=call.v[:768]))
    others = HeldOut.of(call, 768)
    exact = fit.attention_logits(others)
    apart = fit.signed(fit.balanced(statistics), statistics, D)
    together = fit.quiet(statistics, D, groups)
    loss, less = (fit.key_divergence(others, exact, t, D, groups).sum() for t in (apart, together))
    assert less < 0.8 * loss


@pytest.mark.parametrize("dead", [1, 40, D])
def test_dead_channels_stay_in_range_when_fitted_together(dead):
    call = attention_call(8)
    k, q = call.k.clone(), call.q.clone()
    k[..., :dead] = 1.5
    q[..., -dead:] = 0.0
    scale = fit.quiet(statistics_of(call._replace(k=k, q=q)), D, 1).scale.abs()
    assert scale.isfinite().all() and (scale > 0).all() and (scale.amax() / scale.amin()) < 1e8


@pytest.mark.parametrize("dead", [1, 40, D])
def test_dead_channels_stay_in_range(dead):
    k_std, q_rms = torch.ones(HEADS, D).double(), torch.ones(HEADS, D).double()
    k_std[:, :dead] = 0
    q_rms[:, -dead:] = 0
    s = fit.balance(k_std, q_rms)
    assert s.isfinite().all() and (s > 0).all()
    assert s.float().reciprocal().isfinite().all() and (s.amax() / s.amin()) < 2e6


# ---- the artifact ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def calibration(checkpoint):
    return calibrate(str(checkpoint), tokens=640)


def test_calibrates_a_checkpoint(checkpoint, calibration):
    manifest = calibration.manifest
    assert sorted(calibration.layers) == manifest["layers"] == [0, 1, 2]
    assert (manifest["num_kv_heads"], manifest["head_dim"], manifest["rotation_order"]) == (2, 32, 32)
    assert manifest["model"] == model_fingerprint(checkpoint)
    assert manifest["expected_gain"] >= 1
    assert calibrate(str(checkpoint), tokens=640).fingerprint == calibration.fingerprint


def test_round_trip(calibration, tmp_path):
    artifact.save(calibration, tmp_path / "a.safetensors")
    again = artifact.load(tmp_path / "a.safetensors")
    assert again.manifest == calibration.manifest
    for layer, transform in calibration.layers.items():
        for mine, theirs in zip(transform, again.layers[layer]):
            assert torch.equal(mine, theirs)


def test_damage_is_an_error(calibration, tmp_path):
    path = tmp_path / "a.safetensors"
    artifact.save(calibration, path)
    tensors = load_file(path)
    tensors["layers.1.k_mean"][0, 0] += 1e-3
    save_file(tensors, path, metadata={artifact.MANIFEST: json.dumps(calibration.manifest)})
    with pytest.raises(ValueError, match="hash"):
        artifact.load(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="no manifest"):
        artifact.load(path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        artifact.load(path)


@pytest.mark.parametrize(
    "field", ["model", "format_version", "head_dim", "num_kv_heads", "rotation_order", "groups", "layers"]
)
def test_a_mismatch_names_its_field(calibration, field):
    fields = {name: calibration.manifest[name] for name in ("model", "head_dim", "rotation_order", "layers")}
    calibration.check(**fields)
    with pytest.raises(ValueError, match=f"{field} is .* the server has 'another'"):
        calibration.check(**{**fields, field: "another"})


def test_ranks_take_their_heads(calibration):
    whole = calibration.layers[1]
    assert torch.equal(calibration.rank(1, 0, 1).mean, whole.mean)
    halves = [calibration.rank(1, r, 2) for r in range(2)]
    assert torch.equal(torch.cat([part.scale for part in halves]), whole.scale)
    shared = [calibration.rank(1, r, 4).sign for r in range(4)]
    assert all(torch.equal(shared[r], whole.sign[r // 2 : r // 2 + 1]) for r in range(4))
    with pytest.raises(ValueError, match="3 ranks"):
        calibration.rank(1, 0, 3)
    with pytest.raises(ValueError, match="layer 7"):
        calibration.rank(7, 0, 1)


def test_fingerprint_follows_the_weights(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    assert model_fingerprint(copy) == model_fingerprint(checkpoint)
    other = tiny_checkpoint.write(tmp_path / "other", seed=1)
    assert model_fingerprint(other) != model_fingerprint(checkpoint)
    with pytest.raises(ValueError, match=r"config\.json"):
        model_fingerprint(tmp_path)


def test_command(checkpoint, tmp_path, capsys):
    (tmp_path / "text").write_text("A text of some length, which is repeated. " * 40)
    out = tmp_path / "a.safetensors"
    arguments = ["calibrate", "--model", str(checkpoint), "--text", str(tmp_path / "text"), "--out", str(out)]
    cli.main([*arguments, "--groups", "2"])
    assert artifact.load(out).manifest["text"]["builtin"] is False
    assert artifact.load(out).manifest["groups"] == 2
    said = capsys.readouterr().out
    assert f"--saw-calibration {out} --saw-groups 2" in said and "adds 3.33 bits" in said  # (16 - 6) / 3 layers
    layer, head = re.search(r"worst heads \(layer\.head\): (\d+)\.(\d+)", said).groups()
    divergences = [layer["kl"] for layer in artifact.load(out).manifest["statistics"]]
    assert divergences[int(layer)][int(head)] == max(max(kl) for kl in divergences)
    (tmp_path / "text").write_text("short")
    with pytest.raises(SystemExit):
        cli.main(["calibrate", "--model", str(checkpoint), "--text", str(tmp_path / "text"), "--out", str(out)])
    assert "5 tokens, expected at least 512" in capsys.readouterr().err


@pytest.mark.skipif(MODEL is None, reason="needs SAW_INT4_TEST_MODEL, a real checkpoint (scripts/test.sh sets it)")
def test_perplexity_does_not_see_how_a_checkpoint_splits_scale(tmp_path):
    """On a real model: keys of a RoPE pair times 16, queries divided: the same quantized perplexity."""
    from saw_int4.evaluation.ladder import Ladder, Settings

    def perplexity(variant):
        settings = Settings(MODEL, variant, calibration_tokens=1024, context=512, windows=2)
        ladder = Ladder(settings, tmp_path)
        ladder.run(["bf16", "bdr-64", "aligned-kv"])
        return {row["method"]: row["perplexity"] for row in ladder.results()}

    plain, split = perplexity(None), perplexity("rope-pair")
    assert split["bf16"] == pytest.approx(plain["bf16"], rel=0.002)
    assert split["aligned-kv"] == pytest.approx(plain["aligned-kv"], rel=0.002)
    assert split["bdr-64"] > 1.05 * plain["bdr-64"]  # so the change does bite


def test_automatic_calibration_runs_once(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    path = automatic.artifact_for(str(checkpoint), 32, 1, "cpu")
    assert path.is_relative_to(tmp_path)
    artifact.load(path).check(model=model_fingerprint(checkpoint), rotation_order=32)
    made = path.stat().st_mtime_ns
    assert automatic.artifact_for(str(checkpoint), 32, 1, "cpu") == path
    assert path.stat().st_mtime_ns == made
    with pytest.raises(ValueError, match="could not be calibrated: .*order is 48"):
        automatic.artifact_for(str(checkpoint), 48, 1, "cpu")


def test_why_it_could_not_be_calibrated():
    """An exception's first line, not the advice that follows a CUDA error; without one the last line."""
    error = "torch.AcceleratorError: CUDA error: device-side assert triggered"
    trace = f'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n{error}\n'
    assert automatic.last_error(f"warning\n{trace}Search for it.\nCompile with `TORCH_USE_CUDA_DSA`.\n") == error
    assert automatic.last_error("usage: saw-int4\nsaw-int4: error: no weights\n") == "saw-int4: error: no weights"
    assert automatic.last_error("") == ""
