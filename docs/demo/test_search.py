"""Semantic search with all-MiniLM-L6-v2 on a GPU. Two of these tests fail on purpose."""

import torch

SENTENCES = [
    "A cat sleeps on the sofa.",
    "A kitten naps on the couch.",
    "The train to Lisbon leaves at noon.",
]
SEEN = []


def test_encode(model):
    cat, kitten, train = model.encode(SENTENCES, convert_to_tensor=True)

    assert torch.dot(cat, kitten) > torch.dot(cat, train)


def test_remember_corpus(model):
    # Passes, and leaks: the embeddings outlive the test in a module global.
    SEEN.append(model.encode(SENTENCES * 400, batch_size=400, convert_to_tensor=True))

    assert len(SEEN[0]) == 1200


def test_ranking(model):
    # Fails on purpose; its traceback would keep the index on the card until the run ends.
    torch.manual_seed(0)
    index = torch.randn(100_000, 384, device="cuda")
    query = model.encode("Where is the cat?", convert_to_tensor=True)
    best = (index @ query).argmax()

    assert best == 0, "random vectors do not rank"


def test_all_pairs():
    # Fails on purpose: nobody catches the out-of-memory error.
    total = torch.cuda.get_device_properties(0).total_memory

    torch.empty(total, dtype=torch.uint8, device="cuda")


def test_batch_is_halved_until_it_fits():
    batch = torch.cuda.get_device_properties(0).total_memory
    while True:
        try:
            torch.empty(batch, dtype=torch.uint8, device="cuda")
            break
        except torch.OutOfMemoryError:
            batch //= 2

    assert batch > 0
