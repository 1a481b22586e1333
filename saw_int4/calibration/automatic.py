"""``--saw-calibration auto``: a model is calibrated once, when it is first served, and its artifact is kept."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from saw_int4.calibration import artifact
from saw_int4.calibration.calibrate import describe, path_of
from saw_int4.calibration.fingerprint import model_fingerprint

logger = logging.getLogger(__name__)


def artifact_for(model: str, rotation_order: int, device: str) -> Path:
    """The kept artifact of a checkpoint; made first where there is none.

    In a process of its own: what it takes of memory is free again before the server sizes its cache.

    Args:
        model: folder of a checkpoint.
        device: where the model runs for the few seconds: "cpu" or "cuda".

    Raises:
        ValueError: the checkpoint cannot be calibrated.
    """
    path = path_of(model_fingerprint(model), rotation_order)
    if not path.exists():
        logger.info("saw_int4: calibrating %s, once; kept in %s", model, path)
        command = [sys.executable, "-m", "saw_int4.cli", "calibrate", "--model", model, "--out", str(path)]
        command += ["--rotation-order", str(rotation_order), "--device", device]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise ValueError(
                f"--saw-calibration auto: {model} could not be calibrated: {run.stderr.strip()[-2000:]} "
                "Way out: calibrate it elsewhere and give --saw-calibration PATH, or serve with --saw-calibration none."
            )
    for line in describe(artifact.load(path)).splitlines():
        logger.info("saw_int4: %s", line)
    return path
