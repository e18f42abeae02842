"""Where a task runs: device choice, models that several tests share, the way back to the CPU."""
