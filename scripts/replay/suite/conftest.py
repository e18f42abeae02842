"""The suite's only conftest: what a team that has adopted the plugin would write.

``--gpumem=on`` is the switch. Without it the fixtures do what they did before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lab
import pytest


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> Any:
    """Return the plugin's pool of models; None without the plugin's help."""
    if request.config.getoption("gpumem", None) != "on":
        return None
    return request.getfixturevalue("model_pool")


@pytest.fixture(scope="session", autouse=True)
def models(pool: Any) -> Iterator[None]:
    """Keep models in the pool, which lets go of them under pressure, and not in a dict."""
    if pool is None:
        yield
        return
    plain = lab.load_model
    lab.load_model = lambda name, mib: pool.get(name, lambda: lab.Encoder(mib, "cpu"))
    yield
    lab.load_model = plain


@pytest.fixture
def device(request: pytest.FixtureRequest, pool: Any) -> str:
    """Return where to work: on the card, or where the plugin says."""
    return "cuda" if pool is None else str(request.getfixturevalue("gpu_device"))


@pytest.fixture
def create(pool: Any) -> Callable[[str], lab.Agent]:
    """Return what makes an agent of a class; from the pool it gets the model that it needs."""

    def create(kind: str) -> lab.Agent:
        agent: lab.Agent = getattr(lab, kind)()
        if pool is not None:
            name, mib = lab.AGENTS_MODEL
            pool.attach(agent, "_embedding_model", name, lambda: lab.Encoder(mib, "cpu"))
        return agent

    return create


@pytest.fixture
def registered(
    request: pytest.FixtureRequest, create: Callable[[str], lab.Agent], workspace: lab.Workspace
) -> lab.Agent:
    """Return an agent that is in the workspace."""
    agent = create(request.param)
    workspace.register(agent)
    return agent


@pytest.fixture(scope="module")
def workspace(request: pytest.FixtureRequest) -> lab.Workspace:
    """Return the workspace of a module, of its ``WORKSPACE_MIB``."""
    return lab.Workspace(request.module.WORKSPACE_MIB)


@pytest.fixture(scope="module")
def encoder(request: pytest.FixtureRequest) -> lab.Encoder:
    """Return a model of the module's ``MODEL_MIB`` that must be on the card."""
    return lab.Encoder(request.module.MODEL_MIB)


@pytest.fixture(scope="module")
def sentence_transformer() -> Any:
    """Return the real all-MiniLM-L6-v2."""
    return lab.load_sentence_transformer()
