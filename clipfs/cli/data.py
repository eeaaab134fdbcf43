"""``clipfs cat``, ``check`` and ``extract``: what needs the image's bytes, or all of the index."""

from __future__ import annotations

import argparse
import stat
import sys
from collections.abc import AsyncIterator

import trio

from clipfs.blocks.counters import Counters
from clipfs.blocks.flight import RANGE
from clipfs.blocks.frames import Frame
from clipfs.blocks.reader import BlockReader
from clipfs.building.extractor import extract as unpack
from clipfs.cli.look import resolve
from clipfs.cli.options import clip_of, opened
from clipfs.cli.progress import progress, size
from clipfs.compression.codec import decode
from clipfs.errors import IntegrityError, UsageError
from clipfs.format.container import Codec
from clipfs.format.index import Index
from clipfs.sources.fetcher import Fetcher, SourceOptions
from clipfs.sources.packed import fetcher_for

# Spans that are fetched and decoded at the same time by `check --data`: both cores busy, memory below 100 MiB.
_CHECKERS = 4

# What `cat` reads at a time: one gzip span, so that memory stays flat and the pipe stays full.
_PIECE = 4 << 20


def cat(args: argparse.Namespace) -> int:
    """Write one file to standard output."""
    with opened(args) as index:
        node = index.inode(resolve(index, args.path))
        if not stat.S_ISREG(node.mode):
            raise UsageError(f"{args.path} is not a regular file")

        async def main() -> None:
            async with (
                _fetcher(index, args) as fetcher,
                BlockReader(index, fetcher, counters=Counters.private()) as reader,
            ):
                for at in range(0, node.size, _PIECE):
                    data = await reader.read(node.address + at, min(_PIECE, node.size - at))
                    await trio.to_thread.run_sync(sys.stdout.buffer.write, data)

        trio.run(main)
    sys.stdout.buffer.flush()
    return 0


def check(args: argparse.Namespace) -> int:
    """Verify the structure, and with --data every byte that the index points at."""
    with opened(args) as index:
        index.check()
        verified = 0
        if args.data:
            verified = trio.run(_check_data, index, args)
        what = f"{index.inodes} inodes, {sum(len(layer.spans) for layer in index.layers)} spans"
        print(f"{index.path}: good; {what}" + (f", {size(verified)} of data verified" if args.data else ""))
    return 0


async def _check_data(index: Index, args: argparse.Namespace) -> int:
    shown, verified = progress(), 0
    shown.begin("verifying", sum(layer.diff_size for layer in index.layers))
    jobs, feed = trio.open_memory_channel[tuple[int, range]](0)

    async def verify(fetcher: Fetcher, number: int, numbers: range) -> None:
        nonlocal verified
        async for count in _decoded(index, fetcher, number, numbers):
            verified += count
            shown.advance(count)

    async def work(fetcher: Fetcher, feed: trio.MemoryReceiveChannel[tuple[int, range]]) -> None:
        async with feed:
            async for number, numbers in feed:
                try:
                    await verify(fetcher, number, numbers)
                except IntegrityError as error:
                    raise IntegrityError(f"layer {index.layers[number].digest}: {error}") from None

    async with _fetcher(index, args) as fetcher, trio.open_nursery() as nursery:
        for _ in range(_CHECKERS):
            nursery.start_soon(work, fetcher, feed.clone())
        feed.close()
        async with jobs:
            for number, layer in enumerate(index.layers):
                at = 0
                while at < len(layer.spans):
                    numbers = layer.spans.frame(at)
                    await jobs.send((number, numbers))
                    at = numbers.stop
    shown.end()
    return verified


async def _decoded(index: Index, fetcher: Fetcher, number: int, numbers: range) -> AsyncIterator[int]:
    """Decode the spans of one frame of layer `number`, each once; how many bytes they are, one after the other."""
    layer = index.layers[number]
    if len(numbers) == 1 or layer.codec is Codec.RAW:
        for span in (layer.spans[at] for at in numbers):
            data = await fetcher.fetch(number, span.start, span.end)
            yield len(await trio.to_thread.run_sync(decode, layer.codec, span, data))
        return
    frame, at = Frame(layer.codec, layer.spans, numbers), numbers.start
    while at < numbers.stop:
        stretch, start, end = frame.next(at, numbers[-1], RANGE)
        data = await fetcher.fetch(number, start, end)
        for _, blocks in await trio.to_thread.run_sync(frame.decode, data, stretch):
            yield sum(map(len, blocks))
        at = stretch.stop


def extract(args: argparse.Namespace) -> int:
    """Unpack everything into a directory."""
    done = unpack(clip_of(args), args.directory, _access(args))
    for sentence in done.skipped:
        print(f"clipfs: left out {sentence}", file=sys.stderr)
    print(f"{args.directory}: {done.inodes} inodes, {size(done.bytes)}")
    return 0


def _access(args: argparse.Namespace) -> SourceOptions:
    return SourceOptions(name=args.source, insecure=args.insecure, authfile=args.authfile, ca=args.ca)


def _fetcher(index: Index, args: argparse.Namespace) -> Fetcher:
    return fetcher_for(index, _access(args))
