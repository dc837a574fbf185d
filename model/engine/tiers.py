"""DiskTier: full KV blocks on disk, found again after a restart.

One file a block, named by its key: a block is the unit that is hit, shared and given up, and with
some 100 KB it is large enough for a disk. Reads happen on the caller's thread (the engine's), and
are verified from the first byte to the last. Writes are left to one thread behind a bounded queue.

It is a cache, and it gives way: whatever goes wrong is counted, and is a block that is not there.
A file that is not exactly what its name says is removed. When the disk is full or broken, writing
pauses for a while; what does not fit in the queue meanwhile is dropped.

Files that were used least recently go first. A block is useless without the blocks before it, so
within a chain the last one is taken for the oldest. The times are those of the files (mtime), so
the order outlives the engine; the index is the list of the folder, and contents are read only when
they are needed.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.engine.block_file import BlockFormat, CorruptBlock
from model.engine.block_folder import BlockFolder, FolderTaken
from model.engine.messages import DiskStats

MAX_FILES = 200_000  # bounds the index in memory; small blocks would make millions
QUEUE_BYTES = 64 << 20
RETRY_SECONDS = 10.0
STEP_NS = 1000  # between the times of two blocks of a chain
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Something that is no file has the name. That will not change, and says nothing about the disk.
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EEXIST)


class TierUnavailable(Exception):
    """The tier cannot be used; the message is one line for people."""


@dataclass(slots=True)
class _Queued:
    key: bytes
    parent: bytes
    token_ids: Sequence[int]
    payload: bytes
    used_ns: int


class DiskTier:
    """The blocks of one model and layout in `folder`, together with those that other models left
    there: `budget_bytes` is for all of them. `root` and `layout` are as in BlockFormat."""

    def __init__(
        self,
        folder: Path,
        *,
        root: bytes,
        layout: str,
        block_size: int,
        block_bytes: int,
        budget_bytes: int,
        queue_bytes: int = QUEUE_BYTES,
        retry_seconds: float = RETRY_SECONDS,
        lock_seconds: float = 2.0,
    ) -> None:
        """Lock the folder, list it, start the writer. Raises TierUnavailable."""
        self._format = BlockFormat(root, layout, block_size, block_bytes)
        self.budget_bytes = budget_bytes
        if budget_bytes < self._format.file_bytes:
            raise TierUnavailable(
                f"--disk-cache {budget_bytes} is less than one block of "
                f"{self._format.file_bytes} bytes"
            )
        self._max_queued = max(queue_bytes // block_bytes, 4)
        self._retry_seconds = retry_seconds
        self._buffer = memoryview(bytearray(self._format.file_bytes))
        self._changed = threading.Condition()  # guards all below
        self._files: dict[bytes, tuple[int, int]] = {}  # key -> size, last use in ns
        self._num_bytes = 0
        self._queue: deque[_Queued] = deque()
        self._queued: set[bytes] = set()
        self._writing: bytes | None = None  # the key of the file that is being made now
        self._touched: dict[bytes, int] = {}  # times that the files do not have yet
        self._last_ns = 0
        self._stopping = False
        self._paused = False
        self.num_corrupt = 0  # blocks whose files were not what they should be
        self._hits = self._misses = self._errors = 0
        self._written = self._evicted = self._dropped = 0
        try:
            self._folder = BlockFolder(folder, lock_seconds)
            now = time.time_ns()
            for key, size, used_ns in self._folder.scan():
                self._add(key, size, min(used_ns, now))
        except FolderTaken as error:
            raise TierUnavailable(str(error)) from None
        except OSError as error:
            raise TierUnavailable(f"{folder}: {error.strerror or error}") from None
        self._make_room(0)
        self._writer = threading.Thread(target=self._work, name="disk-tier", daemon=True)
        self._writer.start()

    # ------------------------------------------------------------------- for the engine's thread

    def __contains__(self, key: bytes) -> bool:
        """Whether there is a file with that name; only `read` can tell what is in it."""
        with self._changed:
            return key in self._files

    def holds(self, key: bytes) -> bool:
        """Whether the block is there, or on its way."""
        with self._changed:
            return key in self._files or key in self._queued

    @property
    def room(self) -> int:
        """How many blocks the queue would take now."""
        with self._changed:
            return self._max_queued - len(self._queue)

    @property
    def paused(self) -> bool:
        """Whether the last write failed and the next one has not been tried yet."""
        return self._paused

    @property
    def busy(self) -> bool:
        """Whether blocks are on their way."""
        with self._changed:
            return bool(self._queue)

    def read(self, key: bytes, parent: bytes, token_ids: Sequence[int]) -> memoryview | None:
        """The block's bytes, good until the next read; None when there is no file that holds
        exactly this block. A file that holds anything else is removed."""
        if key not in self:
            self._misses += 1
            return None
        try:
            if not self._folder.read(key, self._buffer):
                raise CorruptBlock("it has a wrong length, or is no file")
            payload = self._format.decode(self._buffer, key, parent, token_ids)
        except FileNotFoundError:
            self._lose(key)
        except CorruptBlock:
            self.num_corrupt += 1
            self._lose(key)
        except OSError as error:
            if error.errno in _IN_THE_WAY:
                self.num_corrupt += 1
            else:
                self._errors += 1
            self._lose(key)
        else:
            self._hits += 1
            return payload
        self._misses += 1
        return None

    def missed(self) -> None:
        """Count a block that was looked for and is not here."""
        self._misses += 1

    def touch(self, keys: Sequence[bytes]) -> list[int]:
        """These blocks of a chain, its first one first, were used now. Returns the time of each in
        ns, for `write`."""
        with self._changed:
            latest = max(time.time_ns(), self._last_ns + (len(keys) + 1) * STEP_NS)
            self._last_ns = latest
            times = [latest - i * STEP_NS for i in range(len(keys))]
            for key, used_ns in zip(keys, times, strict=True):
                if key in self._files:
                    self._files[key] = (self._files[key][0], used_ns)
                    self._touched[key] = used_ns
            if self._touched:
                self._changed.notify_all()
        return times

    def write(
        self, key: bytes, parent: bytes, token_ids: Sequence[int], payload: bytes, used_ns: int
    ) -> bool:
        """Queue a block. False when it is there already, or the queue is full: it is dropped."""
        with self._changed:
            if key in self._files or key in self._queued:
                return False
            if len(self._queue) >= self._max_queued or self._stopping:
                self._dropped += 1
                return False
            self._queue.append(_Queued(key, parent, token_ids, payload, used_ns))
            self._queued.add(key)
            self._changed.notify_all()
            return True

    def drop(self) -> None:
        """Count a block that was given up because the queue has no room."""
        with self._changed:
            self._dropped += 1

    def forget(self, keys: Sequence[bytes]) -> list[bytes]:
        """Remove these blocks, those that are queued and the one that is being written too: it
        waits for that one write. Returns the keys of which nothing is left."""
        unwanted = set(keys)
        with self._changed:
            self._changed.wait_for(lambda: self._writing not in unwanted)
            self._queue = deque(block for block in self._queue if block.key not in unwanted)
            self._queued -= unwanted
            for key in unwanted:
                self._remove_entry(key)
            self._changed.notify_all()
        return [key for key in keys if self._folder.remove(key)]

    def stats(self) -> DiskStats:
        """The state now; counters since the start."""
        with self._changed:
            return DiskStats(
                hits=self._hits,
                misses=self._misses,
                corrupt=self.num_corrupt,
                errors=self._errors,
                written=self._written,
                evicted=self._evicted,
                dropped=self._dropped,
                num_files=len(self._files),
                num_bytes=self._num_bytes,
            )

    def flush(self, seconds: float) -> bool:
        """Wait until all that is queued is on disk. False when it is not, after that time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._touched, seconds)

    def close(self) -> None:
        """End the writer after the block it is at, and give the folder back."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._writer.join()
        self._dropped += len(self._queue)
        self._folder.close()

    # ----------------------------------------------------------------------- the writer's thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._touched or self._stopping)
                if self._stopping:
                    return
                touched = dict(self._touched)
            for key, used_ns in touched.items():
                self._folder.touch(key, used_ns)
            if touched:
                with self._changed:
                    self._touched = {
                        key: used_ns
                        for key, used_ns in self._touched.items()
                        if touched.get(key) != used_ns
                    }
                    self._changed.notify_all()
            self._write_first()

    def _write_first(self) -> None:
        """Write the queue's first block. When the disk is at fault it stays the first one, and
        this returns after a pause."""
        with self._changed:
            if not self._queue:
                return
            block = self._queue[0]
            self._writing = block.key  # from now on it stays the first one until that is over
        size = self._format.file_bytes
        self._make_room(size)
        parts = self._format.encode(block.key, block.parent, block.token_ids, block.payload)
        try:
            self._folder.write(block.key, parts, block.used_ns)
        except OSError as error:
            if error.errno in _FULL:  # the disk is not ours alone: give some of it back
                self._make_room(size, keep=self._num_bytes - max(size, self._num_bytes // 16))
            with self._changed:
                self._errors += 1
                self._writing = None
                self._changed.notify_all()
                if error.errno in _IN_THE_WAY:
                    self._take_from_queue(block)
                    self._dropped += 1
                    return
                self._paused = True
                self._changed.wait_for(lambda: self._stopping, self._retry_seconds)
                self._paused = False
            return
        with self._changed:
            self._writing = None
            self._take_from_queue(block)
            self._add(block.key, size, block.used_ns)
            self._written += 1

    def _take_from_queue(self, block: _Queued) -> None:
        self._queue.popleft()
        self._queued.discard(block.key)
        self._changed.notify_all()

    def _make_room(self, size: int, keep: int | None = None) -> None:
        """Remove the files that were used least recently, so that one of `size` fits in the
        budget; or so many that `keep` bytes are left. A sixteenth goes at a time, because finding
        the oldest takes a look at them all."""
        with self._changed:
            if keep is None:
                if self._num_bytes + size <= self.budget_bytes and len(self._files) < MAX_FILES:
                    return
                keep = min(self.budget_bytes - size, self.budget_bytes // 16 * 15)
            oldest = sorted(self._files, key=lambda key: self._files[key][1])
            least = len(self._files) - MAX_FILES // 16 * 15
            victims: list[bytes] = []
            for key in oldest:
                if self._num_bytes <= keep and len(victims) >= least:
                    break
                self._remove_entry(key)
                victims.append(key)
            self._evicted += len(victims)
        self._remove_files(victims)

    # -------------------------------------------------------------------------------- details

    def _remove_files(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._folder.remove(key)

    def _lose(self, key: bytes) -> None:
        with self._changed:
            self._remove_entry(key)
        self._folder.remove(key)

    def _add(self, key: bytes, size: int, used_ns: int) -> None:
        self._remove_entry(key)
        self._files[key] = (size, used_ns)
        self._num_bytes += size
        self._last_ns = max(self._last_ns, used_ns)

    def _remove_entry(self, key: bytes) -> None:
        size, _ = self._files.pop(key, (0, 0))
        self._touched.pop(key, None)
        self._num_bytes -= size
