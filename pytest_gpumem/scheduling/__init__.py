"""Which test runs where and when."""
