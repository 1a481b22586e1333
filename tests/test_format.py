"""The row format: its two owners agree, and its bytes are frozen."""

from pathlib import Path

import pytest
import torch
from golden.generate import calibration

from saw_int4 import _C, format, ops, reference
from saw_int4.format import KVFormat

GOLDEN = [
    [groups, *line.split()]
    for groups, file in ((1, "rows.txt"), (2, "rows_2_groups.txt"))
    for line in (Path(__file__).parent / "golden" / file).read_text().splitlines()
]
HEAD_DIMS = (16, 64, 80, 96, 112, 128, 192, 256)


@pytest.fixture(params=_C.cpu_isas())
def isa(request):
    """Each instruction set of this machine in turn."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_twins_agree(head_dim):
    for groups in range(1, format.MAX_GROUPS + 1):
        assert _C.row_bytes(head_dim, groups) == format.row_bytes(head_dim, groups)
        for channel in range(head_dim):
            assert _C.group_of_channel(channel, groups) == format.group_of_channel(channel, groups)
    for channel in range(head_dim):
        assert _C.word_of_channel(channel) == format.word_of_channel(channel)
        assert _C.bit_of_channel(channel) == format.bit_of_channel(channel)


def test_constants_agree():
    assert _C.FORMAT_VERSION == format.FORMAT_VERSION
    assert _C.CODE_MAX == format.CODE_MAX
    assert _C.CODES_PER_WORD == format.CODES_PER_WORD
    assert _C.PARAM_BYTES == format.PARAM_BYTES
    assert _C.MAX_GROUPS == format.MAX_GROUPS


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_channels_fill_every_bit_once(head_dim):
    seen = {(format.word_of_channel(c), format.bit_of_channel(c) + i) for c in range(head_dim) for i in range(4)}
    assert seen == {(word, bit) for word in range(head_dim // 8) for bit in range(32)}


def test_rows_of_any_groups_and_head_dim_differ_in_length():
    """What lets a cache's shape tell its groups, whatever head_dim it was made for."""
    lengths = [format.row_bytes(d, groups) % 8 for d in range(16, 513, 16) for groups in (1, 2)]
    assert lengths == [4, 0] * 32


@pytest.mark.parametrize("line", GOLDEN, ids=lambda line: "-".join(map(str, line[:5])))
def test_golden_bytes(line, isa):
    groups, _, head_dim, order, kind, source, expected = line
    head_dim, order = int(head_dim), int(order)
    x = torch.frombuffer(bytearray.fromhex(source), dtype=torch.bfloat16).view(1, 1, head_dim)
    vectors = calibration(head_dim) if kind == "calibrated" else {}
    for append in (ops.append_kv, reference.append_kv):
        caches = [torch.zeros(1, 1, format.row_bytes(head_dim, groups), dtype=torch.uint8) for _ in range(2)]
        append(x, x, *caches, torch.tensor([0]), rotation_order=order, **vectors)
        assert bytes(caches[0].flatten().tolist()).hex() == expected


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"head_dim": 72, "rotation_order": 8}, "multiple of 16"),
        ({"head_dim": 0, "rotation_order": 1}, "multiple of 16"),
        ({"head_dim": 80, "rotation_order": 32}, "rotation order is 32"),
        ({"head_dim": 64, "rotation_order": 128}, "rotation order is 128"),
        ({"head_dim": 64, "rotation_order": 3}, "rotation order is 3"),
        ({"head_dim": 64, "rotation_order": 1, "rotate_v": True}, "rotation of V"),
        ({"head_dim": 64, "rotation_order": 64, "groups": 3}, "groups per row is 3, expected 1 or 2"),
    ],
)
def test_impossible_formats_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        KVFormat(**fields)


def test_fingerprint_tells_formats_apart():
    formats = [
        KVFormat(64, 64),
        KVFormat(128, 64),
        KVFormat(64, 32),
        KVFormat(64, 64, rotate_v=True),
        KVFormat(64, 64, calibration="0123456789abcdef"),
        KVFormat(64, 64, groups=2),
    ]
    assert len({f.fingerprint for f in formats}) == len(formats)
    assert KVFormat(64, 64).fingerprint == KVFormat(64, 64).fingerprint


@pytest.mark.parametrize(
    "head_dim, groups, ratio", [(64, 1, 32 / 9), (128, 1, 64 / 17), (256, 1, 128 / 33), (64, 2, 3.2), (128, 2, 32 / 9)]
)
def test_capacity(head_dim, groups, ratio):
    assert KVFormat(head_dim, 1, groups=groups).capacity_ratio == pytest.approx(ratio, abs=1e-12)
