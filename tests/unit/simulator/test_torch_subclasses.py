"""Tensors that wrap others, with operations of their own: what they hold is on the card."""

from __future__ import annotations

from card_process import MIB, on_card, on_two_cards


def wrapper():
    """Return a kind of tensor that wraps one, as quantized weights and optimizer states do."""
    import torch
    from torch.utils._python_dispatch import return_and_correct_aliasing

    aten = torch.ops.aten

    class Wrapper(torch.Tensor):
        places = ()

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, dtype=inner.dtype, device=inner.device
            )

        def __init__(self, inner):
            self.inner = inner

        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if isinstance(args[0], cls):
                cls.places = *cls.places, args[0].inner.device.type
            if func in {aten.detach.default, aten.clone.default, aten._to_copy.default}:
                made = cls(func(args[0].inner, **kwargs))
                return return_and_correct_aliasing(func, args, kwargs, made)
            plain = [each.inner if isinstance(each, cls) else each for each in args]
            if func is aten.copy_.default:
                func(*plain)
                return args[0]
            return func(*plain, **kwargs)

    return Wrapper


@on_card
def test_a_wrapper_is_where_it_was_made_and_goes_where_it_is_sent():
    import torch

    kind = wrapper()
    wrapped = kind(torch.ones(MIB, dtype=torch.uint8, device="cuda"))
    copies = {
        "cuda:0": [wrapped, wrapped.detach(), wrapped.clone(), wrapped.to("cuda")],
        "cpu": [wrapped.cpu(), wrapped.to("cpu"), kind(torch.ones(3))],
    }
    copies["cuda:0"] += [copies["cpu"][0].cuda(), copies["cpu"][1].to("cuda:0")]
    for place, made in copies.items():
        for each in made:
            assert type(each) is kind
            assert str(each.device) == str(each.inner.device) == place
            assert each.is_cuda == each.inner.is_cuda == (place == "cuda:0")
    assert (wrapped + 1).device == wrapped.device
    wrapped.copy_(torch.zeros(MIB, dtype=torch.uint8, device="cuda"))
    assert wrapped.inner.sum() == 0


@on_card
def test_only_what_a_wrapper_holds_costs_memory():
    import torch

    kind = wrapper()
    sent = kind(torch.ones(3 * MIB, dtype=torch.uint8)).to("cuda")
    assert torch.cuda.memory_allocated() == 3 * MIB
    parameter = torch.nn.Parameter(sent, requires_grad=False)
    assert torch.cuda.memory_allocated() == 3 * MIB
    assert parameter.is_cuda
    half = sent.to(torch.float16)
    assert half.is_cuda
    assert torch.cuda.memory_allocated() == 9 * MIB
    del half, parameter, sent
    assert torch.cuda.memory_allocated() == 0


@on_card
def test_the_code_of_a_wrapper_sees_the_card():
    import torch

    kind = wrapper()
    wrapped = kind(torch.ones(4, device="cuda"))
    made = wrapped * 2
    assert made.is_cuda
    assert set(kind.places) == {"cuda"}


@on_card
def test_jagged_and_masked_tensors_are_on_the_card():
    import warnings

    import torch

    nested = torch.nested.nested_tensor(
        [torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged, device="cuda"
    )
    assert nested.is_cuda
    assert nested.values().is_cuda
    assert torch.nn.Linear(4, 3).cuda()(nested).is_cuda
    assert not nested.cpu().values().is_cuda
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that they are prototypes
        chosen = torch.tensor([True, False, True], device="cuda")
        masked = torch.masked.masked_tensor(torch.ones(3, device="cuda"), chosen)
        assert (masked + masked).is_cuda


@on_card
def test_a_distributed_tensor_is_where_its_part_is():
    import os
    import warnings

    import torch

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    warnings.simplefilter("ignore")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cuda", (1,))
    part = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    for made in (part, part + 1, part @ part):
        assert isinstance(made, DTensor)
        assert made.is_cuda
        assert made.to_local().is_cuda
    assert not part.cpu().to_local().is_cuda
    assert part.cpu().cuda().to_local().is_cuda
    model = torch.nn.Linear(4, 4).cuda()
    fully_shard(model)
    images = torch.ones(2, 4, device=next(model.parameters()).device)
    model(images).sum().backward()
    assert next(model.parameters()).grad.is_cuda
    torch.distributed.destroy_process_group()


@on_two_cards
def test_a_wrapper_can_be_on_another_card():
    import torch

    kind = wrapper()
    wrapped = kind(torch.ones(4, device="cuda:1"))
    assert wrapped.device == torch.device("cuda:1")
    assert wrapped.to("cuda:0").inner.device == torch.device("cuda:0")
