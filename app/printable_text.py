"""Text that clients and files contain, for a terminal."""


def printable(text: str, also: str = "") -> str:
    r"""Escape characters that are not printable as repr does, such as \x1b: a terminal obeys them, or reverses the text.

    Args:
        text: A file name, label or error, for example.
        also: Characters that are not escaped either, such as line ends.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in also else character.encode("unicode_escape").decode()
        for character in text
    )
