from __future__ import annotations

import pytest

from pytest_gpumem.plugin import marks


def test_a_gpu_mark_says_what_a_test_needs():
    assert marks.read("gpu", (), {}) == marks.MarkedNeed(None, 1, False)
    need = marks.read("gpu", (), {"vram": "2GiB", "count": 2, "exclusive": True})
    assert need == marks.MarkedNeed(2**31, 2, True)
    assert marks.read("gpu", (), {"ram": "1GiB"}).ram == 2**30 == marks.read("ram", ("1GiB",), {})


def test_limits_are_sizes():
    assert marks.read("vram_limit", ("350MiB",), {}) == 350 * 2**20
    assert marks.read("vram_leak_limit", (), {}) == 0
    assert marks.read("vram_leak_limit", (), {"limit": "1KiB"}) == 1024


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "sentence"),
    [
        ("vram_limit", ("2 potatoes",), {}, "limit='2 potatoes': '2 potatoes' is not a size"),
        ("vram_limit", (-1,), {}, "limit=-1: -1 is negative"),
        (
            "vram_limit",
            (),
            {},
            "missing a required argument: 'limit'; allowed is vram_limit(limit)",
        ),
        ("vram_limit", (1.5,), {}, "limit=1.5 is not a size"),
        ("gpu", (), {"vram": "2 potatoes"}, "vram='2 potatoes': '2 potatoes' is not a size"),
        ("gpu", (), {"memory": "2GiB"}, "got an unexpected keyword argument 'memory'"),
        ("gpu", (), {"ram": "much"}, "ram='much': 'much' is not a size"),
        ("gpu", (), {"count": 0}, "count=0 is not a number of cards"),
        ("gpu", (), {"count": True}, "count=True is not a number of cards"),
        ("gpu", (), {"exclusive": "yes"}, "exclusive='yes' is neither True nor False"),
        ("gpumem_off", (1,), {}, "too many positional arguments"),
    ],
)
def test_a_bad_mark_is_one_sentence(name, args, kwargs, sentence):
    with pytest.raises(ValueError, match=f"mark {name}: ") as caught:
        marks.read(name, args, kwargs)

    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_marks_describe_themselves_for_pytest():
    assert marks.describe("gpu").startswith(
        "gpu(vram=None, count=1, exclusive=False, fallback=None, isolated=False, ram=None): Say how"
    )
    assert marks.describe("vram_limit").startswith("vram_limit(limit): Fail the test")
    assert marks.describe("gpumem_off").startswith("gpumem_off: Leave")
