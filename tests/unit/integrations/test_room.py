"""Functions of other libraries in a room: what they warn of is as it is outside."""

from __future__ import annotations

import warnings
from typing import Any

from weightlift.integrations.room import Facade, in_room


def theirs(*_: Any) -> None:
    warnings.warn("use another option", FutureWarning, stacklevel=2)


def test_a_warning_names_the_caller_and_none_of_this_library() -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        Facade(object, in_room(theirs, {})).from_pretrained()
    assert [item.filename for item in found] == [__file__]


def test_a_warning_is_given_once_a_place() -> None:
    namespace: dict[str, Any] = {"warnings": warnings, "__name__": "a_module_that_warned_of_nothing"}
    exec("def function(): warnings.warn('given once', FutureWarning)", namespace)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            in_room(namespace["function"], {})()
    assert [str(item.message) for item in found] == ["given once"]
    assert "__warningregistry__" not in namespace
