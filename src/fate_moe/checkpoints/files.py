"""Which files of a checkpoint folder hold its weights, and which of them holds which tensor. Only headers are read.

``model.safetensors.index.json`` decides where a tensor is; without an index no tensor may be in two files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from fate_moe.errors import CheckpointError
from fate_moe.io.json_file import read_json, what_it_is
from fate_moe.io.tensorfile import TensorEntry, read_header

__all__ = ["SAME_PLACE", "WeightFiles", "find_index", "find_weights", "has_weights", "some"]

SAME_PLACE = "take config.json and weights from the same place"

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Weights in another naming (Mistral's own files), and adapters: never part of the model that the other files hold.
_FOREIGN = ("consolidated*", "adapter_model*")
_NUMBERED = re.compile(r"(.+?)[-_](\d+)-of-(\d+)\.safetensors")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a folder.

    ``entries`` maps a tensor's name to its file and its place there. ``unread`` says why a copy, or a file that is not part of the
    model, is not read, by "FILE: TENSOR". ``absent`` says why a tensor that a file or the index names cannot be read, by its name.
    """

    files: list[Path]
    entries: dict[str, tuple[Path, TensorEntry]]
    unread: dict[str, str]
    absent: dict[str, str]


def find_weights(folder: Path) -> WeightFiles:
    """Read the index and the headers of ``folder``. Raises CheckpointError where they are damaged, incomplete or contradict."""
    index, weight_map = _index(folder)
    files = _files(folder, index, weight_map)
    if index is not None and folder / _SINGLE in files and _SINGLE not in weight_map.values():
        weight_map = {}  # the index of shards that are no longer there
    headers = {path: _header(path) for path in files}
    holders: dict[str, list[Path]] = {}
    for path, header in headers.items():
        for name in header:
            holders.setdefault(name, []).append(path)
    entries: dict[str, tuple[Path, TensorEntry]] = {}
    unread: dict[str, str] = {}
    for name, paths in holders.items():
        path = _place(folder, index, name, paths, weight_map.get(name))
        entries[name] = path, headers[path][name]
        superseded = f"superseded: {index and index.name} places it in {path.name}"
        unread |= {f"{other.name}: {name}": superseded for other in paths if other != path}
    absent = {
        name: f"{index and index.name} places it in {file}, which does not have it; fetch both again"
        for name, file in weight_map.items()
        if name not in holders
    }
    where = f"that {index.name} does not list" if weight_map and index else f"beside {_SINGLE}"
    for path in sorted(set(folder.glob("*.safetensors")) - set(files)):
        _account_stray(path, "of another format" if _is_foreign(path) else where, unread, absent)
    return WeightFiles(files, entries, unread, {name: why for name, why in absent.items() if name not in entries})


def find_index(folder: Path) -> Path | None:
    """The file that says which shard holds a tensor, under its usual name or, if there is one such file, a similar one."""
    path, others = folder / _INDEX, sorted(folder.glob("*.safetensors.index*.json"))
    if path.is_file():
        return path
    return others[0] if len(others) == 1 else None


def has_weights(folder: Path) -> bool:
    """Whether there is anything that ``find_weights`` would read: a configuration alone is enough for a plan."""
    return any(folder.glob("*.safetensors")) or ((folder / _INDEX).is_file() and any(folder.glob("*/*.safetensors")))


def some(names: list[str], most: int = 3) -> str:
    """The first few of ``names`` and, if there are more, how many there are."""
    return ", ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")


