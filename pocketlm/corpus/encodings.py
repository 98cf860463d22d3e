"""Encodings of text files: UTF-8, or the UTF-16 or UTF-32 that their first bytes show.

Windows programs write UTF-16, with or without a byte order mark. Any other encoding is refused,
because nothing in a file says which one it is.
"""

import codecs

from pocketlm.errors import UserError

SNIFFED_BYTES = 4096  # of a file, which decide its encoding

BYTE_ORDER_MARKS = {  # the mark of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

MIN_UNITS = 2  # of 4 bytes; in a shorter text, zero bytes are characters of UTF-8
MIN_NULS = 4  # fewer of them are characters of a UTF-8 text
MIN_NUL_SHARE = 0.1  # of the units: the spaces of a text that has no other Latin character


def detect_encoding(start: bytes) -> str:
    """Return the name of the encoding of a text that begins with these bytes.

    Without a byte order mark, UTF-16 and UTF-32 are recognised by the zero bytes of their Latin
    characters, all of which are on the same side of a unit of 2 or 4 bytes. Bytes that are UTF-8
    with a character beyond ASCII are UTF-8, whatever NULs there are.

    >>> [detect_encoding("A text".encode(name)) for name in ("utf-8", "utf-16", "utf-16-be")]
    ['utf-8', 'utf-16', 'utf-16-be']
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return encoding
    if 0 not in start or is_wide_utf8(start):
        return "utf-8"
    units = len(start) // 4
    if units < MIN_UNITS:
        return "utf-8"
    first, second, third, fourth = (start[i::4].count(0) for i in range(4))
    if units == fourth and third >= units / 2 > first:
        return "utf-32-le"
    if units == first and second >= units / 2 > fourth:
        return "utf-32-be"
    low, high = first + third, second + fourth
    if max(low, high) >= max(MIN_NULS, MIN_NUL_SHARE * 2 * units) and min(low, high) * 8 < max(
        low, high
    ):
        return "utf-16-le" if high > low else "utf-16-be"
    return "utf-8"


def is_wide_utf8(start: bytes) -> bool:
    """Return whether bytes, which may end inside a character, are UTF-8 and not ASCII."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return not start.isascii()


def decode_text(raw: bytes, name: str) -> str:
    """Return a text without its byte order mark and with line feeds only.

    So the same text gives the same characters, whatever program has saved it. Raises UserError.
    """
    encoding = detect_encoding(raw[:SNIFFED_BYTES])
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(undecodable(name, error.start, error, encoding)) from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def undecodable(name: str, position: int, error: UnicodeDecodeError, encoding: str) -> str:
    """Return the sentence that says which byte of a text is not of its encoding."""
    byte = error.object[error.start]
    return f"{name} is not {encoding.upper()}: byte {position} is 0x{byte:02x}"
