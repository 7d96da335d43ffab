"""The application: guards, routes, errors. It knows no model; ``service`` does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.concurrency import run_in_threadpool

import fate_moe
from fate_moe.serve import anthropic_messages, native, openai_chat, openai_completions, page, responses
from fate_moe.serve.errors import add_error_handlers
from fate_moe.serve.guards import Guard, RequestLog
from fate_moe.serve.service import Service

__all__ = ["build_app"]


def build_app(service: Service) -> FastAPI:
    """The ASGI application of ``service``, which is closed when the application ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.stopping.set()
        await run_in_threadpool(service.close)

    # No page of the schema: FastAPI's takes its scripts from another host.
    app = FastAPI(
        title="fate serve", version=fate_moe.__version__, lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None
    )
    app.state.service = service
    for part in (native, openai_chat, openai_completions, responses, anthropic_messages):
        app.include_router(part.router)
    page.mount(app, service)
    add_error_handlers(app)
    options = service.options
    # The last one added is the first that a request meets.
    app.add_middleware(Guard, api_key=options.api_key, allowed_hosts=options.allowed_hosts, max_body=options.max_body)
    if options.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(RequestLog, count=service.metrics.answered, log=options.log_requests)
    return app
