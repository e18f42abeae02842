"""Operations of torch that are made to fail, as on a real card; tried on the compiled one."""

from __future__ import annotations

from card_process import on_compiled_cards


@on_compiled_cards
def test_each_operation_that_allocates_can_be_made_to_fail_before_it_does_anything():
    import torch

    from pytest_gpumem.simulator.exhaustion import Refusing
    from pytest_gpumem.simulator.operations import Operations

    def step(watched):
        model = torch.nn.Linear(64, 64, bias=False).cuda()
        target = torch.zeros(8, device="cuda:1")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with watched:
            loss = model(torch.ones(8, 64, device="cuda")).exp().sum()
            loss.backward()
            optimizer.step()
            target.add_(torch.ones(8, device="cuda:1"))
        return target

    def taken():
        stats = [torch.cuda.memory_stats(device) for device in (0, 1)]
        return sum(each["allocated_bytes.all.allocated"] for each in stats)

    step(Operations(Refusing()))  # what is allocated once
    plain = Operations(Refusing())
    step(plain)
    again, counted = Operations(Refusing()), Refusing()
    again = Operations(counted)
    step(again)
    assert again.seen == plain.seen
    assert counted.counted == len(again.seen) > 8
    assert {each.device for each in again.seen} == {0, 1}
    backward = [each.name for each in again.seen if "aten.mm" in each.name]
    assert backward, "what autograd's threads allocate is seen"
    for at, foreseen in enumerate(again.seen, 1):
        refusing = Refusing(at)
        before = taken()
        try:
            step(Operations(refusing, foreseen))
        except torch.OutOfMemoryError as error:
            assert f"GPU {foreseen.device} was made full" in str(error)  # noqa: PT017
        else:
            raise AssertionError(foreseen)
        outside = 64 * 64 * 4 + 512  # the model and the target
        sizes = sum(each.size for each in again.seen[: at - 1])
        assert taken() - before == outside + sizes, foreseen


@on_compiled_cards
def test_what_is_refused_unforeseen_and_what_is_not_counted():
    import torch

    from pytest_gpumem.simulator.exhaustion import Refusing
    from pytest_gpumem.simulator.operations import Operation, Operations

    def fails(size):
        try:
            torch.empty(size, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            return True
        return False

    refusing = Refusing(2)
    # Another operation than was seen at this place: it has run, and is refused all the same.
    with Operations(refusing, Operation(1, "aten.other.default", 0, 4096)):
        with refusing.paused():
            assert not fails(4096)
        assert [fails(size) for size in (4096, 4096, 8192, 2048, 4096)] == [
            False, True, True, False, True,
        ]  # fmt: skip
    assert torch.cuda.memory_allocated() == 0
    assert not fails(8192)
