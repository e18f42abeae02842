from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.units import format_bytes, format_mib, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0B", 0),
        ("512 B", 512),
        ("2GiB", 2 * 2**30),
        ("3.81 GiB", 381 * 2**30 // 100),
        (" 350 mib ", 350 * 2**20),
        ("1.5KB", 1500),
        (".5MiB", 2**19),
        ("9007199254740993B", 2**53 + 1),
        (1024, 1024),
    ],
)
def test_sizes_are_read_to_the_byte(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "2", "2 potatoes", "-1GiB", "GiB", "1e3 MiB", "1..2MiB", "²GiB", -1, True, None]
)
def test_what_is_no_size_is_refused_in_one_sentence(text):
    with pytest.raises(ValueError, match="allowed is a size like") as caught:
        parse_bytes(text)
    assert str(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (46 * 2**20, "46.00 MiB"),
        (381 * 2**30 // 100, "3.81 GiB"),
        (5000 * 2**30, "5000.00 GiB"),
        (-(2**20), "-1.00 MiB"),
    ],
)
def test_sizes_are_shown_with_two_decimals_and_no_unit_above_gib(size, text):
    assert format_bytes(size) == text


@given(st.integers(min_value=0, max_value=2**50))
def test_a_size_read_back_is_within_the_shown_precision(size):
    shown = format_bytes(size)
    unit = parse_bytes("1" + shown.split()[1])
    assert abs(parse_bytes(shown) - size) <= unit / 200 + 1


def test_columns_show_bare_mib():
    assert format_mib(3 * 2**19) == "1.5"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.2, "3.20 s"),
        (59.4, "59.40 s"),
        (59.7, "1 min 0 s"),
        (291.02, "4 min 51 s"),
        (5460, "1 h 31 min"),
    ],
)
def test_durations_are_told_by_their_two_largest_units(seconds, text):
    assert format_seconds(seconds) == text
