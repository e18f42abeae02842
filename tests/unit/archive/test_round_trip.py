from __future__ import annotations

import itertools
from collections import OrderedDict, namedtuple

import pytest
import states
import torch
from hypothesis import given, settings
from states import DTYPES, QUANTIZED, same, shared, tensors_of

from pytest_gpumem.archive import codec, disk, file, subclasses
from pytest_gpumem.archive.store import ArchiveStore
from pytest_gpumem.errors import StateRefusedError

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

SECRET = b"s" * 32


@pytest.fixture(scope="module")
def keep(tmp_path_factory):
    """Return what an archive makes of a state."""
    folder = tmp_path_factory.mktemp("archive")

    def _keep(state, path=()):
        new = disk.NewFile(folder / "state")
        try:
            file.write(new, SECRET, file.Packed(state))
            new.publish()
        finally:
            new.close()
        reader = file.Reader(folder / "state", SECRET)
        try:
            return reader.get(path)
        finally:
            reader.close()

    return _keep


@settings(deadline=None, max_examples=max(150, settings().max_examples))
@given(box=states.states())
def test_every_state_comes_back_bit_for_bit(keep, box):
    back = keep(box.state)

    same(box.state, back)
    mine, theirs = tensors_of(box.state), tensors_of(back)
    assert shared(mine) == shared(theirs)
    for (a, b), (c, d) in zip(
        itertools.combinations(mine, 2), itertools.combinations(theirs, 2), strict=True
    ):
        assert (a is b) == (c is d)


@pytest.mark.parametrize("dtype", [each for each in DTYPES if each not in QUANTIZED], ids=str)
@pytest.mark.parametrize("elements", [0, 5, 300_001])
def test_every_dtype_comes_back_at_every_size(keep, dtype, elements):
    itemsize = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 256, (elements * itemsize,), dtype=torch.uint8)
    tensor = torch.empty(0, dtype=dtype).set_(data.untyped_storage(), 0, (elements,), (1,))

    back = keep({"x": tensor})["x"]
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(data, states.raw_storage(back.untyped_storage()))


def quantized():
    values = torch.randn(4, 6)
    scales, zeros = torch.rand(4) + 0.1, torch.zeros(4)
    for dtype in (torch.qint8, torch.quint8, torch.qint32):
        yield torch.quantize_per_tensor(values, 0.1, 2, dtype)
        yield torch.quantize_per_tensor(values, 0.1, 2, dtype).t()
    yield torch.quantize_per_channel(values, scales, zeros.long(), 0, torch.qint8)
    for dtype in (torch.qint8, torch.quint4x2, torch.quint2x4):
        yield torch.quantize_per_channel(values, scales, zeros, 0, dtype)


@pytest.mark.parametrize("number", range(10))
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensors_come_back(keep, number):
    tensor = list(quantized())[number]
    back = keep([tensor])[0]

    same(tensor, back)
    if tensor.dtype not in states.SUB_BYTE:
        assert torch.equal(tensor.dequantize(), back.dequantize())
    if tensor.qscheme() != torch.per_tensor_affine:
        assert torch.equal(tensor.q_per_channel_scales(), back.q_per_channel_scales())
        assert tensor.q_per_channel_axis() == back.q_per_channel_axis()


def sparse():
    dense = torch.tensor([[0.0, 2, 0, 0], [3, 0, 0, float("nan")], [0, 0, 0, 0], [1, 0, 5, 0]])
    indices = torch.tensor([[0, 0, 1], [2, 2, 0]])
    yield "coo, coalesced", dense.to_sparse()
    yield (
        "coo, not coalesced",
        torch.sparse_coo_tensor(indices, torch.randn(3, 2), (2, 3, 2), check_invariants=True),
    )
    yield "csr", dense.to_sparse_csr()
    yield "csc", dense.to_sparse_csc()
    yield "bsr", dense.to_sparse_bsr((2, 2))
    yield "bsc", dense.to_sparse_bsc((2, 2))
    yield "coo, empty", torch.zeros(3, 0).to_sparse()


SPARSE = ["coo, coalesced", "coo, not coalesced", "csr", "csc", "bsr", "bsc", "coo, empty"]


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_come_back(keep, kind):
    tensor = dict(sparse())[kind]
    back = keep({"s": tensor})["s"]

    same(tensor, back)
    if "coo" in kind:
        assert tensor.is_coalesced() == back.is_coalesced()


