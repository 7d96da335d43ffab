"""What SECURITY.md says of the sources: nothing is unpickled, no remote code runs, no shell is asked, no secret is logged."""

from __future__ import annotations

import ast
import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fate_moe
from fate_moe.checkpoints.source import resolve_checkpoint
from fate_moe.errors import CheckpointError

SOURCES = sorted(Path(fate_moe.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml", "xml"}
CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "tempfile.mktemp", "pickle.loads", "subprocess.getoutput"}


def found(tree: ast.AST) -> Iterator[str]:
    """What must not be in a source, in words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in CALLS:
                yield f"calls {name}"
            if name.endswith(("np.load", "numpy.load")) and given.get("allow_pickle") != "False":
                yield "numpy.load without allow_pickle=False"
            if given.get("shell", "False") != "False" or given.get("trust_remote_code", "False") != "False":
                yield f"{name} with {given}"


@pytest.mark.parametrize(
    "code", ["import pickle", "torch.load(x)", "np.load(x)", "subprocess.run(x, shell=True)", "f(trust_remote_code=a)"]
)
def test_what_is_forbidden_is_found(code: str) -> None:
    assert list(found(ast.parse(code)))


def test_no_source_unpickles_evaluates_or_asks_a_shell() -> None:
    assert len(SOURCES) > 100
    assert {str(path): said for path in SOURCES if (said := list(found(ast.parse(path.read_text()))))} == {}


def test_the_hubs_token_is_in_no_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    with caplog.at_level(logging.DEBUG), pytest.raises(CheckpointError) as caught:
        resolve_checkpoint("nobody/nothing")
    assert "secret" not in str(caught.value) + caplog.text


def test_the_servers_key_and_forged_lines_are_not_in_its_log(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("fastapi")
    from fate_moe.serve.guards import Guard, RequestLog
    from fate_moe.serve.options import ServeOptions

    options = ServeOptions(api_key="sk-secret", log_requests=True)
    assert "secret" not in repr(options)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def nothing(*_: Any) -> Any:
        return {"type": "http.request", "body": b""}

    guarded = Guard(app, options.api_key, (), options.max_body)
    logged = RequestLog(guarded, lambda route, status: None, log=True)
    for key in (b"sk-secret", b"sk-wrong"):
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/x\n\x1b[31mforged",
            "headers": [(b"authorization", b"Bearer " + key)],
        }
        with caplog.at_level(logging.DEBUG):
            asyncio.run(logged(scope, nothing, nothing))
    lines = [record.getMessage() for record in caplog.records if record.name == "fate_moe.serve.requests"]
    assert [line.split()[2] for line in lines] == ["200", "401"]
    assert not any("sk-" in line or "\n" in line or "\x1b" in line for line in lines)
