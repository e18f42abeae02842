"""What every simulated card says of itself, to torch and to NVML alike."""

from __future__ import annotations

NAME = "Simulated CUDA card"
CAPABILITY = (8, 0)
"""Compute capability; with it go the figures of an A100, the first card that had it."""
ARCHITECTURE = f"sm_{CAPABILITY[0]}{CAPABILITY[1]}"
PROCESSORS = 108
THREADS_PER_BLOCK = 1024
THREADS_PER_PROCESSOR = 2048
WARP = 32
REGISTERS_PER_PROCESSOR = 65536
SHARED_PER_BLOCK = 48 * 1024
SHARED_PER_BLOCK_OPTIN = 163 * 1024
SHARED_PER_PROCESSOR = 164 * 1024
L2_CACHE = 40 * 2**20
CLOCK_KHZ = 1_410_000
MEMORY_CLOCK_KHZ = 1_215_000
MEMORY_BUS_BITS = 5120

CUDA = "13.0"
"""The newest version that the driver can run, and the one of a torch that was built without."""
CUDNN = 91002
DRIVER = "580.0"
NVML = f"13.{DRIVER}"


def cuda_number(version: str) -> int:
    """Return ``13.0`` as CUDA counts versions: 13000."""
    major, minor = version.split(".")[:2]
    return int(major) * 1000 + int(minor) * 10


def pci_bus(index: int) -> int:
    """Return the PCI bus of the card with this number; domain and device are 0."""
    return index + 1
