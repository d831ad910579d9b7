"""Images that occur several times in labelled data, found by the bytes of their files."""

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

from dinat.app.evaluation.labelled_images import LabelledImage
from dinat.app.image_paths import path_text
from dinat.app.plurals import plural


def digest(data: bytes) -> str:
    """Hash the bytes of a file, 128 bits."""
    return blake2b(data, digest_size=16).hexdigest()


def describe_duplicates(images: Iterable[LabelledImage], digests: Mapping[Path, str]) -> list[str]:
    """Describe images that have several labels, and images that occur several times with one label.

    Args:
        images: The images.
        digests: Hash of each file that could be read.

    Returns:
        A sentence for each of the two kinds, if there are any.
    """
    by_digest: dict[str, list[LabelledImage]] = {}
    for image in images:
        if image.path in digests:
            by_digest.setdefault(digests[image.path], []).append(image)
    repeated = [group for group in by_digest.values() if len(group) > 1]
    ambiguous = [group for group in repeated if len({image.label for image in group}) > 1]
    described = []
    if ambiguous:
        first = ambiguous[0][0]
        other = next(image for image in ambiguous[0] if image.label != first.label)
        described.append(
            f"{plural(len(ambiguous), 'image has', 'images have')} several labels, such as {path_text(first.path)} "
            f"({first.label}) and {_name(other, first)} ({other.label})"
        )
    if len(repeated) > len(ambiguous):
        first, other, *_ = next(group for group in repeated if group not in ambiguous)
        described.append(
            f"{plural(len(repeated) - len(ambiguous), 'image occurs', 'images occur')} more than once, such as "
            f"{path_text(first.path)} and {_name(other, first)}"
        )
    return described


def describe_overlap(
    train: Iterable[LabelledImage], validation: Iterable[LabelledImage], digests: Mapping[Path, str]
) -> str | None:
    """Describe the validation images that are training images too; None if there are none."""
    trained = {digests[image.path]: image for image in train if image.path in digests}
    both = [image for image in validation if digests.get(image.path) in trained]
    if not both:
        return None
    other = trained[digests[both[0].path]]
    return (
        f"{plural(len(both), 'validation image is also a training image', 'validation images are also training images')}, such "
        f"as {path_text(both[0].path)} and {_name(other, both[0])}: the validation accuracy is too high"
    )


def _name(image: LabelledImage, other: LabelledImage) -> str:
    return "itself" if image.path == other.path else path_text(image.path)
