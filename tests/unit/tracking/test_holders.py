from __future__ import annotations

import gc
import importlib.util
import itertools
import sys
import textwrap
import threading
import time
import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_gpumem.tracking import holders, torch_heap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

MARK = torch.float64
"""Tensors of this type stand for those on a card."""


def on_card(tensor: torch.Tensor) -> bool:
    return tensor.dtype == MARK


def marked(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape or (8,), dtype=MARK)


@pytest.fixture(scope="module")
def known() -> set[int]:
    """Storages of other tests' making."""
    gc.collect()
    return {storage.address for storage in holders.live_storages(on_card)}


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """What is freed here is freed by its last reference, not by luck."""
    gc.disable()
    yield
    gc.enable()


class Suite:
    """A user's project: modules in its directory, and who holds what in them."""

    def __init__(self, root: Path, known: set[int]) -> None:
        self.root = root
        self.known = known
        self.modules: list[str] = []

    def module(self, source: str, path: str = "tests/test_x.py") -> Any:
        """Import ``source`` as the module ``path``."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        head = "import torch\nMARK = torch.float64\ndef marked(*shape):\n"
        head += "    return torch.zeros(*shape or (8,), dtype=MARK)\n"
        file.write_text(head + textwrap.dedent(source))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        self.modules.append(file.stem)
        spec.loader.exec_module(module)
        return module

    def close(self) -> None:
        """Forget the modules and what they held."""
        for name in self.modules:
            vars(sys.modules.pop(name)).clear()
        gc.collect()

    def held(self, fixtures: Mapping[int, str] | None = None) -> list[holders.Holding]:
        return holders.find_holders(on_card, fixtures=fixtures, known=self.known, root=self.root)

    def where(self, fixtures: Mapping[int, str] | None = None) -> list[str]:
        return [held.where for held in self.held(fixtures)]


@pytest.fixture
def suite(tmp_path: Path, known: set[int]) -> Iterator[Suite]:
    suite = Suite(tmp_path, known)
    yield suite
    suite.close()


HOLDERS = {
    "a global": ("CACHE = marked()", "module global CACHE"),
    "a list": ("CACHE = [1, 2, 3, marked()]", "module global CACHE[3]"),
    "nested containers": (
        "CACHE = {'a': [{('b', 1): (None, marked())}]}",
        "module global CACHE['a'][0][('b', 1)][1]",
    ),
    "a long key": (
        "CACHE = {'k' * 100: marked()}",
        f"module global CACHE['{'k' * 39}...']",
    ),
    "a key without a text of its own": (
        "class Key:\n    pass\nCACHE = {Key(): marked()}",
        "module global CACHE[<Key>]",
    ),
    "a dictionary's key": ("CACHE = {marked(): 1}", "module global CACHE (a key)"),
    "a set": ("CACHE = [{marked()}]", "module global CACHE[0] (in a set)"),
    "a deque": (
        "import collections\nCACHE = collections.deque([1, marked()])",
        "module global CACHE[1]",
    ),
    "a default dictionary": (
        "import collections\nCACHE = collections.defaultdict(list)\nCACHE['x'].append(marked())",
        "module global CACHE['x'][0]",
    ),
    "an instance": (
        (
            "class Trainer:\n    def __init__(self):\n        self.cache = {'a': marked()}\n"
            "TRAINER = Trainer()"
        ),
        "module global TRAINER.cache['a']",
    ),
    "slots": (
        (
            "class Base:\n    __slots__ = ('one', 'cache')\n"
            "class Trainer(Base):\n    __slots__ = ()\n"
            "TRAINER = Trainer()\nTRAINER.cache = [marked()]"
        ),
        "module global TRAINER.cache[0]",
    ),
    "an attribute of a dictionary's subclass": (
        "class Batch(dict):\n    pass\nBATCH = Batch()\nBATCH.cache = [marked()]",
        "module global BATCH.cache[0]",
    ),
    "a partial function": (
        "import functools\nCALL = functools.partial(print, 1, marked())",
        "module global CALL.args[1]",
    ),
    "a bound method": (
        (
            "class Trainer:\n    def run(self): pass\n"
            "    def __init__(self): self.model = marked()\n"
            "RUN = Trainer().run"
        ),
        "module global RUN.__self__.model",
    ),
    "a cached property": (
        (
            "import functools\nclass Trainer:\n    @functools.cached_property\n"
            "    def model(self): return marked()\nTRAINER = Trainer()\nTRAINER.model"
        ),
        "module global TRAINER.model",
    ),
    "an exception": ("ERROR = ValueError('bad', marked())", "module global ERROR.args[1]"),
    "a tensor's attribute": (
        "CACHE = torch.zeros(1)\nCACHE.extra = marked()",
        "module global CACHE.extra",
    ),
    "a parameter": (
        (
            "class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.encoder = torch.nn.Linear(2, 2, bias=False, dtype=MARK)\nMODEL = Net()"
        ),
        "module global MODEL.encoder.weight",
    ),
    "a buffer": (
        "MODEL = torch.nn.Module()\nMODEL.register_buffer('scale', marked())",
        "module global MODEL.scale",
    ),
    "a parameter of a sequence": (
        (
            "MODEL = torch.nn.Sequential(torch.nn.ReLU(),"
            " torch.nn.Linear(2, 2, bias=False, dtype=MARK))"
        ),
        "module global MODEL[1].weight",
    ),
    "a plain attribute of a module": (
        "MODEL = torch.nn.ModuleDict({'a': torch.nn.ReLU()})\nMODEL['a'].cache = [marked()]",
        "module global MODEL.a.cache[0]",
    ),
    "a class": (
        "class Trainer:\n    cache = {'a': marked()}",
        "class attribute Trainer.cache['a']",
    ),
    "a nested class": (
        "class Outer:\n    class Inner:\n        model = marked()",
        "class attribute Outer.Inner.model",
    ),
    "a closure": (
        (
            "def make_hook():\n    acc = []\n    def hook():\n        acc.append(marked())\n"
            "    return hook\nhook = make_hook()\nhook()"
        ),
        "closure of make_hook.hook (variable acc)[0]",
    ),
    "a module's hook": (
        (
            "def watch(model):\n    seen = []\n"
            "    model.register_forward_hook(lambda m, i, o: seen.append(o))\n"
            "MODEL = torch.nn.ReLU()\nwatch(MODEL)\nMODEL(marked())"
        ),
        "closure of watch.<lambda> (variable seen)[0]",
    ),
    "a default argument": ("def f(a, b=1, c=marked()): pass", "default argument of f (c)"),
    "a keyword's default": ("def f(*, c=[marked()]): pass", "default argument of f (c)[0]"),
    "a function's attribute": (
        "def f(): pass\nf.cache = {'a': marked()}",
        "function attribute f.cache['a']",
    ),
    "an unbounded lru_cache": (
        (
            "import functools\n@functools.cache\ndef load_model(name): return {'m': marked()}\n"
            "load_model('a')"
        ),
        "functools.lru_cache of load_model['m']",
    ),
    "a bounded lru_cache": (
        (
            "import functools\n@functools.lru_cache(maxsize=3)\n"
            "def load_model(name): return {'m': marked()}\nload_model('a')"
        ),
        "functools.lru_cache of load_model['m']",
    ),
    "an object whose method is cached": (
        (
            "import functools\nclass Trainer:\n    def __init__(self): self.model = marked()\n"
            "    @functools.lru_cache(maxsize=3)\n    def run(self, n): pass\nTrainer().run(1)"
        ),
        "functools.lru_cache of Trainer.run (an argument of a cached call).model",
    ),
    "an object whose method is cached without bound": (
        (
            "import functools\nclass Trainer:\n    def __init__(self): self.model = marked()\n"
            "    @functools.cache\n    def run(self, n): pass\nTrainer().run(1)"
        ),
        "functools.lru_cache of Trainer.run (an argument of a cached call).model",
    ),
    "a suspended generator": (
        "def stream():\n    batch = [marked()]\n    yield 1\nSTREAM = stream()\nnext(STREAM)",
        "suspended stream (variable batch)[0]",
    ),
    "a suspended coroutine": (
        (
            "class Stop:\n    def __await__(self): yield\n"
            "async def job():\n    batch = marked()\n    await Stop()\nJOB = job()\nJOB.send(None)"
        ),
        "suspended job (variable batch)",
    ),
    "the traceback of a caught error": (
        (
            "def fail():\n    acts = [marked()]\n    raise ValueError('x')\n"
            "try:\n    fail()\nexcept ValueError as error:\n    ERROR = error"
        ),
        "traceback of ValueError in fail (variable acts)[0]",
    ),
    "a frame": (
        "import sys\ndef f():\n    x = marked()\n    return sys._getframe()\nFRAME = f()",
        "frame of f (variable x)",
    ),
    "a gradient": (
        (
            "MODEL = torch.nn.Linear(2, 2)\nMODEL.weight.grad = torch.ones(2, 2)\n"
            "MODEL.weight.grad.extra = [marked()]"
        ),
        "module global MODEL.weight.grad.extra[0]",
    ),
    "the autograd graph of a loss": (
        (
            "def loss():\n    x = torch.ones(4, dtype=MARK) * 2\n"
            "    w = torch.ones(4, dtype=MARK, requires_grad=True)\n"
            "    return (x * w).sum().float()\nLOSS = loss()"
        ),
        "module global LOSS.grad_fn",
    ),
    "the autograd graphs of collected losses": (
        (
            "def loss():\n    w = torch.ones(4, dtype=MARK, requires_grad=True)\n"
            "    return w.exp().sum().float()\nLOSSES = {'all': [loss(), loss()]}"
        ),
        "module global LOSSES['all'][...].grad_fn",
    ),
    "what a custom autograd function saved": (
        (
            "class Double(torch.autograd.Function):\n"
            "    @staticmethod\n    def forward(ctx, x):\n"
            "        ctx.extra = marked()\n        return x * 2\n"
            "    @staticmethod\n    def backward(ctx, g): return g\n"
            "LOSS = (Double.apply(torch.ones(2, requires_grad=True)) + 1).sum()"
        ),
        "module global LOSS.grad_fn",
    ),
    "what hooks packed for the backward pass": (
        (
            "def unpack(packed): raise AssertionError('must not be unpacked')\n"
            "with torch.autograd.graph.saved_tensors_hooks("
            "lambda t: {'packed': marked()}, unpack):\n"
            "    LOSS = torch.ones(2, requires_grad=True).exp()"
        ),
        "module global LOSS.grad_fn",
    ),
    "a view": ("VIEW = marked(100)[10:20]", "module global VIEW"),
}


@pytest.fixture(scope="module")
def held_at_once(tmp_path_factory: pytest.TempPathFactory, known: set[int]) -> dict[str, list[str]]:
    """What one search finds when all of ``HOLDERS`` hold something, by their names."""
    suite = Suite(tmp_path_factory.mktemp("suite"), known)
    paths = {name: f"tests/test_x{number}.py" for number, name in enumerate(HOLDERS)}
    for name, (source, _) in HOLDERS.items():
        suite.module(source, paths[name])
    found = suite.where()
    suite.close()
    return {
        name: [where.removeprefix(f"{path}: ") for where in found if where.startswith(f"{path}: ")]
        for name, path in paths.items()
    }


NEED_NEWEST = {"a gradient", "what hooks packed for the backward pass"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.newest] * (name in NEED_NEWEST)) for name in HOLDERS],
)
def test_a_holder_is_named(held_at_once: dict[str, list[str]], name: str) -> None:
    _, where = HOLDERS[name]
    assert held_at_once[name] == [where]


def test_installed_packages_are_named_by_their_module(suite: Suite) -> None:
    suite.module(
        "class Model:\n    cache = marked()\nCACHE = [marked()]", "lib/site-packages/lib_x.py"
    )
    assert sorted(suite.where()) == [
        "class attribute lib_x.Model.cache",
        "module global lib_x.CACHE[0]",
    ]


def test_modules_outside_the_root_are_named_by_their_module(suite: Suite) -> None:
    suite.module("CACHE = [marked()]")
    suite.root /= "elsewhere"
    assert suite.where() == ["module global test_x.CACHE[0]"]


def test_files_are_named_from_the_working_directory_by_default(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite.module("CACHE = marked()")
    monkeypatch.chdir(suite.root / "tests")
    [held] = holders.find_holders(on_card, known=suite.known)
    assert held.where == "test_x.py: module global CACHE"


def test_a_models_parameters_are_one_group(suite: Suite) -> None:
    suite.module("MODEL = torch.nn.ModuleDict({'a': torch.nn.Linear(3, 5, dtype=MARK)})")
    [held] = suite.held()
    assert held.where == "tests/test_x.py: module global MODEL.a"
    record = held.record()
    assert (record.tensors, record.size, record.shape) == (2, (15 + 5) * 8, (5, 3))
    assert record.dtype == "float64"
    assert [storage.size for storage in held.storages] == [15 * 8, 5 * 8]


def test_groups_with_more_bytes_come_first(suite: Suite) -> None:
    suite.module("SMALL = [marked(2), marked(2)]\nLARGE = marked(100)\nMIDDLE = marked(10)")
    assert [held.size for held in suite.held()] == [800, 80, 32]


def test_many_tensors_in_one_container_are_one_group(suite: Suite) -> None:
    suite.module("CACHE = {'all': [marked(1) for _ in range(1000)]}")
    [held] = suite.held()
    assert held.where == "tests/test_x.py: module global CACHE['all']"
    assert held.record().tensors == 1000


def test_a_storage_with_several_views_counts_once(suite: Suite) -> None:
    suite.module("BASE = marked(100)\nVIEWS = [BASE[:10], BASE[10:]]")
    [held] = suite.held()
    assert held.where == "tests/test_x.py: module global BASE"
    assert (held.size, held.storages[0].shape) == (800, (100,))


def test_parameters_that_a_list_holds_too_are_named_by_their_model(suite: Suite) -> None:
    suite.module(
        "MODEL = torch.nn.Linear(2, 2, bias=False, dtype=MARK)\n"
        "PARAMETERS = list(MODEL.parameters())"
    )
    assert suite.where() == ["tests/test_x.py: module global MODEL.weight"]


def test_a_gradient_without_an_object_of_its_own_is_found(suite: Suite) -> None:
    suite.module("MODEL = torch.nn.Linear(3, 3, dtype=MARK)\nMODEL(marked(3)).sum().backward()")
    [held] = suite.held()
    assert held.where == "tests/test_x.py: module global MODEL"
    assert held.size == 2 * (9 + 3) * 8


@pytest.mark.newest
def test_a_model_that_only_a_loss_keeps_alive_is_laid_at_its_door(suite: Suite) -> None:
    suite.module(
        "def loss():\n    model = torch.nn.Linear(3, 3, dtype=MARK)\n"
        "    return model(marked(1, 3)).exp().sum().float()\nTOTAL = loss()"
    )
    [held] = suite.held()
    assert held.where == "tests/test_x.py: module global TOTAL.grad_fn"
    assert held.size > (9 + 3) * 8


def test_a_graph_that_was_freed_holds_only_its_leaves(suite: Suite) -> None:
    suite.module(
        "WEIGHT = torch.nn.Parameter(torch.ones(4))\n"
        "LOSS = (WEIGHT * torch.ones(4)).double().exp().sum().float()\nLOSS.backward()"
    )
    assert suite.where() == []


FIXTURE = "fixture 'model' (session)"


@pytest.mark.parametrize(
    ("source", "value", "where"),
    [
        ("VALUE = marked()", "VALUE", FIXTURE),
        ("VALUE = [1, marked()]", "VALUE", f"{FIXTURE}[1]"),
        (
            (
                "class Trainer:\n    pass\nVALUE = Trainer()\n"
                "VALUE.model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False, dtype=MARK))"
            ),
            "VALUE",
            f"{FIXTURE}.model[0].weight",
        ),
        (
            (
                "class Trainer:\n    pass\nVALUE = Trainer()\n"
                "VALUE.model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False, dtype=MARK))"
            ),
            "VALUE.model[0]",
            f"{FIXTURE}.weight",
        ),
    ],
)
def test_what_a_fixtures_value_holds_is_its_own(
    suite: Suite, source: str, value: str, where: str
) -> None:
    module = suite.module(source)
    labels = {id(eval(value, vars(module))): FIXTURE}  # noqa: S307  # the literals above
    [held] = suite.held(labels)
    assert (held.where, held.fixture) == (where, FIXTURE)


def test_what_no_fixture_holds_has_none(suite: Suite) -> None:
    module = suite.module("VALUE = [1, marked()]")
    [held] = suite.held({id(module): FIXTURE})
    assert held.fixture is None


def test_the_last_error_is_named(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    module = suite.module("def fail():\n    x = marked()\n    raise ValueError('boom')")
    with pytest.raises(ValueError, match="boom") as caught:
        module.fail()
    monkeypatch.setattr(sys, "last_value", caught.value, raising=False)
    assert suite.where() == [
        "tests/test_x.py: sys.last_value: traceback of ValueError in fail (variable x)"
    ]


def test_a_variable_of_a_running_function_is_named(suite: Suite) -> None:
    module = suite.module("def run(call):\n    x = [marked()]\n    return call()")
    assert module.run(suite.where) == ["tests/test_x.py: running run (variable x)[0]"]


def test_a_variable_that_an_inner_function_shares_is_named(suite: Suite) -> None:
    module = suite.module(
        "def run(call):\n    x = [marked()]\n    def inner(): x\n    return call()"
    )
    assert module.run(suite.where) == ["tests/test_x.py: running run (variable x)[0]"]


def test_a_variable_of_another_thread_is_named(suite: Suite) -> None:
    module = suite.module("def run(ready, go):\n    x = marked()\n    ready.set()\n    go.wait()")
    ready, go = threading.Event(), threading.Event()
    thread = threading.Thread(target=module.run, args=(ready, go), name="loader")
    thread.start()
    try:
        assert ready.wait(30)
        assert suite.where() == ["tests/test_x.py: thread 'loader' running run (variable x)"]
    finally:
        go.set()
        thread.join()


def test_a_context_variable_is_named(suite: Suite) -> None:
    module = suite.module("import contextvars\nVARIABLE = contextvars.ContextVar('VARIABLE')\n")
    token = module.VARIABLE.set([marked()])
    where = suite.where()
    module.VARIABLE.reset(token)
    assert where == ["context variable VARIABLE[0]"]


def test_a_threads_own_data_is_named(suite: Suite) -> None:
    suite.module(
        "import threading\nLOCAL = threading.local()\nLOCAL.model = [marked()]\n"
        "class Data(threading.local):\n    pass\nDATA = Data()\nDATA.model = marked()"
    )
    assert sorted(suite.where()) == [
        "tests/test_x.py: module global DATA['model']",
        "tests/test_x.py: module global LOCAL['model'][0]",
    ]


def test_garbage_in_a_cycle_is_named_by_its_attribute(suite: Suite) -> None:
    suite.module(
        "class Trainer:\n    def __init__(self):\n        self.hooks = [self]\n"
        "        self.model = marked()\nTrainer()"
    )
    assert suite.where() == ["reference cycle through Trainer.hooks"]
    gc.collect()
    assert suite.where() == []


def test_a_submodule_that_outlives_its_model_in_a_cycle_is_named(suite: Suite) -> None:
    suite.module(
        "class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.encoder = torch.nn.Linear(2, 2, bias=False, dtype=MARK)\n"
        "        self.myself = [self]\nENCODER = Net().encoder"
    )
    assert suite.where() == ["tests/test_x.py: module global ENCODER.weight"]
    gc.collect()


def test_what_only_a_library_holds_is_said_to_be_so(suite: Suite) -> None:
    capsule = marked().__dlpack__()
    assert suite.where() == ["no Python object (probably a library or an autograd graph)"]
    del capsule


def test_known_storages_are_left_out(suite: Suite) -> None:
    suite.module("CACHE = [marked(), marked()]")
    suite.known = {storage.address for storage in holders.live_storages(on_card)}
    assert len(suite.known) >= 2
    assert suite.where() == []


def test_the_search_leaves_no_reference_behind(suite: Suite) -> None:
    module = suite.module(
        "CACHE = {'a': [marked()]}\nMODEL = torch.nn.Linear(2, 2, dtype=MARK)\n"
        "LOSS = MODEL(marked(2)).exp().sum()"
    )
    witnesses = [
        weakref.ref(each) for each in (module.CACHE["a"][0], module.MODEL.weight, module.LOSS)
    ]
    assert suite.held()
    del module.CACHE, module.MODEL, module.LOSS
    assert [witness() for witness in witnesses] == [None, None, None]
    assert suite.held() == []


def test_the_search_leaves_no_reference_in_running_functions(suite: Suite) -> None:
    module = suite.module(
        "import weakref\ndef run(call):\n    x = marked()\n    witness = weakref.ref(x)\n"
        "    call()\n    x = None\n    return witness()"
    )
    assert module.run(suite.held) is None


def test_variables_that_the_program_looked_at_itself_stay(suite: Suite) -> None:
    module = suite.module(
        "def run(call):\n    x = marked()\n    mine = locals()\n    call()\n    return mine"
    )
    assert "x" in module.run(suite.held)


def test_a_copy_of_a_modules_globals_is_called_so(suite: Suite) -> None:
    copy = dict(vars(suite.module("")))  # as doctest runs examples in
    copy["x"] = copy["marked"]()
    assert suite.where() == ["tests/test_x.py: module global x (in a copy of the module's globals)"]


def test_a_module_that_was_imported_anew_is_no_copy(suite: Suite) -> None:
    first = suite.module("CACHE = marked()")
    spec = importlib.util.spec_from_file_location("test_x", first.__file__)
    assert spec is not None
    sys.modules["test_x"] = importlib.util.module_from_spec(spec)
    assert suite.where() == ["tests/test_x.py: module global CACHE"]


def test_frozen_objects_are_found(suite: Suite) -> None:
    suite.module("CACHE = {'a': [marked()]}")
    gc.freeze()
    assert suite.where() == ["tests/test_x.py: module global CACHE['a'][0]"]


def test_the_search_freezes_no_garbage(suite: Suite) -> None:
    suite.module(
        "class Trainer:\n    def __init__(self):\n        self.me, self.model = self, marked()\n"
        "Trainer()"
    )
    gc.freeze()
    assert suite.where() == ["reference cycle through Trainer.me"]
    gc.collect()
    assert suite.where() == []


def test_a_machine_that_is_busy_elsewhere_costs_no_leak_its_holder(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = SimpleNamespace(monotonic=itertools.count(0, 60).__next__, thread_time=time.thread_time)
    monkeypatch.setattr(holders, "clock", watch)
    suite.module("CACHE = {'a': [marked()]}")
    assert suite.where() == ["tests/test_x.py: module global CACHE['a'][0]"]


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("CACHE = [[marked()]]", "unknown holder (the search was cut)"),
        (
            (
                "class Net(torch.nn.Module):\n    pass\nclass Kept:\n    pass\n"
                "KEPT = Kept()\nKEPT.net = Net()\nKEPT.net.weight = torch.nn.Parameter(marked())"
            ),
            "unknown holder (the search was cut) above Net.weight",
        ),
    ],
)
def test_a_search_that_was_cut_says_so(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, source: str, where: str
) -> None:
    monkeypatch.setattr(holders, "_MAX_CPU_SECONDS", 0.0)
    suite.module(source)
    assert suite.where() == [where]


def test_a_graph_that_was_not_walked_to_its_end_says_so(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_heap, "_MAX_LINKS", 0)
    module = suite.module("LEAF = torch.ones(2, dtype=MARK, requires_grad=True)\nKEPT = LEAF * 2")
    capsule = marked().__dlpack__()
    assert "unknown holder (the search was cut)" in suite.where()
    del capsule, module


def test_the_collector_is_left_as_it_was(suite: Suite) -> None:
    assert not gc.isenabled()
    suite.held()
    assert not gc.isenabled()
    gc.enable()
    suite.held()
    assert gc.isenabled()


def test_lazy_proxies_are_not_woken(suite: Suite) -> None:
    suite.module(
        """
        def wake(*_):
            raise AssertionError("woken")
        class Meta(type):
            __hash__ = __eq__ = __instancecheck__ = __subclasscheck__ = wake
        class Proxy(metaclass=Meta):
            __slots__ = ("cache",)
            __class__ = __dict__ = property(wake)
            __getattr__ = __hash__ = __eq__ = __len__ = __iter__ = __bool__ = __repr__ = wake
        PROXY = Proxy()
        PROXY.cache = [marked()]
        class Mapped(dict):
            __getattribute__ = __getitem__ = items = keys = __iter__ = __len__ = __contains__ = wake
        MAPPED = Mapped(a=marked())
        """
    )
    assert sorted(suite.where()) == [
        "tests/test_x.py: module global MAPPED['a']",
        "tests/test_x.py: module global PROXY.cache[0]",
    ]


def test_user_tensors_do_not_notice_that_they_are_looked_at(suite: Suite) -> None:
    module = suite.module(
        """
        class Traced(torch.Tensor):
            calls = []
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                cls.calls.append(function)
                return super().__torch_function__(function, types, args, kwargs or {})
        CACHE = [marked().as_subclass(Traced)]
        """
    )
    module.Traced.calls.clear()
    assert suite.where() == ["tests/test_x.py: module global CACHE[0]"]
    assert module.Traced.calls == []


def test_tensors_without_memory_are_no_storages(suite: Suite) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = marked(3)
    tensors = [fake, torch.zeros(3, dtype=MARK, device="meta"), marked(0), marked(3).to_sparse()]
    assert holders.find_holders(lambda each: any(each is one for one in tensors)) == []


def test_a_predicate_that_fails_leaves_the_tensor_out(suite: Suite) -> None:
    def failing(tensor: torch.Tensor) -> bool:
        raise RuntimeError("no device")

    suite.module("CACHE = marked()")
    assert holders.live_storages(failing) == []


def test_without_torch_there_is_nothing_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    assert holders.live_storages(on_card) == []
