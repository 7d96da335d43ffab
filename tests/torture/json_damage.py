"""Damage to JSON texts: values, keys and structure changed at a random place."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

__all__ = ["damage_json"]

_MARK = "\ue000torture\ue000"
# Texts to stand in the place of a value; most are valid JSON of the wrong kind.
_VALUES = (
    *("null", "true", "false", '""', "[]", "{}", "0", "-1", "1", "0.5", "1e308", "-0.0", "NaN", "Infinity", "-Infinity"),
    *(str((1 << power) - less) for power in (15, 31, 32, 53, 62, 63, 64, 70) for less in (0, 1, 4096)),
    *("9" * 400, "9" * 5000, "1e999999999", '"../../etc/passwd"', '"/etc/passwd"', '"a\\u0000b"', '"\\ud800"', '"x\\ny"', '".."'),
    *('"{{7*7}}"', '"__import__"', '"' + "x" * 5000 + '"', "[" * 20_000, "[" * 500 + "]" * 500, '{"a":' * 2000 + "1" + "}" * 2000),
    *("[" + "0," * 50_000 + "0]", "[" + ",".join([str(1 << 62)] * 20_000) + "]", "tru", "'x'", "01", "// c", ""),
)


def damage_json(text: str, dice: Random) -> tuple[str, str]:
    """``text`` with one change, and the name of what was changed."""
    try:
        tree = json.loads(text)
    except ValueError:
        return text[: dice.randrange(len(text) + 1)], "cut"
    place = _place(tree, dice)
    change = dice.choice((_value, _value, _value, _delete, _twice, _rename, _move, _nudge))
    return change(tree, place, dice)


def _place(tree: Any, dice: Random) -> tuple[Any, Any]:
    """A random entry: its owner and its key. Shallow ones are as likely as all deeper ones."""
    holder = {"": tree}
    owner: Any = holder
    key: Any = ""
    while isinstance(owner[key], dict | list) and owner[key] and (owner is holder or dice.random() < 0.7):
        owner = owner[key]
        key = dice.choice(sorted(owner)) if isinstance(owner, dict) else dice.randrange(len(owner))
    return owner, key


def _dump(tree: Any) -> str:
    return json.dumps(tree, separators=(",", ":"))


def _value(tree: Any, place: tuple[Any, Any], dice: Random) -> tuple[str, str]:
    owner, key = place
    owner[key] = _MARK
    return _dump(tree if tree is not owner else owner).replace(json.dumps(_MARK), dice.choice(_VALUES)), "another value"


def _delete(tree: Any, place: tuple[Any, Any], dice: Random) -> tuple[str, str]:
    owner, key = place
    del owner[key]
    return _dump(tree), "entry missing"


def _twice(tree: Any, place: tuple[Any, Any], dice: Random) -> tuple[str, str]:
    owner, key = place
    if isinstance(owner, list):
        owner.insert(key, copy.deepcopy(owner[key]))
        return _dump(tree), "entry twice"
    before, owner[_MARK] = owner[key], 0
    other = dice.choice((_dump(before), dice.choice(_VALUES)))
    return _dump(tree).replace(f"{json.dumps(_MARK)}:0", f"{json.dumps(key)}:{other}"), "key twice"


def _rename(tree: Any, place: tuple[Any, Any], dice: Random) -> tuple[str, str]:
    owner, key = place
    if isinstance(owner, dict):
        owner[dice.choice(("", "x", "__class__", "../x", key + " ", key.upper(), "\0"))] = owner.pop(key)
    else:
        owner.reverse()
    return _dump(tree), "key renamed"


def _move(tree: Any, place: tuple[Any, Any], dice: Random) -> tuple[str, str]:
    """Two entries exchanged."""
    (owner, key), (other, other_key) = place, _place(tree, dice)
    one, two = copy.deepcopy(owner[key]), copy.deepcopy(other[other_key])
    owner[key] = two
    if isinstance(other, dict) == (not isinstance(other_key, int)) and (isinstance(other, dict) or other_key < len(other)):
        other[other_key] = one
    try:
        return _dump(tree), "entries exchanged"
    except (ValueError, RecursionError):
        return "{}", "entries exchanged"


def _nudge(tree: Any, place: tuple[Any, Any], dice: Random) -> tuple[str, str]:
    owner, key = place
    value = owner[key]
    if type(value) is int:
        owner[key] = value + dice.choice((-4096, -64, -1, 1, 64, 4096, value, -2 * value))
    elif isinstance(value, str):
        at = dice.randrange(len(value) + 1)
        owner[key] = value[:at] + dice.choice("0aZ./\\ \n\0é") + value[at + dice.randrange(2) :]
    else:
        owner[key] = [value]
    return _dump(tree), "value changed a little"
