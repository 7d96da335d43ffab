"""Routes that OpenAI and Anthropic do not have, named as in llama-server and vLLM where those have them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

import fate_moe
from fate_moe.serve.openai_common import check_model
from fate_moe.serve.prompt import PLAIN_STOP, PLAIN_TEMPLATE, plain_prompt, template_kind, tools_by_system_message
from fate_moe.serve.service import Service, Serving
from fate_moe.serve.wire import Body, JsonRoute

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class TokenizeRequest(Body):
    """``content`` becomes token ids; ``with_pieces``: each with its text."""

    content: str
    model: str | None = None
    add_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(Body):
    """``tokens`` become text."""

    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]]
    model: str | None = None


@router.get("/health", response_model=None)
async def health(service: Serving) -> Response:
    """200 when requests are answered, 503 before and after."""
    status, body = service.health()
    return JSONResponse(body, status, {"Retry-After": "1"} if status == 503 else {})


@router.get("/metrics", response_model=None)
async def metrics(service: Serving) -> Response:
    """Prometheus' text format."""
    return Response(await run_in_threadpool(service.metrics.text), media_type=_METRICS_TYPE)


@router.get("/v1/models", response_model=None)
async def models(service: Serving) -> dict[str, Any]:
    """The model that is served, in the shapes of OpenAI and of Anthropic at once."""
    name = service.model().name
    return {"object": "list", "data": [_model(service)], "has_more": False, "first_id": name, "last_id": name}


@router.get("/v1/models/{name:path}", response_model=None)
async def model(name: str, service: Serving) -> dict[str, Any]:
    """The model, if it has this name."""
    check_model(service.model(), name)
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    card = service.model()
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "fate-moe",
        "type": "model",
        "display_name": card.name,
        "created_at": datetime.fromtimestamp(card.created, timezone.utc).isoformat().replace("+00:00", "Z"),
        "max_model_len": card.context_length,
    }


@router.get("/props", response_model=None)
async def props(service: Serving) -> dict[str, Any]:
    """What is served, and how."""
    card = service.model()
    engine, config = card.model.fate, card.model.fate.config
    plain = template_kind(card) == "plain"
    return {
        "version": fate_moe.__version__,
        "model": card.name,
        "family": card.model.config.model_type,
        "context_length": card.context_length,
        "vocab_size": card.vocab_size,
        "num_layers": card.model.config.get_text_config().num_hidden_layers,
        "experts_per_layer": _experts_per_layer(card.model),
        "budget_bytes": engine.plan.budget_bytes,
        "expert_cache_bytes": engine.plan.expert_cache_bytes,
        "precision": engine.plan.precision,
        "policy": config.policy_name,
        "predictor": config.predictor_name,
        "device": "cuda" if config.on_gpu else "cpu",
        "chat_template": template_kind(card),
        "chat_template_text": PLAIN_TEMPLATE if plain else card.chat_template,
        "chat_template_stop": list(PLAIN_STOP) if plain else [],
        "tools": "system message" if tools_by_system_message(card) else "template",
        "sampling_defaults": card.sampling_defaults,
        "speculate": service.options.speculate,
        "queue": service.options.queue,
        "max_body_bytes": service.options.max_body,
    }


def _experts_per_layer(model: Any) -> list[int]:
    """Of the MoE layers, from the first."""
    from fate_moe.adapter.meta_model import expert_stacks

    return [stack.num_experts for stack in expert_stacks(model)]


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeRequest, service: Serving) -> dict[str, Any]:
    """Token ids of a text."""
    card = service.model()
    check_model(card, body.model)
    tokens = await run_in_threadpool(card.encode, body.content, bool(body.add_special))
    if not body.with_pieces:
        return {"tokens": tokens, "count": len(tokens), "max_model_len": card.context_length}
    pieces = await run_in_threadpool(lambda: [card.decode([token]) for token in tokens])
    return {
        "tokens": [{"id": token, "piece": piece} for token, piece in zip(tokens, pieces, strict=True)],
        "count": len(tokens),
        "max_model_len": card.context_length,
    }


@router.post("/detokenize", response_model=None)
async def detokenize(body: DetokenizeRequest, service: Serving) -> dict[str, Any]:
    """The text of token ids."""
    card = service.model()
    check_model(card, body.model)
    return {"content": (await run_in_threadpool(plain_prompt, card, body.tokens, "tokens")).text}
