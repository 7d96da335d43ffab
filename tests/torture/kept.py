"""kill -9 while prefixes and sessions are written, by several processes: nothing wrong is read, and the bound holds."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from random import Random

from fate_moe.core import KV_BLOCK
from fate_moe.errors import FateError
from fate_moe.schedule.batching import BatchScheduler
from fate_moe.schedule.block_files import BlockFiles
from fate_moe.schedule.request import Event, Piece, Request, Sampling
from fate_moe.tools.sessions import Session, load_session, open_session, save_session, session_names
from tests.support.batching import POISON, FakeExecutor, FakeModel, FakeTokenizer
from tests.torture.case import Case, WrongError
from tests.torture.damage import damage
from tests.torture.kills import child, kill

__all__ = ["killed_keeping"]

_BLOCK_BYTES = 8 * KV_BLOCK
_MOST_BYTES = 40 * (_BLOCK_BYTES + 150)


def killed_keeping(case: Case) -> str:
    """One to three processes write, and are killed; files are damaged; then what is read is right, and the folder heals."""
    what = case.dice.choice(("blocks", "talks", "sessions"))
    case.kind = f"writing {what}"
    os.environ["FATE_HOME"] = str(case.work)
    writes = {"blocks": _write_blocks, "talks": _talk, "sessions": _save_sessions}[what]
    seeds = [case.dice.randrange(1 << 30) for _ in range(case.dice.randrange(1, 4))]
    processes = [child(lambda seed=seed: writes(case.work, seed, 10_000)) for seed in seeds]  # type: ignore[misc]
    hit = [kill(case, process, 0.08) for process in processes]
    _check_bound(case.work, leftovers=sum(hit))
    if what == "sessions":
        for name in session_names():
            _check_session(name)
        writes(case.work, 1, 3)
    else:
        _damage(case)
        writes(case.work, case.dice.randrange(1 << 30), 12 if what == "talks" else 60)
        for path in case.work.rglob("*.tmp"):  # a minute later
            os.utime(path, (1, 1))
        _files(case.work).write(bytes(16), 1, _content(bytes(16)))
        _check_bound(case.work, leftovers=0)
        if left := list(case.work.rglob("*.tmp")):
            raise WrongError(f"left behind: {[path.name for path in left]}")
    return "right" if any(hit) else "skipped"


def _files(home: Path) -> BlockFiles:
    return BlockFiles(home / "kv", "c" * 32, "fake", _BLOCK_BYTES, _MOST_BYTES)


def _content(name: bytes) -> list[memoryview]:
    return [memoryview(Random(name).randbytes(_BLOCK_BYTES))]


def _write_blocks(home: Path, seed: int, turns: int) -> None:
    """Write and read blocks whose bytes follow from their names."""
    files, dice = _files(home), Random(seed)
    for turn in range(turns):
        name, into = dice.randrange(70).to_bytes(16, "big"), [memoryview(bytearray(_BLOCK_BYTES))]
        if files.read(name, into):
            if into != _content(name):
                raise WrongError(f"block {name.hex()} has other bytes")
        elif not files.use(name, turn + 1):
            files.write(name, turn + 1, _content(name))
    if not files.is_writing:
        raise WrongError("it does not write any more")


def _talk(home: Path, seed: int, turns: int) -> None:
    """Requests that begin alike: their texts are what they are without anything kept."""
    dice, shared = Random(seed), [Random(1).randrange(1, POISON) for _ in range(4 * KV_BLOCK)]
    states = 3 * (seed % 2)  # of a model that has some
    state_files = BlockFiles(home / "kv", "e" * 32, "fake", 8, _MOST_BYTES) if states else None
    executor = FakeExecutor(12, files=_files(home), num_states=states, state_files=state_files)
    scheduler = BatchScheduler(lambda: (FakeModel(), FakeTokenizer()), make_executor=lambda model: executor, parallel=2)
    for _ in range(turns):
        prompt = [*shared[: dice.randrange(1, len(shared))], *[dice.randrange(1, 4)] * dice.randrange(1, 80)]
        request = Request(tuple(prompt), 4, Sampling(seed=1), ignore_eos=True)
        plain = BatchScheduler(
            lambda: (FakeModel(), FakeTokenizer()), make_executor=lambda model: FakeExecutor(12, num_states=states)
        )
        if (told := _text(scheduler, request)) != (want := _text(plain, request)):
            raise WrongError(f"the text is {told!r}, not {want!r}")
        plain.close()
    scheduler.close()


def _text(scheduler: BatchScheduler, request: Request) -> str:
    async def collect() -> list[Event]:
        return [event async for events in scheduler.submit(request) for event in events]

    return "".join(event.text for event in asyncio.run(collect()) if isinstance(event, Piece))


def _save_sessions(home: Path, seed: int, turns: int) -> None:
    """Conversations that grow; one process has one."""
    name = f"talk-{seed}"
    try:
        with open_session(name) as session:
            for turn in range(turns):
                session.messages += [{"role": role, "content": f"{role} {turn} " * 40} for role in ("user", "assistant")]
                session.tokens = len(session.messages)
                save_session(session)
    except FateError as error:
        raise WrongError(str(error)) from error


def _check_session(name: str) -> None:
    session: Session | None = load_session(name)
    if session is None or len(session.messages) != session.tokens or session.tokens % 2:
        raise WrongError(f"session {name} has a third state")


def _damage(case: Case) -> None:
    """Some blocks become others."""
    paths = sorted((case.work / "kv").rglob("*.kv"))[1:]
    for path in case.dice.sample(paths, min(len(paths), case.dice.randrange(4))):
        damage(path, case.dice, paths[0])
        case.counts["damaged blocks"] = case.counts.get("damaged blocks", 0) + 1


def _check_bound(home: Path, leftovers: int) -> None:
    """At most one unfinished file of each killed process."""
    files = [path for path in (home / "kv").rglob("*") if path.name != "lock" and path.is_file() and not path.is_symlink()]
    taken = sum(path.stat().st_size for path in files)
    if taken > _MOST_BYTES or sum(path.suffix == ".tmp" for path in files) > leftovers:
        raise WrongError(f"{len(files)} files have {taken} bytes")
