"""Lets the registry's torchvision be imported next to a CPU build of torch.

That torchvision is a CUDA build: its C library does not load under a CPU torch, and its Python side then fails on
operators the library would have defined. transformers and SGLang import torchvision without using it for text
models, so the two schemas it looks up are enough.
"""

import importlib.util

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_fragments: list[torch.library.Library] = []  # the definitions live as long as these


def define_missing_operators() -> None:
    """Define torchvision's two operator schemas, without kernels, where its C library cannot.

    Does nothing when torch has CUDA, torchvision is absent, or the operators exist. Call it before torchvision is
    first imported.
    """
    if torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            fragment = torch.library.Library("torchvision", "FRAGMENT")
            fragment.define(schema)
            _fragments.append(fragment)
