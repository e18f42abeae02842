"""What an allocator says of one device."""

from __future__ import annotations

from pytest_gpumem.tuples import NamedTuple


class AllocatorReading(NamedTuple):
    """One device's allocator in this process; sizes in bytes.

    The counters run since the process began, or since the suite reset them.
    """

    allocated: int
    allocated_peak: int
    reserved: int
    reserved_peak: int
    retries: int
    ooms: int
    requested: int | None = None
    """What tensors asked for, before the allocator rounded it up to a block that it had; None
    where it does not count that."""
    requested_peak: int | None = None

    @property
    def asked(self) -> tuple[int, int]:
        """What was asked for now and at its peak, or what was allocated where only that is known.

        Of a cached block up to 1 MiB more than what was asked for is given out, so the same test
        allocates more or less after other tests.
        """
        if self.requested is None or self.requested_peak is None:
            return self.allocated, self.allocated_peak
        return self.requested, self.requested_peak

    def flat(self) -> AllocatorReading:
        """Return what it says once its peaks were set back."""
        return self._replace(
            allocated_peak=self.allocated,
            reserved_peak=self.reserved,
            requested_peak=self.requested,
        )
