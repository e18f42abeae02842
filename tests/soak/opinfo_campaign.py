"""Compare every operator of torch's own test database on the simulated card with the CPU.

Run by hand, with ``expecttest`` installed: ``python tests/soak/opinfo_campaign.py [name ...]``.
Prints the operators that differ and a line with the figure. With ``GPUMEM_TEST_COMPILED=1`` it is
the compiled card.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
import warnings

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_map

from pytest_gpumem.simulator import Simulation
from pytest_gpumem.simulator.torch_face import compilation

SAMPLES = 4
NOT_COMPARED = (
    "rand",
    "empty",
    "dropout",
    "bernoulli",
    "normal",
    "multinomial",
    "svd",
    "eig",
    "qr",
)


def to_card(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to("cuda").requires_grad_(value.requires_grad)


def tensors(tree):
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def forward(op, sample, device):
    """Return the result and the inputs of one sample; None when the CPU cannot run it either."""
    inputs = (sample.input, sample.args, sample.kwargs)
    if device == "cuda":
        inputs = tree_map(to_card, inputs)
        if "device" in inputs[2]:
            inputs[2]["device"] = "cuda"
    else:
        inputs = tree_map(copy.deepcopy, inputs)
    first, args, kwargs = inputs
    return op(first, *args, **kwargs), inputs


def gradients(result, inputs):
    roots = [out for out in tensors(result) if out.requires_grad]
    leaves = [leaf for leaf in tensors(inputs) if leaf.requires_grad]
    if not roots or not leaves:
        return []
    total = sum(root.abs().sum() for root in roots)
    return [g for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None]


def difference(op, dtype, sample):
    """Return how the card's answer differs, an empty text when it does not."""
    backward = dtype in op.supported_backward_dtypes("cpu") and op.supports_autograd
    try:
        torch.manual_seed(0)
        expected, inputs = forward(op, sample, "cpu")
        wanted = gradients(expected, inputs) if backward else []
    except Exception:
        return ""
    torch.manual_seed(0)
    actual, inputs = forward(op, sample, "cuda")
    found = gradients(actual, inputs) if backward else []
    for name, left, right in (("value", expected, actual), ("gradient", wanted, found)):
        for host, card in itertools.zip_longest(tensors(left), tensors(right)):
            if not card.is_cuda and host.dim():
                return f"{name} is on {card.device}"
            if any(part in op.name for part in NOT_COMPARED):
                continue
            torch.testing.assert_close(card.cpu(), host, equal_nan=True)
    return ""


def main() -> None:
    library = compilation.library() if "GPUMEM_TEST_COMPILED" in os.environ else None
    simulation = Simulation.start([32 * 2**30], 384 * 2**20, library=library)
    simulation.install()
    warnings.simplefilter("ignore")
    good, bad = 0, []
    for op in op_db:
        if sys.argv[1:] and op.name not in sys.argv[1:]:
            continue
        dtypes = op.supported_dtypes("cpu")
        dtype = torch.float32 if torch.float32 in dtypes else next(iter(dtypes), None)
        if dtype is None:
            continue
        try:
            samples = op.sample_inputs("cpu", dtype, requires_grad=op.supports_autograd)
            found = [difference(op, dtype, sample) for sample in itertools.islice(samples, SAMPLES)]
            problem = next(filter(None, found), "")
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
        if problem:
            bad.append(op.name)
            sys.stdout.write(f"{op.name} {op.variant_test_name} {problem}\n")
        else:
            good += 1
    sys.stdout.write(f"{good} of {good + len(bad)} operators agree\n")
    simulation.close()


if __name__ == "__main__":
    main()
