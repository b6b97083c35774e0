"""`from_single_file` of Diffusers models and pipelines: by its own code, alone in the process."""

from __future__ import annotations

from typing import Any

from diffusers.loaders.single_file import FromSingleFileMixin
from diffusers.loaders.single_file_model import FromOriginalModelMixin

from weightlift.integrations.diffusers_originals import original
from weightlift.integrations.exclusive import NotNative, native_or_alone


def load_single_file(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``cls.from_single_file(*args, **kwargs)``."""
    owner = FromSingleFileMixin if issubclass(cls, FromSingleFileMixin) else FromOriginalModelMixin

    def native() -> Any:
        raise NotNative("a single file", "its names are converted while tensors are read")

    return native_or_alone(cls, native, lambda: original(owner, "from_single_file").__func__(cls, *args, **kwargs))
