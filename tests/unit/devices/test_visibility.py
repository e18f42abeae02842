from __future__ import annotations

import pytest
from device_fakes import uuid
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.devices.visibility import (
    Board,
    Slice,
    choices,
    names_by_uuid,
    order_is_known,
    visible_uuids,
)

A, B, C = uuid("a"), uuid("b"), uuid("c")
BOARDS = [Board(A, "Fake 100"), Board(B, "Fake 100"), Board(C, "Fake 100")]
NEAR = "GPU-aaaaaaab-bbbb-bbbb-bbbb-bbbbbbbbbbbb"


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        pytest.param(None, (A, B, C), id="unset"),
        pytest.param("", (), id="empty"),
        pytest.param("-1", (), id="-1"),
        pytest.param("1", (B,), id="one"),
        pytest.param("2,0", (C, A), id="order"),
        pytest.param(" 2 , 0", (C, A), id="blanks"),
        pytest.param("+1", (B,), id="sign"),
        pytest.param("0x1", (A,), id="hex-is-zero"),
        pytest.param("1abc,2gpu", (B, C), id="trailing-letters"),
        pytest.param("0,-1,1", (A,), id="minus-one-ends"),
        pytest.param("0,9,1", (A,), id="unknown-index-ends"),
        pytest.param("0,abc,1", (A,), id="word-ends"),
        pytest.param("+,0", (), id="sign-alone"),
        pytest.param("1,1", (), id="duplicate"),
        pytest.param("0,9,9", (), id="duplicate-of-unknown"),
        pytest.param(B, (B,), id="uuid"),
        pytest.param(f"{C},{A}", (C, A), id="uuids"),
        pytest.param("GPU-b", (B,), id="partial"),
        pytest.param("GPU-bbbb,GPU-bb", (), id="partials-of-one-card"),
        pytest.param(f"{B},{B}", (), id="uuid-twice"),
        pytest.param("GPU-f,GPU-a", (), id="unknown-uuid-ends"),
        pytest.param("GPU-", (), id="ambiguous"),
        pytest.param(f"{A},1", (A,), id="index-after-uuid-ends"),
        pytest.param(f"0,{B}", (A,), id="uuid-after-index-ends"),
        pytest.param(f"{A},MIG-a", (A,), id="mig-after-uuid-ends"),
    ],
)
def test_the_text_leaves_visible_what_cuda_would(
    text: str | None, visible: tuple[str, ...]
) -> None:
    assert visible_uuids(text, BOARDS) == visible


def test_a_partial_uuid_of_two_cards_names_none() -> None:
    boards = [Board(A, "Fake"), Board(NEAR, "Fake")]
    assert visible_uuids("GPU-aaaaaaa", boards) == ()
    assert visible_uuids("GPU-aaaaaaab", boards) == (NEAR,)


def mig_boards() -> list[Board]:
    first = (Slice("MIG-1111", f"MIG-{B}/1/0"), Slice("MIG-1222", f"MIG-{B}/10/0"))
    return [Board(A, "Fake"), Board(B, "Fake", first), Board(C, "Fake", ())]


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        pytest.param(None, ("MIG-1111",), id="unset-sees-one-slice-and-nothing-else"),
        pytest.param("0", (A,), id="card-without-mig"),
        pytest.param("0,1", ("MIG-1111",), id="slice-hides-whole-cards"),
        pytest.param(B, ("MIG-1111",), id="gpu-uuid-is-its-first-slice"),
        pytest.param("2", (), id="mig-card-without-slices"),
        pytest.param("MIG-1222", ("MIG-1222",), id="slice-uuid"),
        pytest.param("MIG-1222,MIG-1111", ("MIG-1222",), id="first-of-several"),
        pytest.param("MIG-12", ("MIG-1222",), id="partial"),
        pytest.param("MIG-1", (), id="ambiguous"),
        pytest.param("MIG-9", (), id="unknown"),
        pytest.param(f"MIG-{B}/1/0", ("MIG-1111",), id="old-name"),
        pytest.param(f"MIG-{B}/10/0", ("MIG-1222",), id="old-name-of-another"),
    ],
)
def test_mig_shows_one_slice_only(text: str | None, visible: tuple[str, ...]) -> None:
    assert visible_uuids(text, mig_boards()) == visible


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        pytest.param(None, (A, "MIG-1111", "MIG-1222"), id="unset"),
        pytest.param("0", (A,), id="card-without-mig"),
        pytest.param("1", ("MIG-1111", "MIG-1222"), id="each-slice-of-a-card"),
        pytest.param(f"{B},{A}", ("MIG-1111", "MIG-1222", A), id="in-the-order-named"),
        pytest.param("2", (), id="mig-card-without-slices"),
        pytest.param("MIG-1222,MIG-1111", ("MIG-1222", "MIG-1111"), id="several-slices"),
        pytest.param("MIG-1222,MIG-9", ("MIG-1222",), id="up-to-an-unknown-one"),
        pytest.param("MIG-1222,MIG-1222", (), id="twice"),
        pytest.param("", (), id="none"),
    ],
)
def test_a_process_may_have_any_slice_that_it_is_left(text: str, allowed: tuple[str, ...]) -> None:
    assert choices(text, mig_boards()) == allowed


def test_pci_order_is_cudas_order_when_asked_for_or_when_cards_are_alike() -> None:
    unlike = [Board(A, "Fake 100"), Board(B, "Fake 4090")]
    assert order_is_known("PCI_BUS_ID", unlike)
    assert order_is_known(None, BOARDS)
    assert order_is_known("FASTEST_FIRST", [])
    assert not order_is_known("FASTEST_FIRST", unlike)
    assert not order_is_known(None, unlike)


def test_a_list_of_uuids_does_not_depend_on_order() -> None:
    assert names_by_uuid(f"{A},{B}")
    assert names_by_uuid("MIG-1")
    assert not names_by_uuid("0,1")
    assert not names_by_uuid(None)


uuids = st.lists(st.text("ab", min_size=4, max_size=4).map("GPU-".__add__), max_size=4, unique=True)
entries = st.one_of(
    st.integers(-2, 6).map(str),
    st.text("ab", max_size=4).map("GPU-".__add__),
    st.text(" 01x+-aG,", max_size=5),
)
texts = st.one_of(st.none(), st.lists(entries, max_size=5).map(",".join))


@given(text=texts, names=uuids)
def test_it_agrees_with_torch(text: str | None, names: list[str]) -> None:
    expected = as_torch_reads(text, names)
    assert visible_uuids(text, [Board(name, "Fake") for name in names]) == expected


def as_torch_reads(text: str | None, names: list[str]) -> tuple[str, ...]:
    """What torch's own functions say, with the trimming of ``_device_count_nvml``."""
    from torch import cuda

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if text is not None:
            patch.setenv("CUDA_VISIBLE_DEVICES", text)
        try:
            parsed = cuda._parse_visible_devices()
        except ValueError:  # a lone sign, on which torch's int() fails and strtoul says 0
            return visible_uuids(text, [Board(name, "Fake") for name in names])
    if parsed and isinstance(parsed[0], str):
        parsed = cuda._transform_uuid_to_ordinals(parsed, names)
    too_large = next((at for at, index in enumerate(parsed) if index >= len(names)), len(parsed))
    return tuple(names[index] for index in parsed[:too_large])


@given(text=st.text(), names=uuids)
def test_any_text_names_known_cards_once_each(text: str, names: list[str]) -> None:
    visible = visible_uuids(text, [Board(name, "Fake") for name in names])
    assert set(visible) <= set(names)
    assert len(set(visible)) == len(visible)
