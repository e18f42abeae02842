from __future__ import annotations

import pytest
from forensic_corpus import CASES, SIZES

from pytest_gpumem.forensics import analysis


def told(found, key):
    if key == "growth":
        return found.growth_bytes
    return getattr(found, f"{key}_bytes" if key in SIZES else key)


def test_the_corpus_is_large_enough():
    assert len(CASES) >= 150
    assert len({each.name for each in CASES}) == len(CASES)


@pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)
def test_a_log_tells_what_it_should(each, tmp_path):
    log = tmp_path / f"log{each.suffix}"
    log.write_bytes(each.data)

    found = analysis.analyse([str(log)]).events

    assert [
        {key: told(event, key) for key in expected}
        for event, expected in zip(found, each.events, strict=False)
    ] == each.events[: len(found)], found
    assert len(found) == len(each.events), found
