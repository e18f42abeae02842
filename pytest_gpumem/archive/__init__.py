"""Where model state goes: compressed, encrypted archives that come back bit for bit.

``tree`` takes a state apart, ``memory`` makes one stream of its bytes, ``codec`` makes that
smaller, ``sealing`` encrypts it, ``file`` is the format, ``disk`` makes it last. ``store`` keeps
many of them: its secret in a ``vault`` that ``keys`` open, ``states`` and a ``catalogue`` of
entries, of which ``retention`` says what decays, ``checkup`` what is wrong, and ``anchors`` whether
all was put back to an older state. ``consolidator`` frees the VRAM.
"""
