"""How much memory cards have that are not in this machine, by the names that people call them."""

from __future__ import annotations

import re

from pytest_gpumem.units import parse_bytes

_MIB = 2**20
MODELS = {
    # What nvidia-smi calls the total, as seen on these cards.
    "T4": 15_360 * _MIB,
    "V100 16GB": 16_384 * _MIB,
    "V100 32GB": 32_768 * _MIB,
    "A10": 23_028 * _MIB,
    "A10G": 23_028 * _MIB,
    "L4": 23_034 * _MIB,
    "L40S": 46_068 * _MIB,
    "A100 40GB": 40_960 * _MIB,
    "A100 80GB": 81_920 * _MIB,
    "H100": 81_559 * _MIB,
    "H100 80GB": 81_559 * _MIB,
    "H200": 143_771 * _MIB,
    "RTX 3090": 24_576 * _MIB,
    "RTX 4090": 24_564 * _MIB,
    # Slices, as nvidia-smi mig -lgip lists them, which shows two decimals of a GiB.
    "A100 40GB 1g.5gb": 4_864 * _MIB,
    "A100 80GB 1g.10gb": 9_728 * _MIB,
    "A100 80GB 2g.20gb": 19_968 * _MIB,
    "A100 80GB 3g.40gb": 40_192 * _MIB,
    "H100 1g.10gb": 9_984 * _MIB,
    "H100 1g.20gb": 20_096 * _MIB,
    "H100 2g.20gb": 20_096 * _MIB,
    "H100 3g.40gb": 40_448 * _MIB,
    "H200 1g.18gb": 16_384 * _MIB,
}
"""Bytes by model."""


def find_model(text: str) -> tuple[str, int]:
    """Return the name and the bytes of the card that ``text`` names, or of one of that size.

    Raises:
        ValueError: in one sentence, when it is neither a size nor one of ``MODELS``.

    """
    wanted = _plain(text)
    for name, size in MODELS.items():
        if _plain(name) == wanted:
            return name, size
    try:
        size = parse_bytes(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is neither a size, such as 18GB, nor one of {', '.join(MODELS)}"
        ) from None
    return text.strip(), size


def _plain(name: str) -> str:
    """Return a name without what people leave out of it, or drivers add."""
    return re.sub(r"nvidia|geforce|tesla|mig|sxm\d|pcie|hbm\de?|[\s_:-]", "", name.lower())
