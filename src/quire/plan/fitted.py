"""A device that has been measured, by the file that `quire bench fit` wrote. The scheduler reads it too."""

from __future__ import annotations

from quire.scheduler.fitted import FittedCost

__all__ = ["FittedCost"]
