"""The ladder's results for people: a text table, and plots where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from saw_int4.calibration import fit
from saw_int4.evaluation.quantizers import LayerSample
from saw_int4.format import default_rotation_order


def table(rows: list[dict]) -> str:
    """Fixed-width table of ``Ladder.results``."""
    head = f"{'method':<22}{'bits':>6}  {'ppl':>9}  {'ratio to BF16 (95 %)':<24}{'KL (nats)':<20}{'top-1':>7}"
    greedy, needle = (any(key in row for row in rows) for key in ("greedy_tokens", "needle_exact"))
    head += f"{'greedy':>16}" * greedy + f"{'needle':>16}" * needle + "  decode cost"
    lines = [head]
    for row in rows:
        ratio = f"{row['ratio']:.4f} ({row['ratio_low']:.4f}-{row['ratio_high']:.4f})"
        line = f"{row['method']:<22}{row['bits']:>6.3f}  {row['perplexity']:>9.4f}  {ratio:<24}"
        kl = f"{row['kl']:.5f} +- {row['kl_margin']:.5f}"
        line += f"{kl:<20}{row['top1_agreement']:>7.4f}"
        if greedy:
            length, margin = (row.get(key, float("nan")) for key in ("greedy_until_parting", "greedy_margin"))
            line += f"{f'{length:.1f} +- {margin:.1f}':>16}"
        if needle:
            found = f"{row.get('needle_exact', float('nan')):.2f} ({row.get('needle_logprob', float('nan')):.2f})"
            line += f"{found:>16}"
        lines.append(f"{line}  {row['decode_cost']}")
    return "\n".join(lines)


def sensitivity_table(rows: list[dict]) -> str:
    """Layers by what they cost, worst first."""
    lines = [f"{'layer':>5}  {'KL (nats)':>10}  {'of all':>7}  {'bits that BF16 adds':>20}"]
    for row in rows:
        share = row["kl"] / row["kl_of_all"]
        lines.append(f"{row['layer']:>5}  {row['kl']:>10.5f}  {share:>7.1%}  {row['extra_bits_in_bf16']:>20.3f}")
    return "\n".join([*lines, f"{'all':>5}  {rows[0]['kl_of_all']:>10.5f}"])


def plots(rows: list[dict], layers: list[dict], samples: dict[int, LayerSample], folder: Path, name: str) -> list[Path]:
    """SVG files: error against bits, error per layer, and key channel magnitudes before and after the transform.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install matplotlib, or leave --plots out.") from error
    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def save(figure, what: str) -> None:
        path = folder / f"{name}-{what}.svg"
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
        written.append(path)

    shown = sorted((row for row in rows if row["kl"] > 0), key=lambda row: (row["bits"], row["kl"]))
    figure, axes = plt.subplots(figsize=(8, 7))
    least, most = (f((row["kl"] for row in shown), default=1.0) for f in (min, max))
    apart, below = (most / least) ** (1 / 40), {}  # labels of methods of equal bits stand above each other
    for row in shown:
        bits, kl = row["bits"], row["kl"]
        shape = dict(fmt="o", color="tab:blue") if row["ours"] else dict(fmt="s", color="tab:gray")
        axes.errorbar(bits, kl, row["kl_margin"], capsize=2, **shape)
        below[bits] = max(kl, below.get(bits, 0.0) * apart)
        line = dict(arrowstyle="-", linewidth=0.4)
        axes.annotate(row["method"], (bits, kl), (bits + 0.12, below[bits]), fontsize=7, va="center", arrowprops=line)
    axes.margins(x=0.15)  # for the last label
    axes.set(xlabel="bits per element", ylabel="KL to BF16 (nats)", yscale="log")
    axes.set_title(f"{name}: in this package's format (circles), and others")
    save(figure, "error-against-bits")

    if layers:
        figure, axes = plt.subplots(figsize=(8, 3))
        axes.bar([row["layer"] for row in layers], [row["kl"] for row in layers])
        axes.set(xlabel="the one quantized layer", ylabel="KL to BF16 (nats)", title=name)
        save(figure, "layers")

    layer = max(samples, key=lambda layer: float(samples[layer].k.abs().max()))
    sample, head_dim = samples[layer], samples[layer].k.shape[-1]
    mean, scale, _ = fit.balanced(sample.statistics)
    stored = fit.fit_layer(sample.statistics, default_rotation_order(head_dim)).transform
    figure, axes = plt.subplots(figsize=(8, 4))
    for label, keys in (
        ("keys", sample.k),
        ("centred and balanced", (sample.k - mean) / scale),
        ("as stored: rotated too", stored.forward(sample.k, default_rotation_order(head_dim))),
    ):
        axes.plot(keys.abs().mean(0).flatten().cpu(), label=label, linewidth=1)
    for head in range(1, sample.k.shape[1]):
        axes.axvline(head * head_dim, color="black", linewidth=0.5)
    axes.set(xlabel="channel, heads side by side", ylabel="mean magnitude", yscale="log")
    axes.set_title(f"{name}: layer {layer}, which has the largest keys")
    axes.legend(fontsize=7)
    save(figure, "key-channels")
    return written
