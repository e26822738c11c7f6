"""Tokens of texts: by a table of characters where a tokenizer has one token for each, else by the tokenizer itself.

A shrunk vocabulary (``vocabulary_tools``) has no merges, so a text's tokens are those of its characters, and a table
finds them some ten times as fast. Test-time training makes tens of thousands of texts while a GPU waits.
"""

import json
import weakref

import numpy as np

MOST_TOKENS = 1024  # of a vocabulary of characters; a larger one is not looked at
FIRST_MARK = 128  # place in the table of the first token that is written as a word: behind the ASCII characters
MOST_WORDS = 128  # such tokens
AT_ONCE = 1000  # texts; a tokenizer's intermediate results take far more memory than the tokens
_tables = weakref.WeakKeyDictionary()  # {tokenizer: (its backend, size of its vocabulary, table or None)}


def token_ids(tokenizer, texts, add_special_tokens=True):
    """Return the tokens of each text, a list of int32 arrays (T,).

    Args:
        tokenizer: a tokenizer of transformers. texts: list of str.
        add_special_tokens: with those that the tokenizer puts around a text, such as a start token.
    """
    table = _table_of(tokenizer)
    rows = [None if table is None else table.ids_of(text, add_special_tokens) for text in texts]
    rest = [i for i, row in enumerate(rows) if row is None]
    for part in (rest[start : start + AT_ONCE] for start in range(0, len(rest), AT_ONCE)):
        encoded = tokenizer([texts[i] for i in part], add_special_tokens=add_special_tokens)["input_ids"]
        for i, ids in zip(part, encoded, strict=True):
            rows[i] = np.asarray(ids, dtype=np.int32)
    return rows


def _table_of(tokenizer):
    """Return the table of a tokenizer, made anew when its vocabulary has changed; None where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = _tables.get(tokenizer)
    if known is None or known[0] is not backend or known[1] != len(tokenizer):
        known = backend, len(tokenizer), _make_table(tokenizer, backend)
        _tables[tokenizer] = known
    return known[2]


def _make_table(tokenizer, backend):
    if backend is None or len(tokenizer) > MOST_TOKENS:
        return None
    state = json.loads(backend.to_str())
    words = [token["content"] for token in state["added_tokens"]]
    plain = not any(token[way] for token in state["added_tokens"] for way in ("single_word", "lstrip", "rstrip"))
    longer = [token for token in state["model"].get("vocab", ()) if len(token) > 1 and token not in words]
    if state["model"].get("merges") != [] or state["normalizer"] is not None or not plain or len(words) > MOST_WORDS:
        return None
    if longer and state["model"].get("ignore_merges"):  # found in a text as they are
        return None
    table = CharacterTable(tokenizer, words)
    return table if table.agrees(tokenizer) else None


class CharacterTable:
    """The tokens of the ASCII characters, and of the tokens that are written as words."""

    def __init__(self, tokenizer, words):
        """words: of the tokenizer's vocabulary, which are found in a text before it is cut into characters."""
        def alone(text):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else -1  # -1: left to the tokenizer

        words = sorted(words, key=len, reverse=True)
        self.marks = {word: chr(FIRST_MARK + i) for i, word in enumerate(words)}
        self.ids = np.array([*(alone(chr(code)) for code in range(FIRST_MARK)), *map(alone, words)], dtype=np.int32)
        # what is put around a text
        both, inside = (tokenizer("0", add_special_tokens=special)["input_ids"] for special in (True, False))
        place = both.index(inside[0]) if len(inside) == 1 and inside[0] in both else 0
        self.before = np.array(both[:place], dtype=np.int32)
        self.behind = np.array(both[place + 1:], dtype=np.int32)

    def ids_of(self, text, add_special_tokens=True):
        """Return the tokens of a text, int32 (T,); None if some of its characters have none of their own."""
        if not text.isascii():
            return None
        for word, mark in self.marks.items():
            if word in text:
                text = text.replace(word, mark)
        ids = self.ids[np.frombuffer(text.encode("latin-1"), dtype=np.uint8)]
        if len(ids) and ids.min() < 0:
            return None
        return np.concatenate([self.before, ids, self.behind]) if add_special_tokens else ids

    def agrees(self, tokenizer):
        """Tell whether the tokenizer gives the same for a text with all that the table knows, every two in a row."""
        known = [chr(code) for code in range(FIRST_MARK) if self.ids[code] >= 0]
        known += [word for word, mark in self.marks.items() if self.ids[ord(mark)] >= 0]
        text = "".join(first + second for first in known for second in known)
        return all(np.array_equal(self.ids_of(text, special), tokenizer(text, add_special_tokens=special)["input_ids"])
                   for special in (True, False))
