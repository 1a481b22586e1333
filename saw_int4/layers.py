"""A choice of layers, as an operator writes it: ``0,3-5,first:2,last:1``. Layers are counted from 0."""

from __future__ import annotations

import re

_ITEM = re.compile(r"(first|last):(\d+)|(\d+)(?:-(\d+))?")


def parse(text: str) -> list[re.Match]:
    """The items of a choice. ValueError when one of them is none."""
    items = []
    for item in filter(None, "".join(text.split()).lower().split(",")):
        match = _ITEM.fullmatch(item)
        if match is None or (match[4] and int(match[4]) < int(match[3])):
            raise ValueError(f"{item!r} is no layer (3), no range (3-5), and neither first:N nor last:N.")
        items.append(match)
    return items


def chosen(text: str, num_layers: int) -> list[int]:
    """The layers that a choice means in a model of ``num_layers``, in order. ValueError when it has no such layer."""
    layers = set()
    for item in parse(text):
        end, count, low, high = item.groups()
        if end is None:
            span = range(int(low), int(high or low) + 1)
        elif end == "first":
            span = range(int(count))
        else:
            span = range(num_layers - int(count), num_layers)
        if span and not 0 <= span[0] <= span[-1] < num_layers:
            raise ValueError(f"{item[0]!r} is not in this model, which has layers 0 to {num_layers - 1}.")
        layers.update(span)
    return sorted(layers)