def test_tied_weights_stay_tied_and_a_slice_does_not_take_its_storage_along(keep):
    model = torch.nn.Linear(8, 8, bias=False)
    big = torch.zeros(2**22)
    state = {
        "a": model.weight,
        "again": model.weight,
        "view": model.weight.detach()[2:],
        "s": big[5:9],
    }
    packed = file.Packed(state)
    assert packed.parts.size == 8 * 8 * 4 + 4 * 4 + 4  # the slice from a multiple of 16 on

    back = keep(state)
    assert back["a"] is back["again"]
    with torch.no_grad():
        back["a"][3, 3] = 7
    assert back["view"][1, 3] == 7


def test_a_state_dict_keeps_the_versions_of_its_modules(keep):
    state = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)).state_dict()
    back = keep(state)

    assert type(back) is OrderedDict
    assert back._metadata == state._metadata


def test_gradients_and_attributes_come_along(keep):
    parameter = torch.nn.Parameter(torch.randn(3))
    (parameter * 2).sum().backward()
    parameter.tag = {"rows": [1, 2]}
    back = keep([parameter])[0]

    assert torch.equal(back.grad, parameter.grad)
    assert back.tag == {"rows": [1, 2]}


class Pair(torch.Tensor):
    """A tensor of two."""

    @staticmethod
    def __new__(cls, one, two, note):
        return torch.Tensor._make_wrapper_subclass(cls, one.shape, dtype=one.dtype)

    def __init__(self, one, two, note):
        self.one, self.two, self.note = one, two, note

    def __tensor_flatten__(self):
        return ["one", "two"], {"note": self.note}

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Pair(inner["one"], inner["two"], context["note"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Pair(args[0].one, args[0].two, args[0].note)
        raise NotImplementedError(func)


def test_a_subclass_is_refused_until_it_is_allowed(keep, monkeypatch):
    monkeypatch.setattr(subclasses, "_allowed", set())
    one = torch.randn(3)
    state = {"w": torch.nn.Parameter(Pair(one, torch.randn(3), "n")), "tied": one}
    with pytest.raises(StateRefusedError, match=r"\['w'\]: a tensor of the class .*Pair; allow"):
        keep(state)

    subclasses.allow_subclass(Pair)
    back = keep(state)
    assert isinstance(back["w"], Pair)
    assert isinstance(back["w"], torch.nn.Parameter)
    assert back["w"].note == "n"
    same(back["w"].two, state["w"].two)
    assert back["w"].one.data_ptr() == back["tied"].data_ptr()


Point = namedtuple("Point", "x y")


class Text(str):
    __slots__ = ()


LOOP = [1]
LOOP.append({"again": LOOP})


def deep(count, wrap):
    found = torch.ones(2)
    for _ in range(count):
        found = wrap(found)
    return found


def with_attribute(inner):
    made = torch.ones(2)
    made.inner = inner
    return made


def with_gradient(inner):
    made = torch.ones(2)
    made.grad = inner
    return made


def held_by_its_list():
    held = [torch.nn.Parameter(torch.ones(2))]
    held[0].group = held
    return {"held": held}


def inside_itself():
    made = Pair(torch.ones(2), torch.ones(2), "n")
    made.one = made
    return [made]


def held_by_a_part():
    made = Pair(torch.ones(2), torch.ones(2), "n")
    made.one.whole = made
    return [made]


def holding(name):
    """Return a tensor that holds itself."""
    one = torch.nn.Parameter(torch.ones(2))
    other = torch.ones(2)
    if name == "attribute":
        one.self = one
    elif name == "two attributes":
        one.other, other.one = other, [one]
    elif name == "gradient":
        one.grad = other
        other.owner = {"p": one}
    return one


@pytest.mark.parametrize("name", ["attribute", "two attributes", "gradient"])
def test_tensors_that_hold_themselves_come_back(keep, name):
    found = keep([holding(name), holding(name)])
    for each in found:
        again = {
            "attribute": lambda it: it.self,
            "two attributes": lambda it: it.other.one[0],
            "gradient": lambda it: it.grad.owner["p"],
        }[name](each)
        assert again is each


@pytest.mark.parametrize("wrap", [lambda it: [it], with_attribute, with_gradient])
def test_what_is_nested_is_kept_or_refused_and_nothing_else(keep, wrap):
    keep(deep(40, wrap))
    with pytest.raises(StateRefusedError, match="more than 100 containers or tensors"):
        keep(deep(1500, wrap))


def test_a_tensor_that_is_part_of_itself_is_refused(keep, monkeypatch):
    monkeypatch.setattr(subclasses, "_allowed", {Pair})
    with pytest.raises(StateRefusedError, match=r"not be restored: .* a tensor inside itself"):
        keep(inside_itself())
    found = keep(held_by_a_part())
    assert found[0].one.whole is found[0]


def test_a_subclass_that_cannot_be_taken_apart_or_built_is_refused(keep, monkeypatch):
    monkeypatch.setattr(subclasses, "_allowed", {Pair})
    state = [Pair(torch.ones(2), torch.ones(2), "n")]
    monkeypatch.setattr(Pair, "__tensor_unflatten__", lambda *_: 1 / 0)
    with pytest.raises(StateRefusedError, match=r"could not be restored: .* division by zero"):
        keep(state)
    monkeypatch.setattr(Pair, "__tensor_flatten__", lambda _: 1 / 0)
    with pytest.raises(StateRefusedError, match=r"\[0\]: a tensor that cannot be taken apart: div"):
        keep(state)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"a": [1, object()]}, r"state\['a'\]\[1\]: a builtins.object; allowed are tensors"),
        ({"p": Point(1, 2)}, r"state\['p'\]: a .*Point"),
        (Text("x"), "state: a .*Text"),
        ({"s": {1, 2}}, "a builtins.set"),
        (LOOP, r"state\[1\]\['again'\]: a list inside itself"),
        (held_by_its_list(), r"state\['held'\]\[0\]\['group'\]: a list inside itself"),
        ({"x": torch.ones(2, requires_grad=True) * 2}, r"a graph behind it; detach\(\) it"),
        ({torch.ones(2): 1}, "a tensor as a key"),
        ({"m": torch.ones(3).to_mkldnn()}, "layout _mkldnn; give its to_dense"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_kept_is_refused_by_name(keep, state, sentence):
    with pytest.raises(StateRefusedError, match=sentence):
        keep(state)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused(keep):
    with pytest.raises(StateRefusedError, match="a nested tensor"):
        keep([torch.nested.nested_tensor([torch.ones(2)])])


def test_an_emptied_tensor_is_refused(keep):
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)

    with pytest.raises(StateRefusedError, match="not in memory"):
        keep([tensor])


