"""``--saw-calibration auto``: a model is calibrated once, when it is first served, and its artifact is kept."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from saw_int4.calibration import artifact
from saw_int4.calibration.calibrate import describe, path_of
from saw_int4.calibration.fingerprint import checkpoint_folder, model_fingerprint

logger = logging.getLogger(__name__)


def artifact_for(model: str, rotation_order: int, groups: int, device: str) -> Path:
    """The kept artifact of a checkpoint; made first where there is none.

    In a process of its own: what it takes of memory is free again before the server sizes its cache.

    Args:
        model: folder of a checkpoint, or its name on the Hugging Face hub.
        device: where the model runs meanwhile, as torch names it.

    Raises:
        ValueError: the checkpoint cannot be calibrated.
    """
    model = checkpoint_folder(model)
    path = path_of(model_fingerprint(model), rotation_order, groups)
    if not path.exists():
        logger.info("saw_int4: calibrating %s, once; kept in %s", model, path)
        command = [sys.executable, "-m", "saw_int4.cli", "calibrate", "--model", model, "--out", str(path)]
        command += ["--rotation-order", str(rotation_order), "--groups", str(groups), "--device", device]
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if run.returncode:
            raise ValueError(
                f"{model} could not be calibrated: {last_error(run.stderr) or f'exit code {run.returncode}'}"
            )
    for line in describe(artifact.load(path)).splitlines():
        logger.info("saw_int4: %s", line)
    return path


def last_error(stderr: str) -> str:
    """The line that says why a process ended: its last traceback's exception, behind which CUDA errors have advice,
    or the last line.
    """
    lines = stderr.strip().splitlines() or [""]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback ")]
    trace = lines[starts[-1] + 1 :] if starts else []
    return next((line for line in trace if not line.startswith(" ")), lines[-1])
