"""What a photo says about itself beside its pixels: EXIF, XMP, ICC profile, DPI; read, and made to fit a result.

libvips hands over EXIF blocks as they are, except those of TIFFs, whose entries lie in the file's own directory.
"""

from __future__ import annotations

import json
import re
import struct
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from xml.sax.saxutils import quoteattr

from PIL import Image, TiffImagePlugin

from dreamsr_cli import __version__

RECORD = "urn:dreamsr:1.0/"
"""XMP namespace of the property `madeBy`: one JSON object that says how a photo was made."""
JPEG_BLOCK = 65502
"""Longest XMP packet or EXIF block of a JPEG, bytes."""
_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
TEXT_TAGS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
"""Entries of a TIFF that describe the photo and not the layout of its pixels: ImageDescription, Make, Model, Software,
DateTime, Artist, Copyright."""
SUB_DIRECTORIES = (_EXIF_IFD, _GPS_IFD)
"""Entries that point to a directory of their own."""
_EMPTY_XMP = (
    b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
_BROKEN_EXIF = (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error)  # what Pillow raises on bad blocks


@dataclass(frozen=True)
class Metadata:
    """What goes into a result beside its pixels, normalised by `fit_metadata`."""

    icc: bytes | None
    exif: Image.Exif | None
    xmp: bytes | None
    dpi: tuple[float, float] | None
    """Pixels per inch, across and down."""

    @property
    def density(self) -> tuple[float, float]:
        """Pixels per inch where a format insists on saying some."""
        return self.dpi or (72.0, 72.0)


def read_tiff_directory(path: Path) -> tuple[bytes | None, bool]:
    """EXIF block made of a TIFF's descriptive entries, which libvips leaves out, and whether it is a palette photo."""
    directory, exif = Image.Exif(), Image.Exif()
    try:
        with path.open("rb") as file:
            if file.read(4) == b"II+\0":
                return _read_bigtiff(file)
            file.seek(0)
            directory.load_from_fp(file)
            for tag in TEXT_TAGS + SUB_DIRECTORIES:
                if tag in directory:
                    exif[tag] = directory.get_ifd(tag) if tag in SUB_DIRECTORIES else directory[tag]
            return (exif.tobytes() if len(exif) else None), directory.get(0x0106) == 3
    except _BROKEN_EXIF:
        return None, False


def _read_bigtiff(file: BinaryIO) -> tuple[bytes | None, bool]:
    """As `read_tiff_directory`, of a little-endian BigTIFF, which Pillow's `Exif` does not take."""
    file.seek(0)
    header = file.read(16)

    def load(offset: int, group: int | None = None) -> dict[int, Any]:
        entries = TiffImagePlugin.ImageFileDirectory_v2(header, group=group)
        file.seek(offset)
        entries.load(file)
        return dict(entries)

    directory, exif = load(struct.unpack("<Q", header[8:])[0]), Image.Exif()
    for tag in TEXT_TAGS + SUB_DIRECTORIES:
        if tag in directory:
            exif[tag] = load(directory[tag], tag) if tag in SUB_DIRECTORIES else directory[tag]
    return (exif.tobytes() if len(exif) else None), directory.get(0x0106) == 3


def fit_metadata(
    icc: bytes | None,
    exif: bytes | None,
    xmp: bytes | None,
    dpi: tuple[float, float] | None,
    *,
    width: int,
    height: int,
    grey: bool,
) -> tuple[Metadata, list[str]]:
    """A photo's metadata for an upright result of `width` x `height` pixels, and notes on what had to be left out.

    `grey`: the file's colour channels, which the ICC profile has to match. An EXIF block that can't be parsed goes.
    """
    notes: list[str] = []
    # bytes 16 to 19 of the header (ICC.1:2022, 7.2) name the profile's colour space
    if icc is not None and icc[16:20] != (b"GRAY" if grey else b"RGB "):
        icc = None
        notes.append("its colour profile does not fit the result's channels and was left out")
    upright = _normalise_exif(exif, width, height) if exif else None
    if exif and upright is None:
        notes.append("its EXIF block is damaged and was left out")
    return Metadata(icc, upright, _normalise_xmp(xmp) if xmp else None, dpi), notes


def add_record(kept: Metadata, made_by: dict[str, Any]) -> tuple[Metadata, list[str]]:
    """`kept` with `made_by` as one JSON object in XMP (replacing an earlier one) and EXIF Software; notes as above."""
    exif = Image.Exif() if kept.exif is None else kept.exif
    exif[0x0131] = f"dreamsr {__version__}"
    value = quoteattr(json.dumps(made_by, sort_keys=True)).encode()
    packet = kept.xmp or _EMPTY_XMP
    packet = re.sub(rb"<rdf:Description[^<>]*xmlns:dreamsr=[^<>]*/>", b"", packet)
    about = re.search(rb"rdf:about\s*=\s*([\"'][^\"']*[\"'])", packet)
    head, end, tail = packet.rpartition(b"</rdf:RDF>")
    if not end:
        return replace(kept, exif=exif), ["its XMP can't be added to: how the photo was made is not recorded"]
    entry = b'<rdf:Description rdf:about=%s xmlns:dreamsr="%s" dreamsr:madeBy=%s/>' % (
        about[1] if about else b'""',
        RECORD.encode(),
        value,
    )
    return replace(kept, exif=exif, xmp=head + entry + end + tail), []


def fit_jpeg(kept: Metadata, made_by: dict[str, Any] | None) -> tuple[Metadata, list[str]]:
    """`kept` without what is too long for a JPEG; the record survives. Notes as above."""
    notes: list[str] = []
    if kept.xmp is not None and len(kept.xmp) > JPEG_BLOCK:
        kept = replace(kept, xmp=None)
        notes.append("its XMP is too long for a JPEG and was left out")
        if made_by is not None:
            kept, _ = add_record(kept, made_by)
    if kept.exif is not None and len(kept.exif.tobytes()) > JPEG_BLOCK:
        kept = replace(kept, exif=None)
        notes.append("its EXIF block is too long for a JPEG and was left out")
    return kept, notes


def _normalise_exif(block: bytes, width: int, height: int) -> Image.Exif | None:
    """The block for an upright photo of width x height; None if it is damaged. Its thumbnail is dropped."""
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of entries it skips
            exif.load(block)
            if not len(exif):
                return None
            exif[0x0112] = 1
            exif.get_ifd(_EXIF_IFD).update({0xA002: width, 0xA003: height})
            exif.tobytes()
    except _BROKEN_EXIF:
        return None
    return exif


def _normalise_xmp(packet: bytes) -> bytes:
    """The packet with `tiff:Orientation` 1, be it an attribute or an element."""
    return re.sub(rb"(tiff:Orientation(?:\s*=\s*[\"']|>\s*))[2-8]", rb"\g<1>1", packet)
