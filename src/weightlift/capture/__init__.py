"""Watching a model run: what inner modules take and return, safely under threads, and inside compiled code."""

from weightlift.capture.api import capture
from weightlift.capture.decorator import records
from weightlift.capture.recorder import recorder
from weightlift.capture.result import Records
from weightlift.capture.taps import Declared, Input, Output

__all__ = ["Declared", "Input", "Output", "Records", "capture", "recorder", "records"]
