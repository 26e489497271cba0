"""Processes that a test of tables starts, measures or kills; without a network."""

import os
import sys
from pathlib import Path

from ddad.bulk import places
from ddad.bulk.tables import read_manifest, write_listing

SIZE = 1 << 20


def write_for_ever(place):
    """A file of equal bytes, again and again with other ones."""
    for number in range(1 << 30):
        places.write(place, bytes([number % 256]) * SIZE)


def create_one(place):
    """The process, and 1 if it made the file."""
    print(os.getpid(), int(places.create(place, str(os.getpid()).encode())))


def grow(manifest, folder):
    """How many rows were listed, and by how many MiB the process grew meanwhile."""
    before = most_memory()
    rows = write_listing(folder, read_manifest(manifest)[1], 1000)
    print(rows, most_memory() - before)


def most_memory():
    """MiB that this process ever held; `ru_maxrss` begins with what its parent held."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


if __name__ == "__main__":
    works = {work.__name__: work for work in (write_for_ever, create_one, grow)}
    works[sys.argv[1]](*sys.argv[2:])
