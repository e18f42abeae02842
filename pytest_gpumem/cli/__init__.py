"""The command ``gpumem``: a file for each of its commands."""
