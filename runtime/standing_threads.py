"""Threads that outlive what they do: some libraries keep what they set up by thread.

cuDNN's attention keeps its plans so (PyTorch, `ATen/native/cudnn/MHA.cpp`); to build one takes the
host tens of milliseconds, which every run would pay anew on a new thread, in its first prompt.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue


class Standing:
    """Work on a thread that stood ready; is joined as a thread is."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._ended = threading.Event()

    def run(self) -> None:
        """Do it; what it raises is reported as of any thread, which goes on."""
        try:
            self._work()
        except BaseException:
            thread = threading.current_thread()
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), thread)))
        del self._work  # nothing that it used lives on while the thread waits

    def end(self) -> None:
        """Let go who waits for it."""
        self._ended.set()

    def join(self) -> None:
        """Return when it is done."""
        self._ended.wait()


class StandingThreads:
    """Threads by name. Work of a name is done by the thread that did the last of it, unless that
    is still busy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, list[SimpleQueue[Standing]]] = {}

    def start(self, name: str, work: Callable[[], object]) -> Standing:
        """Begin `work`."""
        made = Standing(work)
        with self._lock:
            idle = self._idle.setdefault(name, [])
            queue = idle.pop() if idle else None
        if queue is None:
            queue = SimpleQueue()
            thread = threading.Thread(
                target=self._stand, args=(queue, idle), name=f"standing.{name}", daemon=True
            )
            thread.start()
        queue.put(made)
        return made

    def _stand(self, queue: SimpleQueue[Standing], idle: list[SimpleQueue[Standing]]) -> None:
        while True:
            one = queue.get()
            one.run()
            with self._lock:  # idle before its end is known: what starts then finds this thread
                idle.append(queue)
            one.end()
            del one
