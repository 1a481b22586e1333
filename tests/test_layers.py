"""A choice of layers, as it is written and what it means."""

import pytest

from saw_int4 import env, layers


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("", []),
        ("0", [0]),
        ("3-5,1", [1, 3, 4, 5]),
        ("first:2, LAST:1", [0, 1, 7]),
        ("first:8", list(range(8))),
        ("last:0", []),
        ("2,2,1-2", [1, 2]),
    ],
)
def test_meaning(text, means):
    assert layers.chosen(text, 8) == means


@pytest.mark.parametrize("text", ["8", "7-8", "first:9", "last:9", "5-3", "x", "first", "1.5", "-1", "first:-1"])
def test_no_such_layers(text):
    with pytest.raises(ValueError, match="no layer|not in this model"):
        layers.chosen(text, 8)


def test_options():
    options = env.resolve({env.BF16_LAYERS: "first:1,last:2"})[0].for_model(30)
    assert options.bf16_layers == "0,28,29"
    assert options.bf16_layer_ids == {0, 28, 29}
    assert env.Options().bf16_layer_ids == set()
    assert options.fingerprint != env.Options().fingerprint
    for options in ({env.BF16_LAYERS: "all"}, {env.BF16_LAYERS: "0-"}):
        with pytest.raises(ValueError, match="SAW_INT4_BF16_LAYERS .--saw-bf16-layers. is"):
            env.resolve(options)
    with pytest.raises(ValueError, match="layers 0 to 29"):
        env.Options(bf16_layers="30").for_model(30)
