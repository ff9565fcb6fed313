"""A package that is a function as well: `mmref.train(...)`, beside `mmref.train.trainer`.

Python puts each package that it imports into the one above it, by its name. A function of the same name would be there until
the first such import, and gone afterwards.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package whose class has a `__call__`: `sys.modules[__name__].__class__ = ...` in its `__init__.py`."""

    def __reduce__(self) -> tuple[Any, ...]:
        """By its name, as any module goes to Ray's workers; pickle knows no module of another class."""
        return importlib.import_module, (self.__name__,)