def test_an_optimizer_continues_bit_by_bit_where_it_stopped(keep):
    def steps(model, optimizer, count):
        generator = torch.Generator().manual_seed(5)
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(4, 16, generator=generator)).square().sum().backward()
            optimizer.step()

    def made():
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)

    model, optimizer = made()
    steps(model, optimizer, 3)
    back = keep({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    steps(model, optimizer, 10)

    other, other_optimizer = made()
    other.load_state_dict(back["model"])
    other_optimizer.load_state_dict(back["optimizer"])
    steps(other, other_optimizer, 10)
    same(model.state_dict(), other.state_dict())
    same(optimizer.state_dict(), other_optimizer.state_dict())


@pytest.mark.parametrize("path", [(), ("b",), ("b", 1), ("a",)])
def test_a_part_of_a_state_is_read_alone(keep, path):
    state = {"a": torch.randn(400_000), "b": [torch.arange(3), torch.randn(5).t()], "c": 1}
    wanted = state
    for key in path:
        wanted = wanted[key]

    same(wanted, keep(state, path=path))


@pytest.mark.parametrize("path", [("z",), ("b", 2), ("b", "x"), ("c", 0), ("b", -1)])
def test_a_path_that_leads_nowhere_is_a_key_error(keep, path):
    with pytest.raises(KeyError):
        keep({"b": [1, 2], "c": 1}, path=path)


@pytest.mark.parametrize("step", ["_split_half", "_merge_half"])
def test_a_finaliser_that_wakes_another_state_in_the_middle_of_a_chunk_disturbs_neither(
    tmp_path, monkeypatch, step
):
    store = ArchiveStore(tmp_path, key=b"k" * 32)
    first, second = ({"w": torch.randn(3, 100_001)} for _ in range(2))
    other = store.put(second)
    real, woken = getattr(codec.Coder, step), []

    def interrupted(*arguments, **options):
        if not woken:  # as the collector would, in the thread that asks for memory
            woken.append(None)
            woken[0] = store.get(other)
        return real(*arguments, **options)

    monkeypatch.setattr(codec.Coder, step, interrupted)
    name = store.put(first)
    same(store.get(name), first)
    same(woken[0], second)
