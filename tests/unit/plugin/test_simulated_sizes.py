"""What ``--gpumem-simulate`` may say."""

import re

import pytest

from pytest_gpumem.plugin.option import simulated_sizes

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1GiB", (GIB,)),
        ("1GiB*1", (GIB,)),
        ("1GiB*2", (GIB, GIB)),
        ("1GiB * 2", (GIB, GIB)),
        ("512MiB*3", (GIB // 2,) * 3),
        ("1GiB,2GiB", (GIB, 2 * GIB)),
        ("1GiB*2,2GiB", (GIB, GIB, 2 * GIB)),
        ("1MiB*64", (2**20,) * 64),
    ],
)
def test_sizes_of_one_card_and_of_several(text, sizes):
    assert simulated_sizes(text) == sizes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1GiB*0", "'1GiB*0' is not a number of cards; allowed are a size, 4GiB*2 for two"),
        ("1GiB*-1", "is not a number of cards"),
        ("1GiB*two", "is not a number of cards"),
        ("1GiB*", "is not a number of cards"),
        ("1GiB*1.5", "is not a number of cards"),
        ("1GiB*2*2", "is not a number of cards"),
        ("1GiB*\u0662", "is not a number of cards"),
        ("2*1GiB", "'2*1GiB' is not a number of cards"),
        ("1MiB*65", "'1MiB*65' is 65 cards; allowed are 64"),
        ("*2", "is not a size"),
        ("1GiB,", "is not a size"),
        (",", "is not a size"),
        ("1GiB,0B", "is an empty card"),
        ("1TiB*999", "cards; allowed are 64"),
        ("900TiB*2", "'900TiB*2' is more than this machine's memory of"),
    ],
)
def test_what_is_neither_is_one_sentence(text, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        simulated_sizes(text)
    assert "\n" not in str(caught.value)