def _index(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The index and its map from tensors to files; (None, {}) without one."""
    if (path := find_index(folder)) is None:
        return None, {}
    content = read_json(path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} is damaged (it has no weight_map); fetch it again")
    if not weight_map:
        raise CheckpointError(f"{path} lists no tensors; fetch it again, or delete it: the shards are then read without an index")
    for file in set(map(str, weight_map.values())):
        parts = PurePosixPath(file).parts
        if file not in weight_map.values() or not parts or ".." in parts or file.startswith("/") or "\0" in file:
            raise CheckpointError(f"{path} names {file!r}, which is not a file of this folder; fetch it again")
    return path, weight_map


def _files(folder: Path, index: Path | None, weight_map: dict[str, str]) -> list[Path]:
    single, named = folder / _SINGLE, sorted(set(weight_map.values()))
    missing = [name for name in named if not (folder / name).is_file()]
    if index is None:
        return [single] if single.is_file() else _without_index(folder)
    if single.is_file() and single.name not in named:
        if len(missing) < len(named):
            raise CheckpointError(
                f"{folder} has {_SINGLE} and also shards ({some([n for n in named if n not in missing], 1)}) with {index.name}; "
                "move the older of the two away"
            )
        return [single]
    if not missing:
        return [folder / name for name in named]
    said = f"{folder / missing[0]} is missing, and {index.name} names it" + (
        f" ({len(missing)} of {len(named)} files are missing)" if len(named) > 1 else ""
    )
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in named and not _is_foreign(path))
    if others and len(missing) == len(named):
        raise CheckpointError(f"{said}; the folder has {some(others, 1)} instead: if these are the weights, delete the index")
    raise CheckpointError(f"{said}; fetch what is missing, or the whole checkpoint")


def _without_index(folder: Path) -> list[Path]:
    """All safetensors files; numbered ones must be complete."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file() and not _is_foreign(path))
    if (folder / "dense.safetensors") in files and any(fnmatch(path.name, "experts-*-of-*") for path in files):
        raise CheckpointError(f"{folder} is an expert store without its fate.json; give the checkpoint, and convert it again")
    numbers: dict[tuple[str, str], set[int]] = {}
    for path in files:
        if numbered := _NUMBERED.fullmatch(path.name):
            numbers.setdefault((numbered[1], numbered[3]), set()).add(int(numbered[2]))
    for (stem, total), have in numbers.items():
        if missing := sorted(set(range(1, int(total) + 1)) - have)[: len(have) + 1]:
            raise CheckpointError(
                f"{folder} has {len(have)} of the {int(total)} files {stem}-...-of-{total}.safetensors; "
                f"number {', '.join(map(str, missing[:5]))} {'is' if len(missing) == 1 else 'are'} missing, fetch the rest"
            )
    if not files:
        raise CheckpointError(f"{folder} {_instead(folder)}")
    return files


def _instead(folder: Path) -> str:
    """What a folder without weights has, and what to do."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    pickled = [name for name in names if any(fnmatch(name, pattern) for pattern in _PICKLED)]
    if adapters := [name for name in names if fnmatch(name, "adapter_*")]:
        return (
            f"holds an adapter ({adapters[0]}), not a model; merge it into its base model first "
            "(peft: merge_and_unload, then save_pretrained)"
        )
    if ggufs:
        return f"has no safetensors but GGUF; give the file itself: {folder / ggufs[0]}"
    if foreign := [name for name in names if fnmatch(name, _FOREIGN[0])]:
        return f"has only {foreign[0]}, in Mistral's own format; fetch the same model's files for transformers, model*.safetensors"
    if pickled:
        return f"has only pickled weights ({pickled[0]}), which are not read; use the model's safetensors files"
    inner = sorted(path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/config.json"))
    if inner:
        return f"holds no weights, but {inner[-1]} is a checkpoint; give that folder"
    others = f"; it has {some(names)}" if names else " (the folder is empty)"
    return f"has neither {_SINGLE} nor {_INDEX}{others}; give the folder of a complete checkpoint"


def _is_foreign(path: Path) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in _FOREIGN)


def _header(path: Path) -> dict[str, TensorEntry]:
    try:
        return read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from error
    except ValueError as error:
        with open(path, "rb") as file:
            if substitute := what_it_is(file.read(64)):
                raise CheckpointError(f"{path} {substitute}") from error
        raise CheckpointError(f"{path} is damaged ({error}); fetch this file again") from error


def _place(folder: Path, index: Path | None, name: str, paths: list[Path], said: str | None) -> Path:
    """The file from which ``name`` is read: one of ``paths``, which all have it. ``said`` is the file that the index names."""
    if said is None and len(paths) == 1:
        return paths[0]
    if said is None:
        silent = f"{index.name} does not list it" if index else "no index says which counts"
        both = f"{paths[0].name} and in {paths[1].name}"
        raise CheckpointError(f"{folder}: {name} is in {both}, and {silent}; move the older file away")
    if folder / said not in paths:
        raise CheckpointError(
            f"{index}: {name} is not in {said}, where it should be, but in {paths[0].name}; the index is of other files: fetch it "
            "again, or delete it (shards are then read without an index)"
        )
    return folder / said


def _account_stray(path: Path, where: str, unread: dict[str, str], absent: dict[str, str]) -> None:
    """Add ``path``, a file that is not read, to ``unread``, and each tensor that only it has to ``absent``."""
    try:
        header = read_header(path)
    except (OSError, ValueError):
        unread[path.name] = f"a file {where}"
        return
    remedy = "fetch the index again, or delete it if all files belong together"
    for name in header:
        unread[f"{path.name}: {name}"] = f"in a file {where}"
        absent.setdefault(name, f"it is in {path.name}, a file {where}; {remedy}")
