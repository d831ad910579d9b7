"""Text for rich's console and tables."""

from rich.text import Text

from dinat.app.printable_text import printable


def plain_text(text: str) -> Text:
    """Return text that is printed as it is: rich takes [words] for styles and :names: for emoji."""
    return Text(printable(text))
