"""Text made fit for a terminal: what is not seen, or commands it, is spelt out."""

import unicodedata

# Control and format characters, halves of surrogate pairs, private and unknown code
# points, and the separators of lines that are no line ends everywhere.
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
PICTURES = 0x2400  # where Unicode has pictures of the first control characters


def visible(text: str) -> str:
    """Return text in which each character that is not seen is a picture or a number.

    U+001B becomes its picture, U+241B; U+202E, which turns what follows it round,
    becomes <U+202E>. No line end is left.
    """
    if text.isprintable():
        return text
    return "".join(map(_spelt, text))


def _spelt(letter: str) -> str:
    code = ord(letter)
    if code < 0x20:
        return chr(PICTURES + code)
    if code == 0x7F:
        return chr(PICTURES + 0x21)
    return f"<U+{code:04X}>" if unicodedata.category(letter) in UNSEEN else letter
