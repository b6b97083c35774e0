"""`capture`: the forwards that run within a ``with`` block, watched."""

from __future__ import annotations

import inspect
import sys
from types import FrameType, TracebackType
from typing import Any

from torch import nn

from weightlift.capture import hooks
from weightlift.capture.checks import keep_ended, settle
from weightlift.capture.forwards import nearest, running, without
from weightlift.capture.result import Records, strayed
from weightlift.capture.select import keep_for, kept_for, own_taps
from weightlift.capture.session import Mark, Session, Stopped, open_sessions
from weightlift.capture.taps import Declared, Tap, collect_taps, require_module
from weightlift.capture.template import Template, lasting
from weightlift.errors import CaptureError, Problem

_STEPWISE = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Capture:
    """What `capture` returns: a context manager that can be entered again, one block at a time."""

    def __init__(
        self, model: nn.Module, taps: dict[str, Tap] | None, template: Template | None = None, key: Any = None
    ) -> None:
        self._model = model
        self._taps = taps
        self._template = template
        self._key = key  # under which templates are kept for other captures of the same
        self._session: Session | None = None

    @property
    def template(self) -> Template | None:
        """What the taps meant when it was last entered."""
        return self._template

    def __enter__(self) -> Records:
        if self._session is not None:
            raise CaptureError("this capture is open already", [Problem("a capture can't be entered twice at a time")])
        session = None if self._template is None else self._template.open()
        while session is None:  # again only if another thread changes the model meanwhile
            taps = dict(self._template.taps) if self._taps is None else self._taps  # type: ignore[union-attr]
            self._template = Template(self._model, taps)
            session = self._template.open()
            if self._key is not None:
                keep_for(self._model, self._key, self._template)
        self._session = session
        session.entered = _generators(sys._getframe(1))
        forward = running.get()
        while forward is not None:  # a capture within a forward of another: from now on both have to be asked
            forward.ask_all()
            forward = forward.outer
        hooks.install(session)
        # Without those that were closed elsewhere, as in another task, or while an interrupt came.
        open_sessions.set((*[other for other in open_sessions.get() if not other.closed], session))
        return Records(self._template.names, session.entries, session=session)  # type: ignore[union-attr]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        session = self._session
        assert session is not None and self._template is not None
        session.closed = True
        sessions = open_sessions.get()
        open_sessions.set(() if sessions == (session,) else tuple(s for s in sessions if s is not session))
        if running.get() is not None:
            running.set(without(session, running.get()))
        hooks.remove(session)
        self._session = None  # not before: interrupted until here, it is closed by `__del__`
        if session.strayed and (session not in sessions or session.entered[0] in session.strayed):
            session.problems.append(strayed())
        own = error is not None and _stops(error, session)
        if own:
            forward = running.get()
            while forward is not None:
                forward.session.stop_with(forward)
                forward = forward.outer
            running.set(nearest())  # what comes next is in none of those that ended with it
        try:
            if error is None or own:
                problems = settle(session, self._model, self._template)
                if problems:
                    raise CaptureError(f"the capture of {type(self._model).__name__} can't be trusted", problems)
            else:
                keep_ended(session)
        finally:
            session.forget()
        return own

    def __del__(self) -> None:
        session = self.__dict__.get("_session")
        if session is not None:  # dropped while it was open: nobody can close it any more
            session.closed = True
            hooks.abandon(session)


def _generators(frame: FrameType) -> tuple[Mark | None, ...]:
    """Those that run just now, and may go on in another context: first the one whose block it is, or None, then all
    around it, as the block may be that of a function or a generator (``contextlib``) that it called. () without any."""
    marks: list[Mark | None] = [None]
    outer: FrameType | None = frame
    while outer is not None:
        if outer.f_code.co_flags & _STEPWISE:
            marks.append((id(outer), outer.f_code))
            if outer is frame:
                del marks[0]
        outer = outer.f_back
    return tuple(marks) if marks[-1] is not None else ()


def _stops(error: BaseException, session: Session) -> bool:
    """Whether it is the session's own end of a forward, or a group of such, as ``asyncio.TaskGroup`` makes one."""
    if isinstance(error, Stopped):
        return error.session is session
    group: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    return isinstance(group, tuple) and bool(group) and all(_stops(part, session) for part in group)


def capture(model: nn.Module, /, *declared: str | Declared, **taps: Any) -> Capture:
    """Records what modules of ``model`` take or return, in the forwards that run within the ``with`` block.

    Args:
        model: any module. While a capture is open, hooks stand on the chosen modules and on itself; else on nothing.
        declared: names that the model's class declares (Transformers models: ``"hidden_states"``, ``"attentions"``, …;
            classes with `records`: those of its taps).
        taps: a name each, and what to take: a pattern of names, a class, a module, a predicate
            ``(fqn, module) -> bool``, a list of these, or an `Output`, `Input` or `Declared`.

    Returns:
        A context manager that gives `Records`.

    Raises:
        TypeError, ValueError: ``model`` is no module, or an option of a tap is of a wrong kind.
        CaptureError: on entering, if something does not exist or lies inside compiled code; on leaving, if what was
            recorded is not complete or was changed afterwards. The records are there all the same.

    Only forwards in the context that entered the block count: other threads and tasks on the same model see nothing,
    unless they run in a copy of this context (``contextvars.copy_context``, ``asyncio.to_thread``, tasks made within
    the block). Any number of captures can be open, in any threads and within each other.
    """
    key: Any = (declared, *taps.items())
    try:
        known = kept_for(model, key)
        if known is not None:
            return Capture(model, None, known, key)
        hash(key)
        lasts = all(map(lasting, declared)) and all(map(lasting, taps.values()))
    except TypeError:  # a list among the options: not to be looked up
        lasts = False
    require_module(model)
    chosen = collect_taps(declared, taps, own_taps(model))
    lasts = lasts and all(map(lasting, chosen.values()))
    return Capture(model, chosen, None, key if lasts else None)
