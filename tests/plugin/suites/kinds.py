"""Tests of every kind; sizes are in units of 16 KiB, small enough to be allocated exactly."""

import asyncio
import unittest

import pytest
import torch

KEPT = []


UNIT = 16 * 2**10


def take(units):
    return torch.zeros(units * UNIT, dtype=torch.uint8, device="cuda")


@pytest.fixture(scope="session")
def session_model():
    return take(32)


@pytest.fixture(scope="module")
def module_model():
    spare = take(64)
    del spare
    yield take(16)


@pytest.fixture
def batch():
    return take(2)


def test_function(batch):
    take(3)


def test_wider_fixtures(session_model, module_model):
    take(5)


def test_nothing():
    pass


def test_caught_oom():
    with pytest.raises(torch.cuda.OutOfMemoryError):
        take(10**6)


def test_resets_the_peak():
    take(40)
    torch.cuda.reset_peak_memory_stats()
    take(1)


def test_own_view_of_the_peak(session_model, module_model, request):
    torch.cuda.reset_peak_memory_stats()
    take(50)
    request.getfixturevalue("late_model")
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated() + (50 - 8) * UNIT


@pytest.fixture(scope="session")
def late_model():
    return take(8)


@pytest.mark.parametrize("units", [4, 6])
def test_parametrised(units):
    take(units)


class TestClass:
    def test_method(self):
        self.kept_by_the_instance = take(7)


class TestUnit(unittest.TestCase):
    def setUp(self):
        self.kept_by_the_case = take(8)

    def test_case(self):
        take(1)

    def test_failing_case(self):
        local = take(3)
        self.assertEqual(local.numel(), 1)


@pytest.mark.asyncio
async def test_asyncio():
    await asyncio.sleep(0)
    take(12)


@pytest.mark.asyncio
async def test_failing_asyncio():
    local = take(14)
    await asyncio.sleep(0)
    assert local.numel() == 1


@pytest.mark.anyio
async def test_anyio():
    take(12)


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest 9 brought subtests")
def test_subtests(request):
    subtests = request.getfixturevalue("subtests")
    for units in (14, 16):
        with subtests.test(units=units):
            take(units)


def doctested():
    """
    >>> kept_by_the_doctest = take(18)
    """


@pytest.mark.skip(reason="never runs")
def test_skipped():
    take(1)


def test_skips_itself():
    local = take(18)
    pytest.skip(f"{local.numel()}")


@pytest.mark.xfail(reason="expected", strict=True)
def test_xfailed():
    local = take(20)
    assert local.numel() == 1


def test_fails_with_a_chain():
    local = take(20)
    try:
        inner(local)
    except ValueError as error:
        again = take(22)
        raise RuntimeError(again.numel()) from error


def inner(tensor):
    copy = tensor.clone()
    raise ValueError(copy.numel())


@pytest.fixture
def broken_setup():
    local = take(22)
    raise ValueError(local.numel())


def test_setup_error(broken_setup):
    pass


@pytest.fixture
def broken_teardown():
    yield
    local = take(24)
    raise ValueError(local.numel())


def test_teardown_error(broken_teardown):
    pass


def test_leak():
    KEPT.append(take(24))


def test_failing_leak():
    KEPT.append(take(26))
    raise ValueError


def test_cycle():
    class Node:
        pass

    node = Node()
    node.self, node.tensor = node, take(26)


@pytest.mark.gpumem_off
def test_off():
    take(28)


def test_fills_a_wider_fixture(session_model):
    session_model.extra = take(28)


def test_fixture_readings(gpumem):
    before = gpumem.allocated
    tensor = take(30)
    assert gpumem.allocated == before + tensor.numel()
    del tensor
    assert gpumem.peak >= before + 30 * UNIT


@pytest.mark.vram_limit("480KiB")
def test_within_the_limit():
    take(30)


@pytest.mark.vram_limit("480KiB")
def test_over_the_limit():
    take(32)


@pytest.mark.vram_leak_limit("16KiB")
def test_over_the_leak_limit():
    KEPT.append(take(32))


@pytest.mark.xfail(reason="known", strict=True)
@pytest.mark.vram_limit("480KiB")
def test_over_the_limit_as_expected():
    take(34)


@pytest.mark.vram_limit("480KiB")
def test_over_the_limit_but_skipped():
    local = take(34)
    pytest.skip(f"{local.numel()}")
