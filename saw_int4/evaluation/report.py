"""The ladder's results for people: a text table, and plots where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from saw_int4.calibration import fit
from saw_int4.evaluation.quantizers import LayerSample


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

    figure, axes = plt.subplots(figsize=(8, 5))
    for row in rows:
        if row["method"] != "bf16":
            axes.errorbar(row["bits"], row["kl"], row["kl_margin"], fmt="o" if row["ours"] else "s", capsize=2)
            axes.annotate(
                row["method"], (row["bits"], row["kl"]), fontsize=7, xytext=(4, 2), textcoords="offset points"
            )
    axes.set(xlabel="bits per element", ylabel="KL to BF16 (nats)", yscale="log", title=name)
    save(figure, "error-against-bits")

    if layers:
        figure, axes = plt.subplots(figsize=(8, 3))
        axes.bar([row["layer"] for row in layers], [row["kl"] for row in layers])
        axes.set(xlabel="the one quantized layer", ylabel="KL to BF16 (nats)", title=name)
        save(figure, "layers")

    sample = samples[max(samples, key=lambda layer: float(samples[layer].k.abs().max()))]
    mean, scale, _ = fit.balanced(sample.statistics)
    figure, axes = plt.subplots(figsize=(8, 3))
    axes.plot(sample.k.abs().mean(0).flatten(), label="keys")
    axes.plot(((sample.k - mean) / scale).abs().mean(0).flatten(), label="centred and balanced")
    axes.set(xlabel="channel, heads side by side", ylabel="mean magnitude", yscale="log", title=name)
    axes.legend()
    save(figure, "key-channels")
    return written
