"""GPU memory hygiene for pytest: every test's VRAM, what it left behind, and who holds it."""

from __future__ import annotations

__version__ = "0.1.0"
