"""Results of searches and scorings on disk, so that nothing computed is computed again.

Keys are readable text, values are JSON: a cache from elsewhere cannot make it unpickle anything.
"""

import functools
import json

import diskcache
import numpy as np


class _TextDisk(diskcache.Disk):
    """Storage of diskcache that takes and gives text only: a file from elsewhere cannot make it unpickle anything."""

    def put(self, key):
        """Store the key as text."""
        return _text(key), True

    def get(self, key, raw):
        """Give the key as stored."""
        return _text(key)

    def store(self, value, read, key=diskcache.UNKNOWN):
        """Store a text value."""
        return super().store(_text(value), read, key=key)

    def fetch(self, mode, filename, value, read):
        """Give a text value; anything pickled is refused."""
        if mode == diskcache.core.MODE_PICKLE:
            raise ValueError(f"{self._directory} holds a pickled value, which is never written here: delete the folder")
        return super().fetch(mode, filename, value, read)


def _text(value):
    if not isinstance(value, str):
        raise TypeError(f"the result cache stores text only, not {type(value).__name__}")
    return value


class ResultCache:
    """Results of ``infer_single`` and ``calc_score`` on disk, called like a published cache: ``cache(function)(**kw)``.

    The key is readable text: the function's name and all keywords in canonical JSON, prompt, search options and
    ``model_id`` included; ``model_tok``, ``guess``, ``stats`` and ``cache`` do not change the result and are left out.
    Values are JSON. Writes are transactions, so a killed process leaves a usable cache; entries are never evicted.
    Close it when done: ``with ResultCache(path) as cache``.
    """

    IGNORED = frozenset({"model_tok", "guess", "stats", "cache"})

    def __init__(self, path):
        """Open or create the cache in the folder ``path``."""
        self._store = diskcache.Cache(str(path), disk=_TextDisk, eviction_policy="none")

    def key(self, function, keywords):
        """Return the key of a call.

        Raises:
            TypeError: for a keyword that JSON cannot hold, naming it.
        """
        kept = {}
        for name, value in keywords.items():
            if name not in self.IGNORED:
                value = value.item() if isinstance(value, np.generic) else value
                try:
                    json.dumps(value)
                except TypeError as error:
                    raise TypeError(f"{function.__name__}: {name}={value!r} cannot be part of a cache key") from error
                kept[name] = value
        return function.__name__ + " " + json.dumps(kept, sort_keys=True)

    def __call__(self, function):
        """Return ``function`` (keywords only) with its results kept here; fresh and kept results are equal."""

        @functools.wraps(function)
        def cached(**keywords):
            key = self.key(function, keywords)
            text = self._store.get(key)
            if text is None:
                text = json.dumps(function(**keywords))
                self._store.set(key, text)
            value = json.loads(text)
            if not isinstance(value, list):
                return value
            return [tuple(part) if isinstance(part, list) else part for part in value]

        return cached

    def __len__(self):
        return len(self._store)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the files; the next use opens them again."""
        self._store.close()
