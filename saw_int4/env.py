"""Options of the INT4 KV cache: the one owner of their names, defaults, parsing and aliases.

They are read once, in the process that starts a server, and travel to every other process as one JSON string in
``SAW_INT4_RESOLVED``; nobody else reads an option from the environment.

    SAW_INT4_ROTATION                auto | none | k | kv      what is rotated (default auto)
    SAW_INT4_ROTATION_ORDER          power of two | head_dim   block of the Hadamard rotation (default head_dim)
    SAW_INT4_CALIBRATION             auto | none | PATH        artifact of saw-int4 calibrate (default auto)
    SAW_INT4_GROUPS                  1 | 2                     scales per row: 2 cost 4 bytes (default 1)
    SAW_INT4_BF16_LAYERS             0,3-5,first:2,last:1      layers that stay in BF16 (default none of them)
    SAW_INT4_BATCH_INVARIANT         1                         on a GPU, decode's bits do not depend on the batch
    SAW_INT4_CPU_PLATFORM            1                         run SGLang on plain CPU (no GPU needed)
    SAW_INT4_ALLOW_UNTESTED_SGLANG   1                         accept an SGLang version that was not tested

The published fork's HADAMARD, HADAMARD_ORDER, ROTATE_V and SGLANG_FUSE_HADAMARD_INT4_KV are accepted as aliases.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from saw_int4 import layers
from saw_int4.format import MAX_GROUPS, KVFormat, default_rotation_order

ROTATION = "SAW_INT4_ROTATION"
ROTATION_ORDER = "SAW_INT4_ROTATION_ORDER"
RESOLVED = "SAW_INT4_RESOLVED"
CALIBRATION = "SAW_INT4_CALIBRATION"
GROUPS = "SAW_INT4_GROUPS"
BF16_LAYERS = "SAW_INT4_BF16_LAYERS"
BATCH_INVARIANT = "SAW_INT4_BATCH_INVARIANT"
CPU_PLATFORM = "SAW_INT4_CPU_PLATFORM"
ALLOW_UNTESTED_SGLANG = "SAW_INT4_ALLOW_UNTESTED_SGLANG"
ROTATIONS = ("auto", "none", "k", "kv")

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


@dataclass(frozen=True)
class Options:
    """What the user asked of the INT4 cache, before the model is known.

    Attributes:
        rotation: "none", "k", "kv", or "auto": keys, and values where the model's calibration found that it pays.
        order: block of the rotation, or None for the largest that the model's head_dim allows.
        calibration: path of a calibration artifact, "none", or "auto" until the model is known: the process that
            starts a server puts the model's own artifact in its place, or "none" where it has none.
        groups: see ``saw_int4.format.KVFormat``.
        bf16_layers: layers that stay in BF16, as ``saw_int4.layers`` reads them; numbers once the model is known.
        batch_invariant: see ``saw_int4.ops.decode_attention``.
    """

    rotation: str = "auto"
    order: int | None = None
    calibration: str = "auto"
    groups: int = 1
    bf16_layers: str = ""
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.rotation not in ROTATIONS:
            raise ValueError(
                f"{ROTATION} (--saw-rotation) is {self.rotation!r}, expected one of {', '.join(ROTATIONS)}."
            )
        if self.order is not None and (self.order < 2 or self.order & (self.order - 1)):
            raise ValueError(
                f"{ROTATION_ORDER} (--saw-rotation-order) is {self.order}, expected a power of two from 2, or "
                f"head_dim. For no rotation set {ROTATION}=none."
            )
        if self.rotation == "none" and self.order is not None:
            raise ValueError(
                f"{ROTATION} is none, but {ROTATION_ORDER} asks for rotation order {self.order}. Leave one of them out."
            )
        if self.groups not in range(1, MAX_GROUPS + 1):
            raise ValueError(f"{GROUPS} (--saw-groups) is {self.groups}, expected 1 or {MAX_GROUPS}.")
        self._about_layers(layers.parse, self.bf16_layers)

    def _about_layers(self, function, *args):
        try:
            return function(*args)
        except ValueError as error:
            raise ValueError(f"{BF16_LAYERS} (--saw-bf16-layers) is {self.bf16_layers!r}: {error}") from error

    def for_model(self, num_layers: int) -> Options:
        """These options with the layers' numbers in place of what names them. ValueError where there are none such."""
        numbers = self._about_layers(layers.chosen, self.bf16_layers, num_layers)
        return replace(self, bf16_layers=",".join(map(str, numbers)))

    @property
    def bf16_layer_ids(self) -> frozenset[int]:
        """Layers of the model that stay in BF16. Only after ``for_model``."""
        return frozenset(int(number) for number in self.bf16_layers.split(",") if number)

    def kv_format(self, head_dim: int) -> KVFormat:
        """The row format that these options give a model of this head_dim. ValueError where they cannot."""
        if head_dim % 16:
            return KVFormat(head_dim, 1)  # raises, and says why
        order = default_rotation_order(head_dim) if self.order is None else self.order
        order = 1 if self.rotation == "none" else order
        fingerprint, rotate_v = "none", self.rotation == "kv"
        if (calibration := self.load_calibration()) is not None:
            calibration.check(head_dim=head_dim, rotation_order=order, groups=self.groups)
            fingerprint = calibration.fingerprint
            rotate_v = rotate_v or (self.rotation == "auto" and calibration.manifest["rotate_v"])
        return KVFormat(head_dim, order, rotate_v=rotate_v, calibration=fingerprint, groups=self.groups)

    def load_calibration(self):
        """The ``saw_int4.calibration.artifact.Calibration``, or None. ValueError where the artifact is no good."""
        if self.calibration in ("none", "auto"):
            return None
        from saw_int4.calibration import artifact

        return artifact.load_once(self.calibration)

    @property
    def fingerprint(self) -> str:
        """16 hex digits; processes that serve one model must agree on them."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Options:
        return cls(**json.loads(text))


def flag(name: str, environ: Mapping[str, str] = os.environ) -> bool | None:
    """A boolean variable; None when it is unset. ValueError when it is neither true nor false."""
    if name not in environ:
        return None
    text = environ[name].strip().lower()
    if text not in _TRUE + _FALSE:
        raise ValueError(f"{name} is {environ[name]!r}, expected 1 or 0.")
    return text in _TRUE


def resolve(environ: Mapping[str, str] = os.environ) -> tuple[Options, list[str]]:
    """Read the options from the environment.

    Returns:
        The options, and one sentence for each alias that took part, saying what it became.

    Raises:
        ValueError: a value cannot be parsed, or two variables contradict each other.
    """
    rotation = environ[ROTATION].strip().lower() if ROTATION in environ else None
    order = _order(environ, ROTATION_ORDER)
    alias_rotation, alias_order, notes = _aliases(environ)
    rotation = _agree(ROTATION, rotation, "HADAMARD and ROTATE_V", alias_rotation)
    order = _agree(ROTATION_ORDER, order, "HADAMARD_ORDER", alias_order)
    calibration = environ.get(CALIBRATION, "").strip() or Options.calibration
    if calibration not in ("none", "auto"):
        calibration = str(Path(calibration).resolve())
    rotation = Options.rotation if rotation is None else rotation
    groups = environ.get(GROUPS, "").strip() or "1"
    if not groups.isdigit():
        raise ValueError(f"{GROUPS} (--saw-groups) is {groups!r}, expected 1 or {MAX_GROUPS}.")
    bf16_layers = environ.get(BF16_LAYERS, "").strip()
    invariant = bool(flag(BATCH_INVARIANT, environ))
    return Options(rotation, order, calibration, int(groups), bf16_layers, batch_invariant=invariant), notes


def publish(options: Options) -> None:
    """Hand the options to every process that this one starts from now on."""
    os.environ[RESOLVED] = options.to_json()


def published() -> Options:
    """The options of the process that started the server. RuntimeError when it published none."""
    if RESOLVED not in os.environ:
        raise RuntimeError(
            f"int4 KV cache: {RESOLVED} is not set, so that this process cannot know the rotation its siblings use. "
            "The process that starts the server sets it: the environment must reach every worker (with Ray, name it "
            "in runtime_env)."
        )
    return Options.from_json(os.environ[RESOLVED])


def _order(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "head_dim").strip().lower()
    if text in ("head_dim", ""):
        return None
    if not text.isdigit():
        raise ValueError(f"{name} is {text!r}, expected a power of two, or head_dim.")
    return int(text)


def _aliases(environ: Mapping[str, str]) -> tuple[str | None, int | None, list[str]]:
    """Rotation and order as the published fork's variables ask for them, and what each became."""
    hadamard, rotate_v, fused = (flag(n, environ) for n in ("HADAMARD", "ROTATE_V", "SGLANG_FUSE_HADAMARD_INT4_KV"))
    order = _order(environ, "HADAMARD_ORDER")
    notes = []
    if hadamard is False and rotate_v:
        raise ValueError("HADAMARD=0 and ROTATE_V=1 contradict each other: V is rotated only where K is.")
    if hadamard is False:
        if order is not None:
            notes.append("HADAMARD_ORDER: ignored, HADAMARD=0 rotates nothing")
        rotation, order = "none", None
    elif hadamard or rotate_v is not None:
        rotation = "kv" if rotate_v else "k"
    else:
        rotation = None
    if rotation is not None:
        names = [f"{n}={environ[n]}" for n in ("HADAMARD", "ROTATE_V") if n in environ]
        notes.append(f"{', '.join(names)}: became {ROTATION}={rotation}")
    if order is not None:
        notes.append(f"HADAMARD_ORDER={order}: became {ROTATION_ORDER}={order}")
    elif hadamard and ROTATION_ORDER not in environ:
        notes.append("HADAMARD_ORDER unset: the order is head_dim here (16 in the published fork)")
    if fused is not None:
        notes.append("SGLANG_FUSE_HADAMARD_INT4_KV: ignored, rotation is always part of the kernels")
    return rotation, order, notes


def _agree(name: str, value, alias: str, alias_value):
    if value is not None and alias_value is not None and value != alias_value:
        raise ValueError(f"{name} asks for {value}, {alias} for {alias_value}. Unset one of them.")
    return alias_value if value is None else value
