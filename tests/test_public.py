"""The public face: names, help without torch, types."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import resource
import subprocess
import sys

import pytest

import fate_moe
from fate_moe import errors

MODULES = [name for _, name, _ in pkgutil.walk_packages(fate_moe.__path__, "fate_moe.") if not name.endswith("__main__")]


@pytest.mark.parametrize("name", ["fate_moe", *MODULES])
def test_exported_names_exist_and_say_what_they_are(name: str) -> None:
    module = importlib.import_module(name)  # ruff sorts __all__
    for exported in getattr(module, "__all__", []):
        value = getattr(module, exported)
        assert value.__doc__ or not (inspect.isclass(value) or inspect.isfunction(value)), f"{exported} has no docstring"


def test_what_is_public_is_what_is_exported() -> None:
    """Every name without an underscore that is not a module, and those that are imported when first asked for."""
    modules = {name for name, value in vars(fate_moe).items() if inspect.ismodule(value)}
    names = {name for name in vars(fate_moe) if not name.startswith("_")} - modules - {"annotations", "TYPE_CHECKING", "Any"}
    assert names | set(fate_moe._LAZY) | {"__version__"} == set(fate_moe.__all__)
    assert list(fate_moe.__all__) == sorted(fate_moe.__all__)
    assert set(errors.__all__) <= set(fate_moe.__all__)


def test_load_says_what_it_gives() -> None:
    assert inspect.signature(fate_moe.load).return_annotation == "Loaded"
    said = {name: kind.__forward_arg__ for name, kind in fate_moe.Loaded.__annotations__.items()}
    assert said == {"model": "PreTrainedModel", "tokenizer": "PreTrainedTokenizerBase"}


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        fate_moe.lod  # noqa: B018


def test_help_is_instant_and_imports_no_torch() -> None:
    code = (
        "import sys, fate_moe.cli\ntry: fate_moe.cli.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    assert seconds < 0.5  # of a processor; measured 0.06: a broken promise, not a benchmark
