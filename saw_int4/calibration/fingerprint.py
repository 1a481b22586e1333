"""What a checkpoint is known by: its shape from config.json and a sample of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

SAMPLES, SAMPLE_BYTES = 64, 4096
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a hub repository: what serving takes too
# Fields that change neither the keys nor the queries of a checkpoint.
_COSMETIC = {"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"}


def checkpoint_folder(model: str) -> str:
    """The folder itself, or where the Hugging Face hub's client keeps a model of this name (fetched when missing).

    Raises:
        ValueError: neither a folder nor a model that can be fetched.
    """
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(model, allow_patterns=FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"model {model}: neither a folder nor to be had from the hub ({error}).") from error


def model_fingerprint(path: str | Path) -> str:
    """16 hex digits; equal for copies of a checkpoint, different once its weights or its shape are.

    Reads config.json and 64 evenly spread samples of each weight file: a fine-tune changes nearly all of them.

    Raises:
        ValueError: the folder has no config.json or no weights.
    """
    folder = Path(path)
    config = folder / "config.json"
    weights = sorted(p for pattern in ("*.safetensors", "*.bin") for p in folder.glob(pattern))
    if not config.is_file() or not weights:
        raise ValueError(f"model {folder}: expected a folder with config.json and *.safetensors or *.bin weights.")
    fields = {key: value for key, value in json.loads(config.read_text()).items() if key not in _COSMETIC}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as data:
            for i in range(SAMPLES):
                data.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(data.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
