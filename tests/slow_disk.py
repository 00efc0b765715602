"""A file shown as FOLDER/store on a slow disk in user space (FUSE), until this process is killed.

    python3 tests/slow_disk.py FILE FOLDER FIRST_MS AGAIN_MS

Each 4 kB take FIRST_MS when they are first read, as of a volume that loads from a snapshot, and
AGAIN_MS from then on; one after another, whoever reads. Once there is a
FILE.fails, the disk fails.
"""

import errno
import os
import stat
import sys
import threading
import time

import mfusepy

BLOCK_BYTES = 4096


class SlowDisk(mfusepy.Operations):
    use_ns = True  # times in nanoseconds, as mfusepy wants it

    def __init__(self, path: str, first_s: float, again_s: float) -> None:
        self.file, self.fails = os.open(path, os.O_RDONLY), f"{path}.fails"
        self.first_s, self.again_s = first_s, again_s
        self.loaded: set[int] = set()
        self.lock = threading.Lock()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755}
        if path != "/store":
            raise mfusepy.FuseOSError(errno.ENOENT)
        return {"st_mode": stat.S_IFREG | 0o444, "st_size": os.fstat(self.file).st_size}

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        if os.path.exists(self.fails):
            raise mfusepy.FuseOSError(errno.EIO)
        with self.lock:
            for block in range(offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES + 1):
                time.sleep(self.again_s if block in self.loaded else self.first_s)
                self.loaded.add(block)
        return os.pread(self.file, size, offset)


if __name__ == "__main__":
    path, folder, first_ms, again_ms = sys.argv[1:]
    disk = SlowDisk(path, float(first_ms) / 1000, float(again_ms) / 1000)
    # The kernel keeps what was read in the page cache, as of any disk.
    mfusepy.FUSE(disk, folder, foreground=True, ro=True, kernel_cache=True)
