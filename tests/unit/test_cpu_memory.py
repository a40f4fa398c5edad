"""What a process keeps in memory."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from siglane.nn.cpu.memory import clean_mappings, return_pages_of

LISTED = """\
7f10-7f20 r--p 00000000 fe:00 53 /lib/libsome.so
Rss:                8 kB
Anonymous:          0 kB
VmFlags: rd mr mw me
7f20-7f30 r-xp 00001000 fe:00 53 /lib/libsome.so
Rss:               12 kB
Anonymous:          0 kB
7f30-7f40 r--p 00002000 fe:00 53 /lib/libsome.so
Rss:                4 kB
Anonymous:          4 kB
7f40-7f50 rw-p 00003000 fe:00 53 /lib/libsome.so
Rss:                0 kB
Anonymous:          0 kB
7f50-7f60 rw-p 00000000 00:00 0
Anonymous:          0 kB
7f60-7f70 r-xp 00000000 fe:00 54 /lib/libother.so
Anonymous:          0 kB
"""


def test_mappings_that_hold_nothing_of_the_process_itself() -> None:
    assert list(clean_mappings(LISTED, "libsome.so")) == [(0x7F10, 0x7F20), (0x7F20, 0x7F30)]
    assert not list(clean_mappings(LISTED, "libnone.so"))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_pages_of_a_file_leave_and_come_back(tmp_path: Path) -> None:
    file = tmp_path / "some.bin"
    file.write_bytes(bytes(range(256)) * 4096)  # 1 MB
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        before = sum(mapped[:])
        assert resident_kilobytes(file) >= 1024
        return_pages_of(file.name)
        assert resident_kilobytes(file) == 0
        assert sum(mapped[:]) == before


def resident_kilobytes(file: Path) -> int:
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(file)):
            return next(int(fact.split()[1]) for fact in lines if fact.startswith("Rss:"))
    raise AssertionError(f"{file} is not mapped")
