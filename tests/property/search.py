"""How long the property tests search."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# The same few examples each time, or as many others as are asked for: thousands take minutes.
EXAMPLES = os.environ.get("WEIGHTLIFT_EXAMPLES")


def few(examples: int) -> settings:
    """Settings of a test that looks at so many."""
    return settings(
        max_examples=int(EXAMPLES or examples),
        derandomize=EXAMPLES is None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


SEARCH = few(200)
