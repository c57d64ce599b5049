"""Locks between processes."""

from __future__ import annotations

import threading

from stowplan.runtime.snapshot.memory.locks import FileLock


def test_one_at_a_time_and_no_file_is_left(tmp_path):
    path = tmp_path / "a.lock"
    first, second = FileLock(path), FileLock(path)
    assert first.acquire(blocking=False)
    assert not second.acquire(blocking=False)
    first.release()
    assert second.acquire(blocking=False)
    second.release()
    assert not path.exists()


def test_a_lock_of_a_file_that_was_removed_meanwhile_does_not_count(tmp_path):
    path = tmp_path / "a.lock"
    count, most, guard = 0, 0, threading.Lock()

    def enter():
        nonlocal count, most
        for _ in range(50):
            lock = FileLock(path)
            lock.acquire()
            with guard:
                count += 1
                most = max(most, count)
            with guard:
                count -= 1
            lock.release()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not path.exists()
