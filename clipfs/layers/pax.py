"""What tar headers say beyond their fixed fields: numbers, PAX records, extended attributes.

This module owns the notations. It does not know which member it reads for, nor in which order headers come: `layer`
does, and adds member and offset to the errors raised here. All input is a stranger's; every function takes time and
memory in proportion to its input, which `layer` has bounded.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping
from urllib.parse import unquote_to_bytes

from clipfs.errors import ImageError, shown

# Go's archive/tar reads no larger extended header, long name or sparse map, so no layer in use has one.
MAX_EXTENSION = 1 << 20

# What Linux lets a file have: a value, and the list of all names. What does not fit can be on no file.
MAX_XATTR_VALUE = 0xFFFF
MAX_XATTR_NAMES = 1 << 16
# EROFS counts the xattrs of an inode in units of four bytes, in 16 bits; each has a head of four bytes and padding.
_MAX_XATTRS = 0x3FF00
_XATTR_OVERHEAD = 8

# The widest number a record may hold: 64 bits, as everybody else reads them. It also keeps int() from long work.
_DECIMAL = re.compile(rb"[0-9]{1,20}")
_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")
# A record's length counts itself; 1 MiB, the most that is read, has seven digits.
_LENGTH = re.compile(rb"([0-9]{1,7}) ")

_SCHILY_XATTR = b"SCHILY.xattr."
_LIBARCHIVE_XATTR = b"LIBARCHIVE.xattr."

_FOR_ALL = (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime")

_SPARSE_OFFSET = b"GNU.sparse.offset"
_SPARSE_LENGTH = b"GNU.sparse.numbytes"
SPARSE_MAP = b"GNU.sparse.map"


def numeric(field: bytes) -> int:
    """The number in a header field: octal with spaces or NULs around it, or base-256, which may be negative."""
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        return value - (1 << bits) if field[0] & 0x40 else value
    digits = field.strip(b" \0").split(b"\0", 1)[0]
    if digits.strip(b"01234567"):
        raise ImageError(f"{shown(field)} stands where its header should have a number")
    return int(digits or b"0", 8)


def decimal(value: bytes) -> int:
    """The number in a PAX record. None is negative."""
    if not _DECIMAL.fullmatch(value):
        raise ImageError(f"{shown(value)} stands where an extended header should have a number")
    return int(value)


def timestamp(value: bytes) -> int:
    """A PAX time, seconds with any number of decimals, in nanoseconds; what is finer is cut off."""
    match = _TIME.fullmatch(value)
    if not match:
        raise ImageError(f"{shown(value)} stands where an extended header should have a time")
    sign, seconds, fraction = match.groups(b"")
    nanoseconds = int(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return -nanoseconds if sign else nanoseconds


def records(body: bytes) -> dict[bytes, bytes]:
    """The records of a PAX header; the last of a key wins.

    Sparse format 0.0 says its map in repeated keys; it comes out as the one record that format 0.1 has for it.
    """
    found: dict[bytes, bytes] = {}
    sparse: list[bytes] = []
    at = 0
    while at < len(body):
        match = _LENGTH.match(body, at)
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(body) or body[end - 1] != 0x0A:
            raise ImageError(f"the record at byte {at} of its extended header is not as long as it says")
        key, equals, value = body[match.end() : end - 1].partition(b"=")
        if not key or not equals or b"\0" in key:
            raise ImageError(f"the record at byte {at} of its extended header is not KEY=VALUE")
        if key in (_SPARSE_OFFSET, _SPARSE_LENGTH):
            if (key == _SPARSE_LENGTH) != len(sparse) % 2 or b"," in value:
                raise ImageError("offsets and lengths do not alternate in its sparse map")
            sparse.append(value)
        else:
            found[key] = value
        at = end
    if sparse:
        found[SPARSE_MAP] = b",".join(sparse)
    return found


def is_for_all(key: bytes) -> bool:
    """Whether a record that a global header gives for all members to come changes any of them."""
    return key in _FOR_ALL or key.startswith((_SCHILY_XATTR, _LIBARCHIVE_XATTR))


def xattrs(found: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The extended attributes among PAX records: star's notation, which is verbatim, goes before libarchive's."""
    result: dict[bytes, bytes] = {}
    for key, value in found.items():
        if key.startswith(_LIBARCHIVE_XATTR):
            result[unquote_to_bytes(key.removeprefix(_LIBARCHIVE_XATTR))] = _base64(value)
    for key, value in found.items():
        if key.startswith(_SCHILY_XATTR):
            result[key.removeprefix(_SCHILY_XATTR)] = value
    if result:
        _check_xattrs(result)
    return result


def _base64(value: bytes) -> bytes:
    """libarchive leaves the padding out."""
    try:
        return binascii.a2b_base64(value + b"=" * (-len(value) % 4), strict_mode=True)
    except binascii.Error:
        raise ImageError(f"{shown(value)} stands where its extended header should have base64") from None


def _check_xattrs(found: Mapping[bytes, bytes]) -> None:
    for name, value in found.items():
        if len(value) > MAX_XATTR_VALUE:
            raise ImageError(f"its xattr {shown(name)} has {len(value)} bytes, and {MAX_XATTR_VALUE} are the most")
    names = sum(map(len, found)) + len(found)
    if names > MAX_XATTR_NAMES or names + sum(map(len, found.values())) + _XATTR_OVERHEAD * len(found) > _MAX_XATTRS:
        raise ImageError(f"its {len(found)} xattrs are more than a file can have")
