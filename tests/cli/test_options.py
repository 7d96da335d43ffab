"""Every option of every verb, with values out of every range: it works, or is refused in one line before anything is loaded.

The parser's own actions are walked, so that a new option is tried without being named here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fate_moe.cli
from fate_moe.cli import build_parser, main
from fate_moe.cli.parser import Number
from fate_moe.engine import load, prepare
from fate_moe.errors import ConfigError
from fate_moe.gpu import device
from fate_moe.store import convert
from fate_moe.tools import tracing

HOSTILE = (
    *("", " ", "words", "0", "-1", "1.5", "nan", "inf", "-inf", "1e400", "1e3", " 4", "0x10", "1_000", "\u0664", "\uff14GiB", "--"),
    *(
        "99999999999999999999999",
        "9" * 400,
        "4Gib",
        "4g",
        "-1GiB",
        "0%",
        "101%",
        "1e999GiB",
        "\n",
        "a\tb",
        "\udcff",
        "\x1b[2J",
        "True",
    ),
)
# What a verb must be given, so that one bad option is all that is wrong.
NEEDED = {
    "convert": ["checkpoint", "store"],
    "inspect": ["store"],
    "rm": ["store"],
    "trace": ["--prompts", "TEXT", "--out", "OUT"],
    "simulate": ["TRACE"],
    "fit": ["--text", "TEXT"],
    "plot": ["TRACE", "--out", "PICTURE"],
    "eval perplexity": ["--text", "TEXT"],
    "eval compare": ["model", "--text", "TEXT"],
}
REACHED = "the model would be loaded now"
PARSER = build_parser()


def verbs(parser: argparse.ArgumentParser, said: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from verbs(child, f"{said} {name}".strip())
            return
    yield said, parser


def valued() -> list[Any]:
    """(verb, action) for every option that takes a value."""
    return [
        pytest.param(verb, action, id=f"{verb} {action.option_strings[-1]}")
        for verb, parser in verbs(PARSER)
        for action in parser._actions
        if action.option_strings and action.nargs != 0
    ]


def exit_code(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Whatever opens a model, a checkpoint or a GPU says so instead; the placeholders of NEEDED and their files."""

    def reached(*arguments: Any, **options: Any) -> Any:
        raise ConfigError(REACHED)

    for module, name in ((prepare, "store_for"), (prepare, "plan"), (convert, "convert"), (device, "find_gpu")):
        monkeypatch.setattr(module, name, reached)
    monkeypatch.setattr(load, "build", reached)
    monkeypatch.setattr(tracing, "store_for", reached)  # imported by then, or not
    monkeypatch.setattr("fate_moe.checkpoints.source.resolve_checkpoint", reached)
    monkeypatch.setattr(fate_moe.cli, "build_parser", lambda: PARSER)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("Once upon a time")
    return {"TEXT": "text", "OUT": "out.npz", "TRACE": "text", "PICTURE": "picture.png"}


@pytest.mark.parametrize(("verb", "action"), valued())
def test_hostile_values(
    verb: str, action: argparse.Action, nothing_loads: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    needed = [nothing_loads.get(word, word) for word in NEEDED.get(verb, [])]
    before = sorted(Path().iterdir())
    for value in HOSTILE:
        code = exit_code([*verb.split(), *needed, f"{action.option_strings[-1]}={value}"])
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("fate") and "http://" not in line]
        assert code in (1, 2), f"{value!r}: {said.err}"
        assert len(lines) == 1, f"{value!r}: {said.err}"
        assert "is not known" not in lines[0], f"{value!r} is met by the net alone: {lines[0]}"
        assert said.out == ""
    assert sorted(Path().iterdir()) == before, "nothing was written"


