"""Where model state goes: compressed, encrypted archives that come back bit for bit.

``tree`` takes a state apart, ``memory`` makes one stream of its bytes, ``codec`` makes that
smaller, ``sealing`` encrypts it, ``file`` is the format, ``disk`` makes it last, ``store`` keeps
many of them, ``keys`` finds the key, ``consolidator`` frees the VRAM.
"""
