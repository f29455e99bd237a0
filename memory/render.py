"""The exact text that knowledge is, and how items are fitted into a token budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from memory.records import Item, Knowledge, KnowledgeItem, digest

#: Stands first. It must not ask the model to explain or to cite the experience: a student would learn to say so.
HEADER = "Experience from earlier tasks. Follow it:"


def render_knowledge(texts: Sequence[str]) -> str:
    """The bytes that go first into the system message: a header line and one `- ` line an item; "" for no item."""
    return "\n".join([HEADER, *(f"- {text}" for text in texts)]) if texts else ""


def count_tokens(text: str, tokenizer: Any) -> int:
    """Length of a text alone in tokens of a Hugging Face tokenizer, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def compose(items: Iterable[Item | KnowledgeItem], budget_tokens: int, tokenizer: Any) -> Knowledge:
    """Put items into one text of at most `budget_tokens` tokens, in order.

    An item that would exceed the budget is dropped whole and named in `dropped`; later, shorter ones may still fit.
    The count is that of the rendered text itself. No item fitting gives an empty knowledge of 0 tokens.
    """
    kept: list[KnowledgeItem] = []
    dropped: list[str] = []
    tokens = 0
    for item in items:
        trial = [*kept, KnowledgeItem(id=item.id, text=item.text)]
        needed = count_tokens(render_knowledge([k.text for k in trial]), tokenizer)
        if needed <= budget_tokens:
            kept, tokens = trial, needed
        else:
            dropped.append(item.id)
    text = render_knowledge([k.text for k in kept])
    return Knowledge(id=digest(text), items=tuple(kept), text=text, tokens=tokens, dropped=tuple(dropped))
