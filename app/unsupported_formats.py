"""Descriptions of files that are not images of a supported format, by their first bytes."""

import re

from dinat.app.image_file import JPEG, PNG

_MAGIC = {
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive or an office document",
    b"\x1f\x8b": "compressed with gzip: set Content-Encoding: gzip",
    b"8BPS": "a Photoshop document",
    b"\x00\x00\x00\x0cJXL": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cjP": "JPEG 2000",
    b"\x00\x00\x01\x00": "an icon",
    **dict.fromkeys((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"), "an unsupported kind of TIFF"),
    b"RIFF": "a RIFF file other than WebP: audio or video",
    b"\x1aE\xdf\xa3": "a video (Matroska or WebM)",
    b"OggS": "audio or video (Ogg)",
    b"ID3": "audio (MP3)",
    b"\x7fELF": "an executable",
    b"MZ": "an executable",
    b"\x93NUMPY": "a NumPy array",
    PNG + b"\0\0\0\4CgBI": "a PNG optimized for iOS (CgBI), which only Apple's decoders read: convert it to a standard PNG",
    PNG: "a PNG with a broken header",
    JPEG: "a JPEG with a broken header",
    b"GIF8": "a GIF with a broken header",
    b"BM": "a BMP with a broken header",
}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def container_format(data: bytes) -> str | None:
    """Return Pillow's name of the format in an ISO base media file that contains images; None for other data."""
    if data[4:8] != b"ftyp":
        return None
    return "HEIF" if data[8:12] in _HEIF_BRANDS else "AVIF" if data[8:11] == b"avi" else None


def describe_format(data: bytes) -> str:
    """Describe what data that is not a supported image appears to be: "the image is ..."."""
    head = data[:512].lstrip().lower()
    if data[4:8] == b"ftyp":
        if container_format(data) == "HEIF":
            return "the image is HEIC, which requires the extra heif: pip install 'dinat-serve[heif]'"
        if container_format(data) == "AVIF":
            return "the image is AVIF, which this version of Pillow does not support"
        return "the image is a video (MP4)"
    for magic, description in _MAGIC.items():
        if data.startswith(magic):
            return f"the image is {description}"
    if head.startswith((b"<!doctype html", b"<html")):
        return "the image is a web page (HTML), often an error page that was saved as an image"
    if head.startswith((b"<svg", b"<?xml")) and b"<svg" in data[:4096].lower():
        return "the image is SVG, a vector format: convert it to PNG"
    if head.startswith((b"{", b"[")):
        return "the image is JSON"
    if head.startswith(b"<"):
        return "the image is XML"
    if head.startswith(b"data:") or re.fullmatch(rb"[A-Za-z0-9+/=_\r\n-]{64,}", data[:512]):
        return 'the image is base64: send it in JSON, as {"image": ...}'
    if head and all(byte >= 32 or byte in b"\t\n\r" for byte in head):
        return "the image is text"
    return "the image is in an unknown format"
