"""What ``torch.multiprocessing`` sends of a tensor on the card, and what comes out of it."""

from __future__ import annotations

import gc

import pytest
from card_process import MIB, on_card


@on_card
def test_a_sent_tensor_is_the_senders_memory():
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    tensor = torch.arange(2 * MIB, dtype=torch.float32, device="cuda")
    before = torch.cuda.memory_allocated()
    rebuild, sent = reduce_tensor(tensor[3:5])
    received = rebuild(*sent)
    again = rebuild(*reduce_tensor(tensor)[1])
    assert received.is_cuda
    assert received.tolist() == [3, 4]
    assert torch.cuda.memory_allocated() == before  # no tensor is charged for it twice
    received += 10
    assert tensor[:6].tolist() == again[:6].tolist() == [0, 1, 2, 13, 14, 5]
    assert (received + 1).untyped_storage().nbytes() == 8  # what is made of it is charged
    del received, again
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert tensor.sum().is_cuda


@on_card
def test_parameters_and_empty_tensors_are_sent():
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    parameter = torch.nn.Parameter(torch.ones(3, device="cuda"))
    rebuild, sent = reduce_tensor(parameter)
    received = rebuild(*sent)
    assert type(received) is torch.nn.Parameter
    assert received.is_cuda
    assert received.requires_grad
    rebuild, sent = reduce_tensor(torch.empty(0, 4, device="cuda"))
    assert rebuild(*sent).shape == (0, 4)


@on_card
def test_what_is_sent_arrives_though_its_sender_has_deleted_it():
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    tensor = torch.full((3,), 7.0, device="cuda")
    rebuild, sent = reduce_tensor(tensor)
    del tensor
    gc.collect()
    received = rebuild(*sent)
    assert received.is_cuda
    assert received.tolist() == [7, 7, 7]
    with pytest.raises(RuntimeError, match="invalid resource handle"):  # each is received once
        torch.UntypedStorage._release_ipc_counter_cuda(sent[11], 0)


@on_card
def test_an_event_is_sent_if_it_is_made_to():
    import torch
    from torch.multiprocessing.reductions import reduce_event

    event = torch.cuda.Event(interprocess=True)
    event.record()
    rebuild, sent = reduce_event(event)
    received = rebuild(*sent)
    received.wait()
    assert received.query()
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        torch.cuda.Event().ipc_handle()
