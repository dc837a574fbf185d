"""BlockFolder: a folder of files that are named by keys, for one engine at a time.

It knows nothing of what is in the files. A file appears whole or not at all (a temporary file,
renamed). Nothing is synced: after a power cut a file may be empty or torn, which its checksum
tells, and it is only a cache. No link is followed, neither for a file nor for a subfolder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIX = ".kv"
TEMPORARY = ".tmp"
_NAME = re.compile(r"[0-9a-f]{64}")
_LOCK_POLL_SECONDS = 0.05


class FolderTaken(Exception):
    """Another engine has the folder; the message names its process."""


class BlockFolder:
    """`path/<first two digits>/<key in hex>.kv`, all for the owner's eyes only."""

    def __init__(self, path: Path, lock_seconds: float = 2.0) -> None:
        """Make the folder if it is not there, and lock it: for `lock_seconds` it waits for an
        engine that is about to end. Raises FolderTaken, OSError."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(self._folder, 0o700)
            self._lock = self._take_lock(lock_seconds)
        except BaseException:
            os.close(self._folder)
            raise

    def close(self) -> None:
        """Give the folder back."""
        os.close(self._lock)
        os.close(self._folder)

    def scan(self) -> Iterator[tuple[bytes, int, int]]:
        """Each file's key, its size in bytes and its time of change in ns. Removes temporary files
        that somebody left behind, and whatever has a file's name and is none."""
        for subfolder in self._subfolders():
            with contextlib.suppress(OSError), self._opened(subfolder) as folder:
                for name in os.listdir(folder):
                    key, ending = name[:64], name[64:]
                    if not _NAME.fullmatch(key) or key[:2] != subfolder:
                        continue  # not ours
                    if ending == TEMPORARY:
                        os.unlink(name, dir_fd=folder)
                    elif ending == SUFFIX:
                        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                        if stat.S_ISREG(found.st_mode):
                            yield bytes.fromhex(key), found.st_size, found.st_mtime_ns
                        else:
                            _remove(name, folder)

    def read(self, key: bytes, buffer: memoryview) -> bool:
        """Fill `buffer` with the file. False when it is not a file of exactly that length. Raises
        OSError; FileNotFoundError when there is none."""
        with self._opened(key.hex()[:2]) as folder:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(key.hex() + SUFFIX, flags, dir_fd=folder)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_size != len(buffer):
                return False
            offset = 0
            while offset < len(buffer):
                count = os.readv(file, [buffer[offset:]])
                if count == 0:
                    return False
                offset += count
            return True
        finally:
            os.close(file)

    def write(self, key: bytes, parts: Sequence[bytes], mtime_ns: int) -> None:
        """Write a file, whole. Raises OSError, and leaves nothing behind then."""
        with self._opened(key.hex()[:2], make=True) as folder:
            temporary = key.hex() + TEMPORARY
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(temporary, flags, 0o600, dir_fd=folder)
            try:
                try:
                    for part in parts:
                        view = memoryview(part)
                        while view:
                            view = view[os.write(file, view) :]
                    os.utime(file, ns=(mtime_ns, mtime_ns))
                finally:
                    os.close(file)
                os.rename(temporary, key.hex() + SUFFIX, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise

    def touch(self, key: bytes, mtime_ns: int) -> None:
        """Set a file's time of change; nothing happens when it cannot be set."""
        with contextlib.suppress(OSError), self._opened(key.hex()[:2]) as folder:
            os.utime(
                key.hex() + SUFFIX, ns=(mtime_ns, mtime_ns), dir_fd=folder, follow_symlinks=False
            )

    def remove(self, key: bytes) -> bool:
        """Remove a file, or what has its place: a link, an empty folder. False when something is
        there still."""
        try:
            with self._opened(key.hex()[:2]) as folder:
                return _remove(key.hex() + SUFFIX, folder)
        except FileNotFoundError:
            return True
        except OSError:
            return False

    # -------------------------------------------------------------------------------- details

    def _subfolders(self) -> list[str]:
        return [name for name in os.listdir(self._folder) if re.fullmatch(r"[0-9a-f]{2}", name)]

    @contextlib.contextmanager
    def _opened(self, subfolder: str, *, make: bool = False) -> Iterator[int]:
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(subfolder, 0o700, dir_fd=self._folder)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        opened = os.open(subfolder, flags, dir_fd=self._folder)
        try:
            yield opened
        finally:
            os.close(opened)

    def _take_lock(self, seconds: float) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open("lock", flags, 0o600, dir_fd=self._folder)
        give_up = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if isinstance(error, BlockingIOError) and time.monotonic() < give_up:
                    time.sleep(_LOCK_POLL_SECONDS)
                    continue
                holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
                os.close(lock)
                if not isinstance(error, BlockingIOError):
                    raise
                raise FolderTaken(f"another engine has {self.path} (process {holder})") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return lock


def _remove(name: str, folder: int) -> bool:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return True
    except (IsADirectoryError, PermissionError):  # POSIX leaves open which of the two it is
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=folder)
            return True
        return False
    except OSError:
        return False
    return True
