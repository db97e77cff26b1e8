"""What a tokenizer loses of a text, in bits: capital letters, line breaks, characters it has no piece for.

A model is scored on tokens, a compressor on bytes. Where decode(encode(text)) is another text, tokens alone do not
determine the text, so the edits that turn the decoded text into the original are charged, compressed.
"""

from __future__ import annotations

import lzma

AGREE_CHARACTERS = 4  # where so many characters are equal again, an edit ends
SHORT_EDIT, LONGEST_EDIT = 24, 256


def lost_bits(text: str, decoded: str) -> int:
    """Bits that turn `decoded` into `text`, at most those of the compressed text itself; 0 where they are equal."""
    if text == decoded:
        return 0
    return 8 * min(_compressed(_edits(text, decoded)), _compressed(text.encode("utf-8")))


def _compressed(raw: bytes) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(1 << 12, 1 << len(raw).bit_length())}]
    return len(lzma.compress(raw, format=lzma.FORMAT_RAW, filters=filters))


def _edits(text: str, decoded: str) -> bytes:
    """Edit script, repeated: count of equal characters, count to delete from `decoded`, bytes to insert, and these."""
    script = bytearray()
    here = there = copied = 0
    while here < len(text) or there < len(decoded):
        if here < len(text) and there < len(decoded) and text[here] == decoded[there]:
            here, there, copied = here + 1, there + 1, copied + 1
            continue
        inserted, deleted = _next_agreement(text[here : here + LONGEST_EDIT], decoded[there : there + LONGEST_EDIT])
        spelled = text[here : here + inserted].encode("utf-8", "surrogatepass")
        script += _varint(copied) + _varint(deleted) + _varint(len(spelled)) + spelled
        here, there, copied = here + inserted, there + deleted, 0
    return bytes(script)


def _next_agreement(text: str, decoded: str) -> tuple[int, int]:
    """How many characters of each to pass over until they agree again; all where they do not."""
    if text[1 : 1 + AGREE_CHARACTERS] == decoded[1 : 1 + AGREE_CHARACTERS]:  # another letter, as most edits are
        return min(1, len(text)), min(1, len(decoded))
    if max(len(text), len(decoded)) > SHORT_EDIT:  # most edits are short
        best = _next_agreement(text[:SHORT_EDIT], decoded[:SHORT_EDIT])
        if best != (len(text[:SHORT_EDIT]), len(decoded[:SHORT_EDIT])):
            return best
    places: dict[str, int] = {}
    for at in range(len(decoded) - AGREE_CHARACTERS + 1):
        places.setdefault(decoded[at : at + AGREE_CHARACTERS], at)
    best = (len(text), len(decoded))
    for at in range(len(text) - AGREE_CHARACTERS + 1):
        if at >= sum(best):
            break
        found = places.get(text[at : at + AGREE_CHARACTERS])
        if found is not None and at + found < sum(best):
            best = (at, found)
    return best


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    spelled = bytearray()
    while value > 0x7F:
        spelled.append(value & 0x7F | 0x80)
        value >>= 7
    spelled.append(value)
    return bytes(spelled)
