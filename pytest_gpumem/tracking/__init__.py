"""What a test did to the memory: usage, leftovers, holders, and giving memory back."""