@pytest.mark.parametrize(("verb", "action"), valued())
def test_numbers_have_a_range(verb: str, action: argparse.Action) -> None:
    """An option of a number says which numbers; the only bare ones are chosen from a list."""
    assert action.type not in (int, float) or action.choices, f"{verb} {action.option_strings}: use cli.parser.count or number"
    if isinstance(action.type, Number):
        for value in ("nan", "inf", "1e400", "", "0x10", "\u0664", "1_000"):
            with pytest.raises((argparse.ArgumentTypeError, ConfigError)):
                action.type(value)
        assert action.default is None or action.type.range.holds(action.default)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "x", "--temperature", "-1"], "--temperature: -1 is not a number of at least 0"),
        (["run", "x", "--temperature", "1e400"], "--temperature: 1e400 is not a number"),
        (["run", "x", "--top-p", "1.5"], "--top-p: 1.5 is not a number of at least 0 and at most 1"),
        (["run", "x", "--min-p", "2"], "--min-p: 2 is not"),
        (["run", "x", "--top-k", "-1"], "--top-k: -1 is not a whole number of at least 0"),
        (["run", "x", "--repetition-penalty", "0"], "--repetition-penalty: 0 is not"),
        (["run", "x", "--num-beams", "0"], "--num-beams: 0 is not a whole number of at least 1"),
        (["run", "x", "--seed", "-1"], "--seed: -1 is not"),
        (["run", "x", "--seed", str(1 << 64)], "--seed: 18446744073709551616 is not"),
        (["run", "x", "--io-threads", "100000"], "--io-threads: 100000 is not a whole number of at least 2 and at most 256"),
        (["run", "x", "--ram", "1e9"], "ram: '1e9' is not a size"),
        (["run", "x", "--ram", "9" * 400 + "GiB"], "is not a size"),
        (["run", "x", "--no-do-sample", "--top-k", "5"], "--top-k is for sampling"),
        (["run", "x", "--no-do-sample", "--temperature", "0.7"], "--temperature is for sampling"),
        (["trace", "--prompts", "text", "--out", "text"], "text is what is read; name another file"),
        (["trace", "--prompts", "text", "--out", "."], ". is a folder; name a file"),
        (["trace", "--prompts", "text", "--out", "none/t.npz"], "there is no folder"),
        (["trace", "--prompts", "text", "--out", "/dev/null"], "is no regular file"),
        (["plot", "text", "--out", "x.nope"], "names no format of a picture"),
        (["plot", "text", "--out", "x"], "names no format of a picture"),
        (["simulate", "text", "--disk-gbps", "0"], "--disk-gbps: 0 is not a number above 0"),
        (["simulate", "text", "--policy", "lru,nope"], "policy 'nope' is not one of"),
        (["simulate", "text", "--capacity", "nan"], "--capacity 'nan'"),
        (["eval", "perplexity", "--text", "text", "--window", "4", "--stride", "4"], "skips tokens"),
        (["eval", "perplexity", "--text", "text", "--window", "9", "--context-length", "4"], "--window 9 is longer"),
    ],
)
def test_what_is_refused_names_the_option(
    arguments: list[str], says: str, nothing_loads: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "0"],
        ["--temperature", "0", "--do-sample"],
        ["--temperature", "0", "--no-do-sample"],
        ["--temperature", "1e-30"],
        ["--top-k", "0"],
        ["--seed", str((1 << 64) - 1)],
        ["--no-do-sample", "--seed", "3"],
        ["--ram", "99TiB"],
        ["--ram", " 4 GiB "],
        ["--context-length", " 4"],
    ],
)
def test_what_works_reaches_the_model(
    options: list[str], nothing_loads: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "Once upon", *options]) == 1
    assert capsys.readouterr().err == f"fate: {REACHED}\n"


@pytest.mark.parametrize(
    ("options", "means"),
    [
        (["--temperature", "0"], {"do_sample": False, "temperature": 1.0}),
        (["--temperature", "0", "--do-sample"], {"do_sample": False, "temperature": 1.0}),
        (["--temperature", "0.7"], {"do_sample": True, "temperature": 0.7}),
        (["--top-k", "5"], {"do_sample": True, "top_k": 5}),
        (["--num-beams", "3"], {"num_beams": 3}),
        ([], {}),
    ],
)
def test_what_sampling_options_mean(options: list[str], means: dict[str, Any]) -> None:
    parsed = PARSER.parse_args(["run", "x", "--max-new-tokens", "3", *options])
    assert fate_moe.cli.options.generate_options(parsed) == {"max_new_tokens": 3, **means}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["runn"], "did you mean run?"),
        (["run", "--polcy", "lru"], "did you mean --policy?"),
        (["run", "x", "--preset", "fste"], "did you mean fate?"),
        (["run", "-p", "--do-sample"], "given as --prompt=VALUE"),
        (["run", "-x y"], "fate: "),
        (["eval"], "see fate eval --help"),
        (["chat", "--top-k", "five"], "'five' is not a whole number"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(
    arguments: list[str], says: str, nothing_loads: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(arguments) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line or REACHED in line


def test_prompts_that_begin_with_a_dash() -> None:
    for words, prompt in ((["-p=-5 degrees"], "-5 degrees"), (["--prompt=--help me"], "--help me")):
        assert PARSER.parse_args(["run", *words]).prompt_option == prompt
    assert PARSER.parse_args(["run", "model", "--", "--help me"]).prompt == "--help me"


def test_fate_alone_and_fate_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "VERB" in capsys.readouterr().err
    for words, says in ((["help"], "write text"), (["help", "run"], "--temperature"), (["help", "eval", "compare"], "reference")):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 0
        assert says in capsys.readouterr().out
