"""Damage for files: JSON values of other types and sizes, and bytes that were cut, turned or repeated."""

import copy
import json

import numpy as np

VALUES = (
    None, True, False, 0, -1, 1, 300, 2**20, 10**6, 2**63, -(2**63), 0.5, -1.0, 1e308, float("nan"), float("inf"), "",
    "x", "0", "²", "9" * 5000, "\x1b[31m", "[/b]", "../../x", "a" * 5000, [], [0], [[]], ["a", "a"], {}, {"": 0},
    {"a": {"b": []}},
)  # fmt: skip


def mutated_json(rng, value):
    """The bytes of JSON `value` after one to three changes of its values, keys or text."""
    value = copy.deepcopy(value)
    for _ in range(rng.integers(1, 4)):
        value = _changed(rng, value)
    text = json.dumps(value).encode()
    if rng.random() < 0.1:
        return b"[" * 100_000 if rng.random() < 0.2 else b"\xef\xbb\xbf" + text
    return mutated_bytes(rng, text) if rng.random() < 0.25 else text


def _changed(rng, value):
    """`value` with one of its nodes, or itself, replaced, dropped or doubled."""
    other = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        return other
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[rng.integers(len(keys))]
    kind = rng.random()
    if kind < 0.6 and isinstance(value[key], (dict, list)):
        value[key] = _changed(rng, value[key])
    elif kind < 0.8:
        value[key] = other
    elif kind < 0.9:
        value.pop(key)
    elif isinstance(value, dict):
        value[str(other)[:50]] = value[key]
    else:
        value.append(value[key])
    return value


def mutated_bytes(rng, data):
    """`data` after one change: bits turned, cut, a part zeroed, overwritten, repeated or taken out."""
    data = bytearray(data)
    first, last = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    kind = rng.integers(6)
    if kind == 0:
        for place in rng.integers(0, len(data), rng.integers(1, 9)):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[first:]
    elif kind == 2:
        data[first:last] = bytes(last - first)
    elif kind == 3:
        data[first : first + 8] = rng.integers(0, 256, 8, dtype=np.uint8).tobytes()
    elif kind == 4:
        data[first:first] = data[first:last]
    else:
        del data[first:last]
    return bytes(data)
