import pytest

from dinat.app.plurals import plural


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, "image"), "1 image"),
        ((0, "image"), "0 images"),
        ((1234, "image"), "1,234 images"),
        ((1, "class has", "classes have"), "1 class has"),
        ((2, "class has", "classes have"), "2 classes have"),
    ],
)
def test_numbers_agree_with_what_they_count(arguments: tuple[int, str], expected: str) -> None:
    assert plural(*arguments) == expected
