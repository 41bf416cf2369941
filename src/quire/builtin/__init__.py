"""The model that Quire ships, and its draft: where they are, and nothing heavier than a path.

`training/` makes them; `docs/model-card.md` says from what, and how well they do.
"""

from pathlib import Path

MODEL_NAME = "quire-builtin"
MODEL_DIR: Path = Path(__file__).with_name("model")
DRAFT_DIR: Path = Path(__file__).with_name("draft")

__all__ = ["DRAFT_DIR", "MODEL_DIR", "MODEL_NAME"]
