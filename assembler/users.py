"""Who a container runs as: names looked up in the image's own ``/etc/passwd`` and ``/etc/group``.

The host's users mean nothing here. The files are a stranger's: read beneath the root, bounded, and lines that make no
sense are passed over, as glibc does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import clipfs
from assembler.beneath import read_file

# A directory service dumped into a file has some 10^5 lines of 60 bytes; nothing honest is larger.
_MAX_FILE = 16 << 20

# What runc accepts: it keeps ids in a signed 32-bit integer.
_MAX_ID = (1 << 31) - 1


class Identity(NamedTuple):
    """What a process needs to know about its user."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


class _User(NamedTuple):
    name: str
    uid: int
    gid: int
    home: str


class _Group(NamedTuple):
    name: str
    gid: int
    members: tuple[str, ...]


def look_up(root: int, wanted: str) -> Identity:
    """``USER[:GROUP]``, names or numbers; empty means root. UsageError if the image does not know a name.

    What is all digits is a number, whatever the image calls its users: it must not turn one that was asked for into
    root. A number need not be known: it then has group 0 and home ``/``. Supplementary groups are those that list the
    user, unless a group is named: then there are none, as in docker. The primary group is always among them, because
    without that a setgid program could drop a group that a file denies something to.
    """
    who, _, group = wanted.partition(":")
    for text in (who, group):
        if _is_number(text) and _number(text) is None:
            more = text.lstrip("0")[:20]
            raise clipfs.UsageError(f"the numbers of users and groups go up to {_MAX_ID}, and {more} is more")
    users = _users(root)
    if _is_number(who or "0"):
        uid = _number(who) or 0
        user = next((each for each in users if each.uid == uid), _User("", uid, 0, "/"))
    else:
        known = next((each for each in users if each.name == who), None)
        if known is None:
            raise clipfs.UsageError(f"the image has no user '{who}' in its /etc/passwd; name another, or a number")
        user = known
    if group:
        gid = _group_id(root, group)
        return Identity(user.uid, gid, (gid,), user.home)
    groups = {each.gid for each in _groups(root) if user.name and user.name in each.members}
    return Identity(user.uid, user.gid, tuple(sorted(groups | {user.gid})), user.home)


def _group_id(root: int, wanted: str) -> int:
    gid = _number(wanted)
    if gid is not None:
        return gid
    gid = next((each.gid for each in _groups(root) if each.name == wanted), None)
    if gid is None:
        raise clipfs.UsageError(f"the image has no group '{wanted}' in its /etc/group; name another, or a number")
    return gid


def _users(root: int) -> Iterator[_User]:
    for fields in _lines(root, b"etc/passwd"):
        if len(fields) >= 4:
            uid, gid = _number(fields[2]), _number(fields[3])
            if uid is not None and gid is not None:
                yield _User(fields[0], uid, gid, (fields[5] if len(fields) > 5 else "") or "/")


def _groups(root: int) -> Iterator[_Group]:
    for fields in _lines(root, b"etc/group"):
        if len(fields) >= 3 and (gid := _number(fields[2])) is not None:
            yield _Group(fields[0], gid, tuple(fields[3].split(",")) if len(fields) > 3 else ())


def _lines(root: int, path: bytes) -> Iterator[list[str]]:
    try:
        data = read_file(root, path, _MAX_FILE)
    except OSError as error:
        raise clipfs.ImageError(f"cannot read the image's /{os.fsdecode(path)}: {error.strerror}") from error
    for line in (data or b"").split(b"\n"):
        yield os.fsdecode(line).strip().split(":")


def _is_number(text: str) -> bool:
    # isdecimal alone would take other scripts' digits, which no file system knows.
    return text.isascii() and text.isdecimal()


def _number(text: str) -> int | None:
    if not _is_number(text) or len(digits := text.lstrip("0")) > 10:
        return None
    return number if (number := int(digits or "0")) <= _MAX_ID else None
