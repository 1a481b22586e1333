"""What the ladder's methods learn from: one pass of the model over a calibration text."""

from __future__ import annotations

from torch import Tensor

from saw_int4.calibration import collect
from saw_int4.calibration.attention_hook import AttentionCall
from saw_int4.calibration.statistics import LayerStatistics
from saw_int4.evaluation.quantizers import LayerSample

THINNED = 1024  # tokens kept per layer


def collect_samples(model, tokenizer, ids: Tensor) -> dict[int, LayerSample]:
    """Layer -> sample, from the text ``ids`` int64 ``[T]``. ValueError as ``calibration.collect``."""
    samples: dict[int, LayerSample] = {}

    def consume(call: AttentionCall, statistics: LayerStatistics) -> None:
        step = max(1, call.k.shape[0] // THINNED)
        thin = (x[1::step].float().contiguous() for x in (call.k, call.v))
        samples[call.layer] = LayerSample(statistics, *thin)

    collect.collect(model, ids, collect.first_tokens(tokenizer, ids), consume)
    return samples
