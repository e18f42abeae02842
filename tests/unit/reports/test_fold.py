"""Lines for narrow terminals: where they are broken, and what never is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.reports.fold import fold

ID = "tests/test_a.py::test_with_a_name"
CASES = {
    "it fits": (f"  1.00 GiB by {ID}", 60, [f"  1.00 GiB by {ID}"]),
    "no terminal": (f"{'word ' * 40}{ID}", 0, [f"{'word ' * 40}{ID}"]),
    "the name after the numbers": (
        f" 434.38 MiB      11%  523.03 MiB         0 B  {ID}",
        60,
        [" 434.38 MiB      11%  523.03 MiB         0 B", f"    {ID}"],
    ),
    "whatever the numbers' width": (
        f"        0 B       0%  523.03 MiB         0 B  {ID}",
        60,
        ["        0 B       0%  523.03 MiB         0 B", f"    {ID}"],
    ),
    "within a list": (
        "        44.71 MiB  tensor float32 30522x384, parameter, fixture 'model'",
        60,
        [
            "        44.71 MiB  tensor float32 30522x384, parameter,",
            "          fixture 'model'",
        ],
    ),
    "parameters with spaces": (
        "  likewise one two test_a.py::test_b[a long one, b] [gw1]",
        44,
        ["  likewise one two", "      test_a.py::test_b[a long one, b] [gw1]"],
    ),
    "a name takes the room of the indent": (f"  by {ID}: x", 36, ["  by", f"  {ID}:", "      x"]),
    "a name that is too long stays whole": (f"  by {ID}: x", 20, ["  by", f"{ID}:", "      x"]),
    "what is to be pasted into a shell": (
        f"      pytest -p gpumem --gpumem-oom-at 3 {ID}",
        40,
        [f"      pytest -p gpumem --gpumem-oom-at 3 {ID}"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "width", "lines"), CASES.values(), ids=CASES)
def test_where_a_line_is_broken(text, width, lines):
    assert list(fold(text, width)) == lines


@given(st.text("ab: 1.MiB", max_size=200), st.sampled_from([20, 60, 80, 120]))
def test_nothing_is_lost_and_only_words_are_wider(text, width):
    lines = list(fold(text, width))

    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines if line.strip())
