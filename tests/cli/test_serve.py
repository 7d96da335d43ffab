"""``fate serve`` as a process: it says where it is, refuses in one line, and ends when it is told to."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fate_moe
from fate_moe.cli import build_parser, main
from fate_moe.cli.serve import _EXTRA, _api_key
from tests.support.serving import wait_for

pytestmark = pytest.mark.slow


@contextmanager
def serving(*options: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``fate serve`` with the embedded model, ready; with its URL."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fate_moe.__file__).parents[1]), **variables}
    command = [sys.executable, "-m", "fate_moe", "serve", "--port", "0", "--expert-cache", "25%", *options]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.fullmatch(r"ready: (\S+)/v1\n", line):
                yield process, found[1]
                break
        else:
            raise AssertionError("it never was ready")
    finally:
        process.kill()
        process.communicate()


def ask(url: str, body: Any = None, **headers: str) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_it_serves_drains_and_ends_well() -> None:
    with serving("--name", "tales", "--context-length", "512", FATE_API_KEY="sesame") as (process, url):
        key = {"x-api-key": "sesame"}
        assert ask(f"{url}/health")["status"] == "ok"
        props = ask(f"{url}/props", **key)
        assert (props["model"], props["context_length"], props["chat_template"]) == ("tales", 512, "plain")
        body = {"prompt": "It was", "max_tokens": 30, "stream": True, "ignore_eos": True, "seed": 1}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json", **key})  # fmt: skip  # noqa: E501
        with urllib.request.urlopen(request, timeout=120) as answer:
            answer.readline()
            process.send_signal(signal.SIGTERM)
            assert answer.read().decode().rstrip().endswith("data: [DONE]")
        assert process.wait(60) == 0


def test_a_signal_while_it_converts_ends_it_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(fate_moe.__file__).parents[1]), "FATE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "fate_moe", "serve", "--port", "0"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("converting "))
        wait_for(lambda: any(tmp_path.rglob("*.tmp")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
        assert process.stderr.read() == ""
    assert any(tmp_path.rglob("*.partial"))
    assert not any(tmp_path.rglob("*.tmp"))


def test_a_second_one_on_the_port_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from fate_moe.serve.options import ServeOptions
    from fate_moe.serve.server import bind

    listener, url = bind(ServeOptions(port=0))
    with listener:
        assert main(["serve", "--port", url.rpartition(":")[2]]) == 1
    said = capsys.readouterr().err
    assert "is in use, perhaps by another fate serve; stop it, or give another --port" in said
    assert said.count("\n") == 1


def test_without_the_extra_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['fastapi'] = None; from fate_moe.cli import main; sys.exit(main(['serve']))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert "pip install 'fate-moe[serve]'" in found.stderr
    assert found.stderr.count("\n") == 1


def test_other_verbs_do_without_the_extra() -> None:
    code = (
        f"import sys\nfor name in {_EXTRA}: sys.modules[name] = None\n"
        "import fate_moe, fate_moe.cli, fate_moe.schedule.batching, fate_moe.engine.load\nfate_moe.cli.build_parser()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fate_moe", "serve", str(tmp_path), "--port", "0"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith("fate: ")
    assert "Traceback" not in found.stderr


def test_a_budget_that_is_too_small_ends_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "--ram", "1MiB"]) == 1
    assert "budget" in capsys.readouterr().err.splitlines()[-1]


def test_where_the_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(*options: str) -> str | None:
        return _api_key(build_parser().parse_args(["serve", *options]))

    monkeypatch.delenv("FATE_API_KEY", raising=False)
    assert key() is None
    monkeypatch.setenv("FATE_API_KEY", "from-environment")
    assert key() == "from-environment"
    assert key("--api-key", "from-option") == "from-option"
    file = tmp_path / "key"
    file.write_text("from-file\n")
    assert key("--api-key-file", str(file)) == "from-file"
    file.write_text("\n")
    with pytest.raises(fate_moe.ConfigError, match="is empty"):
        key("--api-key-file", str(file))
    with pytest.raises(fate_moe.ConfigError, match="cannot be read: No such file"):
        key("--api-key-file", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--port", "70000"], "port"), (["--queue", "0"], "queue"), (["--max-body", "x"], "size"), (["--api-key", " "], "api key")],
)
def test_options_without_a_meaning(options: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *options]) == 1
    assert word in capsys.readouterr().err


def test_beyond_loopback_without_a_key_there_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, warns in (([], True), (["--api-key", "k"], False)):
        assert main(["serve", str(tmp_path), "--port", "0", "--host", "0.0.0.0", *more]) == 1
        assert ("warning: whoever reaches 0.0.0.0 may use this server" in capsys.readouterr().err) == warns
