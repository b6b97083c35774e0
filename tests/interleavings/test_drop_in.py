"""`install` and `uninstall` in several threads: in every order either all of it is in place or nothing."""

from __future__ import annotations

import sys

from tests.interleavings.explorer import explore
from tests.interleavings.stand_ins import stand_in
from transformers import PreTrainedModel
from transformers.utils import output_capturing

import weightlift as wl
from weightlift.integrations import drop_in


def test_all_or_nothing(monkeypatch):
    wl.install()  # what is imported at the first time
    wl.uninstall()
    stand_in(monkeypatch, drop_in)

    def state():
        return PreTrainedModel.__dict__["from_pretrained"], output_capturing._active_collector, list(sys.meta_path)

    theirs = state()

    def scene():
        def check():
            same = [now is before for now, before in zip(state()[:2], theirs[:2])]
            assert all(same) or not any(same)
            assert all(same) == (not drop_in._undo) == (sys.meta_path == theirs[2])
            wl.uninstall()
            assert state() == theirs

        return [wl.install, wl.uninstall, wl.install], check

    assert explore(scene, inside=[drop_in], preemptions=1).complete
