"""The binding that encrypts, against vectors of Project Wycheproof."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag

from pytest_gpumem.archive import sealing

VECTORS = json.loads(Path(__file__).with_name("wycheproof.json").read_text())


@pytest.mark.parametrize(
    ("name", "suite"),
    [
        ("aes_gcm", sealing.AES_256_GCM),
        ("chacha20_poly1305", sealing.CHACHA20_POLY1305),
    ],
)
def test_the_ciphers_take_and_refuse_what_they_must(name, suite):
    refused = 0
    for number, result, *texts in VECTORS[name]:
        key, nonce, data, message, ciphertext, tag = map(bytes.fromhex, texts)
        aead = sealing._aead(suite, key)
        out = bytearray(len(message))
        if result == "valid":
            assert aead.encrypt(nonce, message, data) == ciphertext + tag, number
            assert aead.decrypt_into(nonce, ciphertext + tag, data, out) == len(message)
            assert out == message, number
        else:
            refused += 1
            with pytest.raises(InvalidTag):
                aead.decrypt_into(nonce, ciphertext + tag, data, out)
    assert refused > 20


def test_keys_are_derived_as_they_must_be():
    for number, _, secret, salt, purpose, size, wanted in VECTORS["hkdf_sha512"]:
        found = sealing.derive(*map(bytes.fromhex, (secret, salt, purpose)), size)
        assert found.hex() == wanted, number
