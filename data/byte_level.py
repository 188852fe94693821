"""Spell bytes as printable characters, one each, as byte-level vocabularies do (Radford et al. 2019, "GPT-2").

Bytes that print in Latin-1 are themselves; the others are the characters from U+0100 on, in order.
"""

from __future__ import annotations

PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
HIDDEN = tuple(byte for byte in range(256) if byte not in PRINTED)
CHARACTERS = {
    **{byte: chr(byte) for byte in PRINTED},
    **{byte: chr(0x100 + place) for place, byte in enumerate(HIDDEN)},
}
BYTES = {character: byte for byte, character in CHARACTERS.items()}


def spell_bytes(content: bytes) -> str:
    """Return the spelling of bytes."""
    return "".join(CHARACTERS[byte] for byte in content)


def read_spelling(text: str) -> bytes:
    """Return the bytes of a spelling; raises KeyError for a character that spells none."""
    return bytes(BYTES[character] for character in text)
