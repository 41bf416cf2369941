"""Text in and text out: tokenizer, incremental detokenizer, stop strings, chat templates.

Everything here is sans-IO and free of torch. Only the standard library is imported at module level;
`tokenizers`, `minijinja`, `jinja2` and `transformers` are loaded on first use, so that `import quire`
and `--help` stay quick.

    Tokenizer ──────── encode / decode one whole text, token bytes, special ids
        │ pieces
    IncrementalDetokenizer ── token ids in, text deltas out, stop strings cut off
    ChatTemplate ───── messages in, prompt text out, within limits of time and size
"""

from __future__ import annotations

from quire.text.chat_template import ChatTemplate, read_chat_template
from quire.text.detokenizer import DetokenizeResult, IncrementalDetokenizer, StopMatch
from quire.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "DetokenizeResult",
    "IncrementalDetokenizer",
    "StopMatch",
    "Tokenizer",
    "read_chat_template",
]
