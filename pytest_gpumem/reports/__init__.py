"""How it is shown: one record in, lines out."""
