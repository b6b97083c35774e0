"""Code with mistakes that only some orders show, to see that the explorer finds them."""

from __future__ import annotations

import threading


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def add(self) -> None:
        value = self.value
        self.value = value + 1


class Once:
    """Makes its value once; the check is not under the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value: object | None = None
        self.made = 0

    def get(self) -> object | None:
        if self.value is None:
            with self.lock:
                self.made += 1
                self.value = object()
        return self.value


class Twisted:
    """Two locks in two orders."""

    def __init__(self) -> None:
        self.first, self.second = threading.Lock(), threading.Lock()
        self.begun = 0

    def forwards(self) -> None:
        with self.first:
            self.begun += 1
            with self.second:
                pass

    def backwards(self) -> None:
        with self.second:
            self.begun += 1
            with self.first:
                pass


class Forgetful:
    """Waits for what was said before it listened."""

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.ready = False

    def wait(self) -> None:
        if not self.ready:
            with self.change:
                self.change.wait()

    def tell(self) -> None:
        self.ready = True
        with self.change:
            self.change.notify_all()


class Flickering:
    """Wrong only if both threads lose their turn."""

    def __init__(self) -> None:
        self.up = False
        self.seen: tuple[bool, bool] | None = None

    def flicker(self) -> None:
        self.up = True
        self.up = False

    def look(self) -> None:
        first = self.up
        second = self.up
        self.seen = first, second
