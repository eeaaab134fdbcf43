"""What a request costs in Python at the least: a bare loop on ``/dev/fuse`` beside the FUSE view, on the same tree.

The loop reads a message, looks into the same index, packs the answer and writes it. It does nothing else: it knows no
errors, cannot wait for data, and is nobody's mount. ``python -m benchmarks.raw_loop CLIP FILE MOUNTPOINT`` is that
loop; FILE has the contents of the one file of which the first 64 KiB can be read from it. Without a FILE, it is
pyfuse3's loop that serves, and each read is answered with the same bytes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import pyfuse3
import trio

import clipfs
from benchmarks.goals import at_most
from benchmarks.measure import CLIPFS, Row, Section, rounds
from benchmarks.programs import one_core, served
from benchmarks.workload import BIG, Workload, small_files
from clipfs.format.index import Index, Node
from clipfs.mounting import connection, kernel, loop
from clipfs.mounting.fs import ClipFS, Reader
from clipfs.mounting.options import MountOptions

BARE = "bare loop"
EMPTY = "pyfuse3, empty handler"

# A reply may take this much longer from clipfs.
_MOST = 1.3

_WHY = (
    "For each, pyfuse3 makes four coroutines and a poll(2), and a read is counted, followed and looked up in the LRU."
)

# statx(2): of an open file itself, and from who serves it although the kernel knows.
_EMPTY_PATH, _FORCE_SYNC, _BASIC = 0x1000, 0x2000, 0x7FF

# The block that reads find warm, and what they read of it at a time.
_BLOCK, _PAGE = 1 << 16, 4096
_BYTES = bytes(_PAGE)

# linux/fuse.h: heads of messages, and what follows them.
_LOOKUP, _GETATTR, _OPEN, _READ, _RELEASE = 1, 3, 14, 15, 18
_INIT, _OPENDIR, _RELEASEDIR, _READDIRPLUS = 26, 27, 29, 44
_NO_ANSWER = frozenset((2, 36, 42))
_IN, _OUT, _READ_IN = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ"), struct.Struct("<QQI")
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")

_FOR_EVER = 2**31 - 1

# struct fuse_entry_out and fuse_attr_out, whose last part is a struct fuse_attr.
_ENTRY_OUT = struct.Struct("<QQQQII" + "QQQQQQIIIIIIIIII")
_DIRENT = struct.Struct("<QQII")
_ATTR_OUT = struct.Struct("<QII" + "QQQQQQIIIIIIIIII")
# "There is no such name", which the kernel keeps.
_ABSENT = _ENTRY_OUT.pack(0, 0, _FOR_EVER, *19 * (0,))
# In FUSE_INIT: directories are read with the attributes of what is in them.
_DO_READDIRPLUS = 1 << 13
_LARGEST = 1 << 17


def requests(workload: Workload) -> Section:
    """The three requests that there are most of."""
    clip, mountpoint = workload.scratch / "raw.clip", workload.scratch / "raw"
    clipfs.build(workload.generated, clip)
    mountpoint.mkdir()
    peers: dict[str, Callable[[], AbstractContextManager[Path]]] = {
        CLIPFS: partial(_ours, clip, mountpoint),
        BARE: partial(bare_loop, clip, workload.unpacked / BIG, mountpoint),
    }
    # Its names and attributes are answered by clipfs' own handlers: only its reads show something.
    readers = peers | {EMPTY: partial(empty_handler, clip, mountpoint)}
    ways = {
        "look up a name": partial(_look_up, small_files(workload)),
        "attributes of a file": partial(_get_attributes, workload.size.files),
        "4 KiB of a warm block": partial(_read, workload.size.files),
    }
    rows = []
    for name, act in ways.items():
        beside = readers if act.func is _read else peers
        with one_core():
            samples = rounds(workload.size.rounds, name, {p: partial(_timed, act, m) for p, m in beside.items()})
        rows.append(Row(f"request: {name}", "requests/s", samples, BARE, "FUSE requests", _WHY))
    mountpoint.rmdir()
    least = {row.name: (EMPTY, 1 / row.ratio(EMPTY)) for row in rows if EMPTY in row.samples}
    times = {row.name: 1 / row.ratio() for row in rows}
    text = (
        "What one request costs that the kernel cannot answer itself, from the system call to its result, with clipfs "
        "as the FUSE view. The bare loop is the least that Python can do: it reads a message from `/dev/fuse`, looks "
        "into the same index, and writes the answer; it has no errors, no waiting and no accounts. The *empty handler* "
        "is the least that pyfuse3 can do: it answers each read with the same bytes. All share one core with who asks."
    )
    outcomes = [at_most(name, _MOST, found, f"× {BARE}", _WHY, least=least.get(name)) for name, found in times.items()]
    return Section.of("A request", text, rows, outcomes)


def _timed(act: Callable[[Path], int], mount: Callable[[], AbstractContextManager[Path]]) -> float:
    """Requests a second."""
    with mount() as root:
        # The first of each kind has more to do than the others: blocks are loaded, and tables made.
        os.lstat(root / BIG)
        _read(1, root)
        started = time.perf_counter()
        count = act(root)
        return count / (time.perf_counter() - started)


def _look_up(paths: list[str], root: Path) -> int:
    for path in paths:
        os.lstat(f"{root}/{path}")
    return len(paths)


def _get_attributes(count: int, root: Path) -> int:
    statx, buffer = ctypes.CDLL(None, use_errno=True).statx, ctypes.create_string_buffer(256)
    with open(root / BIG, "rb", buffering=0) as file:
        descriptor = file.fileno()
        for _ in range(count):
            if statx(descriptor, b"", _EMPTY_PATH | _FORCE_SYNC, _BASIC, buffer):
                raise OSError(ctypes.get_errno(), "statx")
    return count


def _read(count: int, root: Path) -> int:
    """Reads that no page cache answers."""
    buffers = [mmap.mmap(-1, _PAGE)]
    descriptor = os.open(root / BIG, os.O_RDONLY | os.O_DIRECT)
    try:
        for number in range(count):
            os.preadv(descriptor, buffers, number * _PAGE % _BLOCK)
    finally:
        os.close(descriptor)
    return count


@contextmanager
def _ours(clip: Path, mountpoint: Path) -> Iterator[Path]:
    with clipfs.mount(clip, mountpoint, clipfs.MountOptions(view="fuse")):
        yield mountpoint


def bare_loop(clip: Path, file: Path, mountpoint: Path) -> AbstractContextManager[Path]:
    """That loop as a mount."""
    return served(mountpoint, sys.executable, "-m", "benchmarks.raw_loop", clip, file, mountpoint)


def empty_handler(clip: Path, mountpoint: Path) -> AbstractContextManager[Path]:
    """pyfuse3 with nothing to do, as a mount."""
    return served(mountpoint, sys.executable, "-m", "benchmarks.raw_loop", clip, mountpoint)


class _Empty(ClipFS):
    """Reads are answered with the same bytes, wherever they are from."""

    async def read(self, fh: int, off: int, size: int) -> bytes:
        del fh, off, size
        return _BYTES


def _mounted(mountpoint: str) -> int:
    """The descriptor by which the kernel asks who serves a mount there."""
    fuse, mount = connection.detached("raw", MountOptions())
    kernel.attach(mount, mountpoint)
    os.close(mount)
    return fuse.descriptor


def serve_empty(clip: str, mountpoint: str) -> None:
    """Mount, and answer until the unmount."""
    fuse = _mounted(mountpoint)
    with Index.open(clip) as index:
        pyfuse3.init(_Empty(index, cast(Reader, None)), f"/dev/fd/{fuse}", {"fsname=raw"})
        loop.install()
        trio.run(pyfuse3.main)


# --- the loop


def serve(clip: str, file: str, mountpoint: str) -> None:
    """Mount, and answer until the unmount."""
    fuse = _mounted(mountpoint)
    with Index.open(clip) as index, open(file, "rb") as contents:
        address = index.inode(index.resolve(BIG)).address
        first, inner = divmod(address, _BLOCK)
        content = bytes(inner) + contents.read(_BLOCK)
        blocks = {first + number: content[number * _BLOCK : (number + 1) * _BLOCK] for number in range(2)}
        try:
            _loop(fuse, index, blocks)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise


def _loop(fuse: int, index: Index, blocks: Mapping[int, bytes]) -> None:
    buffer = bytearray(_LARGEST)
    buffers = [buffer]
    addresses: dict[int, int] = {}
    while True:
        length = os.readv(fuse, buffers)
        _, opcode, unique, inode, *_ = _IN.unpack_from(buffer)
        nid = index.root if inode == 1 else inode
        if opcode == _LOOKUP:
            found = index.lookup(nid, bytes(buffer[_IN.size : length - 1]))
            os.write(fuse, _OUT.pack(_OUT.size + 128, 0, unique) + (_entry(index, found) if found else _ABSENT))
        elif opcode == _GETATTR:
            attributes = _attributes(index.inode(nid))
            os.write(fuse, _OUT.pack(_OUT.size + 104, 0, unique) + _ATTR_OUT.pack(_FOR_EVER, 0, 0, *attributes))
        elif opcode == _READ:
            _, offset, size = _READ_IN.unpack_from(buffer, _IN.size)
            offset += addresses[nid]
            at = offset % _BLOCK
            data = blocks[offset // _BLOCK][at : at + size]
            os.writev(fuse, (_OUT.pack(_OUT.size + len(data), 0, unique), data))
        elif opcode == _READDIRPLUS:
            _, offset, size = _READ_IN.unpack_from(buffer, _IN.size)
            data = _listing(index, nid, offset, size)
            os.write(fuse, _OUT.pack(_OUT.size + len(data), 0, unique) + data)
        elif opcode in (_OPEN, _OPENDIR):
            addresses[nid] = index.inode(nid).address
            os.write(fuse, _OUT.pack(_OUT.size + 16, 0, unique) + struct.pack("<QII", 0, 0, 0))
        elif opcode == _INIT:
            answer = _INIT_OUT.pack(7, 31, 1 << 17, _DO_READDIRPLUS, 0, 0, _PAGE, 1, 0, 0, 0)
            os.write(fuse, _OUT.pack(_OUT.size + len(answer), 0, unique) + answer)
        elif opcode in (_RELEASE, _RELEASEDIR):
            os.write(fuse, _OUT.pack(_OUT.size, 0, unique))
        elif opcode not in _NO_ANSWER:
            os.write(fuse, _OUT.pack(_OUT.size, -errno.ENOSYS, unique))


def _entry(index: Index, nid: int) -> bytes:
    return _ENTRY_OUT.pack(nid, 0, _FOR_EVER, _FOR_EVER, 0, 0, *_attributes(index.inode(nid)))


def _listing(index: Index, nid: int, offset: int, size: int) -> bytes:
    """The entries of a directory from the one with this number on, as many as have room."""
    entries = [(b".", 0), (b"..", 0), *index.entries(nid)]
    found = bytearray()
    for number, (name, child) in enumerate(entries[offset:], offset + 1):
        head = _entry(index, child) if child else bytes(_ENTRY_OUT.size)
        each = head + _DIRENT.pack(child or nid, number, len(name), 0) + name + bytes(-len(name) % 8)
        if len(found) + len(each) > size:
            break
        found += each
    return bytes(found)


def _attributes(node: Node) -> tuple[int, ...]:
    seconds, nanoseconds = divmod(node.mtime_ns, 1_000_000_000)
    return (
        *(node.nid, node.size, (node.size + 511) // 512, seconds, seconds, seconds),
        *(nanoseconds, nanoseconds, nanoseconds, node.mode, node.nlink, node.uid, node.gid, node.rdev, _PAGE, 0),
    )


if __name__ == "__main__":
    (serve if len(sys.argv) == 4 else serve_empty)(*sys.argv[1:])
