"""Where model state goes: compressed, encrypted archives that come back bit for bit."""
