"""Numbers of things in messages."""


def plural(number: int, singular: str, several: str | None = None) -> str:
    """Return a number and what it counts, such as "1 image" or "1,024 images".

    Args:
        number: The number.
        singular: What one of them is called, also with a verb: "image is".
        several: What several are called; by default the singular with an s.
    """
    return f"{number:,} {singular if number == 1 else several or f'{singular}s'}"
