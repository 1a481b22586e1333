"""Runs methods over windows of a text, one cell (method, window) at a time; finished cells are never run again."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from saw_int4.calibration.attention_hook import load_model
from saw_int4.calibration.fingerprint import model_fingerprint
from saw_int4.calibration.text import BUILTIN
from saw_int4.evaluation import measure, text
from saw_int4.evaluation.methods import Method, keeping, methods
from saw_int4.evaluation.quantizers import LayerSample, Quantizer, only_layer
from saw_int4.evaluation.samples import collect_samples
from saw_int4.evaluation.variants import changed

CALIBRATION_TEXTS = ("builtin", "docs", "code", "random")
NEEDLE_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Settings:
    """What a cell's numbers depend on beside its method and window.

    Attributes:
        model: folder of a checkpoint; variant: see variants.changed, or None.
        text: path of the evaluation text, or None for the language reference.
        calibration: one of CALIBRATION_TEXTS, or the path of a text; calibration_tokens of it.
        context, windows: tokens per window, and how many.
        generate: greedy tokens per window (0: none); needle: tokens of a haystack, one per window (0: none).
    """

    model: str
    variant: str | None = None
    text: str | None = None
    calibration: str = "builtin"
    calibration_tokens: int = 4096
    context: int = 2048
    windows: int = 4
    generate: int = 0
    needle: int = 0


class Ladder:
    """One model under evaluation.

    Args:
        settings: see Settings.
        folder: where cells are kept; one file per settings and model.
    """

    def __init__(self, settings: Settings, folder: Path, device: str = "cpu") -> None:
        self.settings = settings
        self.model, self.tokenizer = load_model(settings.model, device)
        if settings.variant is not None:
            changed(self.model, settings.variant)
        config = self.model.config
        self.layers = config.num_hidden_layers
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.methods = methods(self.head_dim)
        key = json.dumps({**asdict(settings), "model": model_fingerprint(settings.model)}, sort_keys=True)
        name = "-".join(filter(None, (Path(settings.model).name, settings.variant)))
        self.store = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"
        self.cells: dict[str, dict] = json.loads(self.store.read_text()) if self.store.exists() else {}
        self._samples: dict[int, LayerSample] | None = None
        self._quantizers: dict[str, Quantizer | None] = {}

    def run(self, names: list[str]) -> None:
        """Fill in the cells of these methods. ValueError for a name that is not a method of this model."""
        for name in names:
            self.method(name)
        content = text.topics() if self.settings.text is None else Path(self.settings.text).read_text()
        windows = self.windows(content, self.settings.context, self.settings.windows)
        jobs = [(i, name) for i in range(len(windows)) for name in names if f"{name}/{i}" not in self.cells]
        reference, of = None, None
        for i, name in tqdm(jobs, desc=self.store.stem, unit="cell"):
            if of != i:  # one window's logits at a time
                reference, of = measure.logits(self.model, windows[i], None), i
            found = reference if name == "bf16" else measure.logits(self.model, windows[i], self.quantizer(name))
            self.keep(f"{name}/{i}", measure.compare(reference, found, windows[i]).to_json())
        del reference
        if self.settings.generate:
            self._generate(names, windows)
        if self.settings.needle:
            self._needle(names, self.windows(content, self.settings.needle, self.settings.windows))

    def method(self, name: str) -> Method:
        """A rung of the ladder, or ``RUNG@LAYERS``: the same with these layers in BF16. ValueError for another name."""
        base, at, kept = name.partition("@")
        if base not in self.methods:
            raise ValueError(
                f"method {name!r} is unknown for head_dim {self.head_dim}; known: {list(self.methods)}, and any of "
                "them with layers that stay in BF16: NAME@0+3-5+last:1."
            )
        return keeping(self.methods[base], kept, self.layers) if at else self.methods[base]

    def _generate(self, names: list[str], windows: list[Tensor]) -> None:
        for i, window in enumerate(windows):
            prompt = window[: self.settings.context // 4]
            for name in tqdm(["bf16", *names], desc="greedy", unit="method"):
                if f"{name}/greedy/{i}" not in self.cells:
                    tokens = measure.generate(self.model, prompt, self.settings.generate, self.quantizer(name))
                    self.keep(f"{name}/greedy/{i}", tokens)

    def _needle(self, names: list[str], haystacks: list[Tensor]) -> None:
        jobs = [(i, d, name) for i in range(len(haystacks)) for d in NEEDLE_DEPTHS for name in names]
        for i, depth, name in tqdm(jobs, desc="needle", unit="cell"):
            if (key := f"{name}/needle/{depth}/{i}") not in self.cells:
                found = measure.needle(self.model, self.tokenizer, haystacks[i], depth, i, self.quantizer(name))
                self.keep(key, found)

    def sensitivity(self, name: str) -> list[dict]:
        """What each layer costs, worst first: KL when it alone is quantized, beside the KL of all.

        On one window of a text that is neither calibrated nor evaluated on, and in float32, where a change of rounding
        moves nothing: in bfloat16 it moves a model by as much as most layers do.
        """
        method, quantizer = self.method(name), self.quantizer(name)
        held_out = text.code() if self.settings.calibration == "docs" else text.docstrings()
        window = self.windows(held_out, self.settings.context, 1)[0]
        jobs = {f"{name}/layers/all": quantizer}
        for layer in range(self.layers):
            jobs[f"{name}/layers/{layer}"] = only_layer(quantizer, layer)
        missing = [key for key in jobs if key not in self.cells]
        if missing:
            model = deepcopy(self.model).float()
            reference = measure.logits(model, window, None)
            for key in tqdm(missing, desc=f"sensitivity of {name}", unit="run"):
                self.keep(key, measure.compare(reference, measure.logits(model, window, jobs[key]), window).to_json())

        def kl(what: object) -> float:
            return measure.summarize([self.window(f"{name}/layers/{what}")])["kl"]

        extra = (16 - method.bits(self.head_dim, self.layers)) / self.layers
        rows = [
            {"layer": i, "kl": kl(i), "kl_of_all": kl("all"), "extra_bits_in_bf16": extra} for i in range(self.layers)
        ]
        return sorted(rows, key=lambda row: -row["kl"])

    def tokens(self, content: str) -> Tensor:
        return self.tokenizer(content, return_tensors="pt").input_ids[0]

    def windows(self, content: str, length: int, count: int) -> list[Tensor]:
        return text.windows(self.tokens(content), length, count, self.tokenizer.bos_token_id)

    def keep(self, key: str, value) -> None:
        """Record a finished cell on disk, whole or not at all."""
        self.cells[key] = value
        self.store.parent.mkdir(parents=True, exist_ok=True)
        partial = self.store.with_suffix(".partial")
        partial.write_text(json.dumps(self.cells))
        partial.replace(self.store)

    def window(self, key: str) -> measure.Window:
        return measure.Window(**self.cells[key])

    def quantizer(self, name: str) -> Quantizer | None:
        method = self.method(name)
        if method.build is None:
            return None
        if name not in self._quantizers:
            self._quantizers[name] = method.build(self.samples())
        return self._quantizers[name]

    def samples(self) -> dict[int, LayerSample]:
        """Calibration samples of every layer, collected once."""
        if self._samples is None:
            self._samples = collect_samples(self.model, self.tokenizer, self.calibration_ids())
        return self._samples

    def calibration_ids(self) -> Tensor:
        source, count = self.settings.calibration, self.settings.calibration_tokens
        if source == "random":
            return text.random_tokens(self.model.config.vocab_size, count)
        built_in = {"builtin": lambda: BUILTIN, "docs": text.docstrings, "code": text.code}
        return self.tokens(built_in[source]() if source in built_in else Path(source).read_text())[:count]

    def results(self) -> list[dict]:
        """One row for each method with all of its windows, in the ladder's order."""
        rows = []
        changed = sorted({key.split("/")[0] for key in self.cells} - set(self.methods))
        for name in [*self.methods, *changed]:
            keys = [f"{name}/{i}" for i in range(self.settings.windows)]
            if all(key in self.cells for key in keys):
                row = self._describe(self.method(name)) | measure.summarize([self.window(key) for key in keys])
                rows.append(row | self._greedy(name) | self._found(name))
        return rows

    def _describe(self, method: Method) -> dict:
        return {
            "method": method.name,
            "title": method.title,
            "bits": method.bits(self.head_dim, self.layers),
            "decode_cost": method.cost,
            "ours": method.ours,
        }

    def _greedy(self, name: str) -> dict:
        pairs = [
            (self.cells[f"bf16/greedy/{i}"], self.cells[f"{name}/greedy/{i}"])
            for i in range(self.settings.windows)
            if f"{name}/greedy/{i}" in self.cells
        ]
        if not pairs:
            return {}
        length, margin = measure.interval([measure.common_prefix(*pair) for pair in pairs])
        return {
            "greedy_tokens": self.settings.generate,
            "greedy_until_parting": length,
            "greedy_margin": margin,
        }

    def _found(self, name: str) -> dict:
        found = {
            depth: [
                self.cells[key]
                for i in range(self.settings.windows)
                if (key := f"{name}/needle/{depth}/{i}") in self.cells
            ]
            for depth in NEEDLE_DEPTHS
        }
        every = [x for at_depth in found.values() for x in at_depth]
        if not every:
            return {}
        return {
            "needle_exact": sum(x["exact"] for x in every) / len(every),
            "needle_exact_by_depth": {d: sum(x["exact"] for x in f) / len(f) for d, f in found.items() if f},
            "needle_logprob": sum(x["logprob"] for x in every) / len(every),
            "needles": len(every),
        }


def environment(settings: Settings) -> dict:
    """Where the numbers come from."""
    import transformers

    return {**asdict(settings), "torch": torch.__version__, "transformers": transformers.__version__}
