"""The torture run: python -m tests.torture [--minutes 5] [--seed N] [--only AREA --case N]."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from tests.torture.areas import AREAS
from tests.torture.case import Area, Material, Outcome
from tests.torture.material import make_material
from tests.torture.table import as_json, page, show
from tests.torture.workers import do, outcomes


def main() -> int:
    """Exit code 0 if nothing was found that must not be, 1 otherwise."""
    options = _options()
    quiet()
    torch.set_num_threads(1)
    areas = [AREAS[name] for name in options.only or AREAS]
    folder = Path(tempfile.mkdtemp(prefix="fate-torture-", dir=options.folder))
    try:
        began = time.monotonic()
        material = _material(folder / "material")
        if options.case is not None:
            done = [do(area, options.seed, options.case, material, folder) for area in areas]
            print(*done, sep="\n", file=sys.stderr)
        else:
            print(f"seed {options.seed}, {options.workers} at a time, in {folder}", file=sys.stderr, flush=True)
            until = began + 60 * options.minutes
            timed = _Timed(areas, until)
            jobs = _short(areas) if options.short else iter(timed)
            done = []
            for outcome in outcomes(jobs, options.seed, material, folder, options.workers):
                done.append(outcome)
                timed.note(outcome)
                if not outcome.good:
                    print(_failure(outcome, options.seed), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    facts = {"seed": options.seed, "seconds": round(time.monotonic() - began, 1), "workers": options.workers}
    if options.results:
        options.results.write_text(json.dumps(as_json(done, facts), indent=1) + "\n")
    if options.page:
        page(options.page, as_json(done, facts))
    if options.json:
        print(json.dumps(as_json(done, facts)))
    else:
        show(done, facts)
    return 0 if all(outcome.good for outcome in done) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default: 5)")
    parser.add_argument("--seed", type=int, default=None, help="of everything that is drawn (default: another each time, printed)")
    parser.add_argument("--only", action="append", choices=AREAS, help="this area; may be repeated")
    parser.add_argument("--case", type=int, help="this case alone, in this process (with --seed and --only)")
    parser.add_argument("--short", action="store_true", help="a fixed number of cases of each area, less than a minute")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time (default: one a processor)")
    parser.add_argument("--folder", type=Path, help="where the files are made (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="the summary as JSON on standard output")
    parser.add_argument("--results", type=Path, help="write the summary to this JSON file")
    parser.add_argument("--page", type=Path, help="put the table into this Markdown file, between its marks")
    parser.add_argument("-v", action="store_true", help="tracebacks")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 31)
    return options


def quiet() -> None:
    """Warnings about what was damaged are expected by the thousand."""
    logging.getLogger("fate_moe").setLevel(logging.CRITICAL)
    logging.getLogger("fate_moe").propagate = False
    logging.getLogger("fate_moe").addHandler(logging.NullHandler())
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def _material(home: Path) -> Material:
    """Made in a process of its own: those that are forked later have run no model."""
    home.mkdir()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_make, args=(home, theirs))
    process.start()
    theirs.close()
    facts = ours.recv()
    process.join()
    return Material(home, facts)


def _make(home: Path, pipe: object) -> None:
    os.environ["FATE_HOME"] = str(home / "fate-home")
    pipe.send(make_material(home))  # type: ignore[attr-defined]


def _short(areas: list[Area]) -> Iterator[tuple[Area, int]]:
    for area in areas:
        for number in range(area.short):
            yield area, number


class _Timed:
    """Jobs until ``until``: whichever area has had the least time for its share is next; at least one case of each."""

    def __init__(self, areas: list[Area], until: float) -> None:
        self._areas, self._until = areas, until
        self._numbers = dict.fromkeys((area.name for area in areas), 0)
        self._spent = dict.fromkeys(self._numbers, 0.0)
        self._done = dict.fromkeys(self._numbers, 0)

    def __iter__(self) -> Iterator[tuple[Area, int]]:
        while time.monotonic() < self._until or not all(self._numbers.values()):
            area = min(self._areas, key=lambda area: (self._expected(area.name) / area.share, self._numbers[area.name]))
            self._numbers[area.name] += 1
            yield area, self._numbers[area.name] - 1

    def _expected(self, name: str) -> float:
        """Seconds that were spent, and that cases under way will take."""
        done = max(1, self._done[name])
        return self._spent[name] / done * max(self._numbers[name], done)

    def note(self, outcome: Outcome) -> None:
        self._done[outcome.area] += 1
        self._spent[outcome.area] += outcome.seconds


def _failure(outcome: Outcome, seed: int) -> str:
    again = f"python -m tests.torture --seed {seed} --only {outcome.area} --case {outcome.number}"
    return f"{outcome.outcome.upper()}: {outcome.area} {outcome.number}: {outcome.kind}: {outcome.detail}\n  again: {again}"


if __name__ == "__main__":
    sys.exit(main())
