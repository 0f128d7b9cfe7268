"""`/v1/detect` and `/v1/features` on vLLM's server, with bodies and answers of our own server."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import secrets
from argparse import Namespace
from typing import Any

import torch
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from ..modeling.feature_reading import pooled
from ..serving.bodies import Body, read_json
from ..serving.detecting import TEXTS_AT_ONCE, Detecting, describe_saes, read_detection
from ..serving.errors import RequestError
from ..serving.prompts import PromptReader
from .asked import READ, STEERING
from .config import sae_config
from .detection import METHOD


class SaeEndpoints:
    """vLLM's endpoint plugin; it is loaded where `VLLM_PLUGINS` names it, as `sae-transformers serve` does."""

    name = "sae_transformers"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        router = APIRouter()
        router.add_api_route("/v1/features", _features, methods=["GET"])
        router.add_api_route("/v1/detect", _detect, methods=["POST"])
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Keep the engine and what reads requests for its model."""
        config = sae_config(engine_client.model_config)
        names = args.served_model_name or [args.model]
        names = [names] if isinstance(names, str) else names
        context = engine_client.model_config.max_model_len
        reader = PromptReader(engine_client.renderer.get_tokenizer(), names, config.sae_configs, context)
        state.sae_detector = VllmDetector(engine_client, reader)


def endpoints() -> SaeEndpoints:
    """The entry point `vllm.endpoint_plugins`."""
    return SaeEndpoints()


async def _features(request: Request) -> JSONResponse:
    return JSONResponse(describe_saes(request.app.state.sae_detector.reader.saes))


async def _detect(request: Request) -> JSONResponse:
    detector: VllmDetector = request.app.state.sae_detector
    try:
        body = Body(read_json(await request.body()))
        asked = await asyncio.to_thread(read_detection, detector.reader, body)  # it tokenizes: others go on meanwhile
        return JSONResponse(await detector.detect(asked))
    except RequestError as error:
        return JSONResponse(error.body(), error.status)


class VllmDetector:
    """Scores texts by features, unsteered whatever the default: each text is a prompt whose values are read in the
    pass. vLLM runs the layers after the SAE too, so it costs a whole prefill."""

    def __init__(self, engine: Any, reader: PromptReader) -> None:
        self.engine, self.reader = engine, reader

    async def detect(self, asked: Detecting) -> dict[str, Any]:
        """The answer to a request."""
        feature = self.reader.saes[asked.sae].resolve_feature(asked.feature)
        at_once = asyncio.Semaphore(TEXTS_AT_ONCE)

        async def scored(row: int) -> dict[str, Any]:
            async with at_once:
                values = await self._values(asked, feature, list(asked.ids[row]))
            return {"object": "detection", "index": row, **_entry(asked, self.reader, row, values)}

        data = await asyncio.gather(*(scored(row) for row in range(len(asked.ids))))
        total = sum(len(row) for row in asked.ids)
        return {
            "object": "list",
            "model": self.reader.names[0],
            "sae": asked.sae,
            "feature": feature,
            "pooling": asked.pooling,
            "data": data,
            "usage": {"prompt_tokens": total, "total_tokens": total},
        }

    async def _values(self, asked: Detecting, feature: int, ids: list[int]) -> list[float]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        key = secrets.token_hex(16)  # vLLM renames requests
        reading = {"key": key, "sae": asked.sae, "feature": feature, "pre_activations": asked.pre_activations}
        params = SamplingParams(
            max_tokens=1, detokenize=False, skip_reading_prefix_cache=True,
            extra_args={STEERING: False, READ: reading},
        )  # fmt: skip
        # All replicas are asked what they have found, and the first one's answer is what comes back.
        parallel = self.engine.vllm_config.parallel_config
        rank = 0 if parallel.data_parallel_size > 1 else None
        async for _ in self.engine.generate(TokensPrompt(prompt_token_ids=ids), params, key, data_parallel_rank=rank):
            pass
        found = await self.engine.collective_rpc(METHOD, args=(key,))
        values = next((part for part in found if part is not None), None)
        if values is None or len(values) != len(ids):
            raise RequestError("The engine lost what it read; try again.", status=503)
        return values


def _entry(asked: Detecting, reader: PromptReader, row: int, values: list[float]) -> dict[str, Any]:
    scores = torch.tensor([values])
    counted = torch.arange(scores.shape[1])[None] >= asked.skip_first
    found = pooled(scores, counted, asked.pooling)
    entry: dict[str, Any] = {"score": found.per_text.item()}
    if asked.per_token:
        entry["tokens"] = [reader.tokenizer.decode([token]) for token in asked.ids[row]]
        entry["values"] = found.per_token[0].tolist()
    return entry
