"""The server's description of itself: what the bodies of its endpoints may hold, as OpenAPI schemas."""

from __future__ import annotations

from typing import Any

from ...modeling.excluded_tokens import LARGEST_ID, NAMED_TOKENS, has_named_token
from ...modeling.feature_edits import OPS, UNITS
from ...modeling.gates import MOST_SKIPPED, OVER, POOLS
from ...modeling.steering import POSITIONS
from ...modeling.strength import DECAYS, STRENGTH_UNITS
from ..detecting import MAX_TEXTS, POOLINGS
from ..requests import MAX_ANSWERS, MAX_STOP_TEXTS, ROLES, WITHOUT_EFFECT, Reader
from ..steering_field import LONGEST_NAME, MAX_CONDITIONS, MAX_EDITS, MAX_EXCLUDED, MAX_RANGES

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
TRUTH: Schema = {"type": "boolean"}
ERRORS = {
    400: "the request is wrong", 401: "without the server's key", 403: "under a name that is not allowed",
    404: "no such model", 408: "the body took too long", 413: "the body is too long", 429: "too many wait",
    503: "not now",
}  # fmt: skip


class Description:
    """Schemas for one model.

    Args:
        reader: of its requests.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.token = _whole(0, reader.vocabulary - 1)

    def chat(self) -> Schema:
        """`openapi_extra` of /v1/chat/completions."""
        fields = {
            "messages": self._messages(),
            "chat_template_kwargs": {"type": "object"},
            "max_completion_tokens": _whole(1),
            **self._written(),
        }
        return self._body(fields, "messages")

    def completion(self) -> Schema:
        """`openapi_extra` of /v1/completions."""
        ids: Schema = {"type": "array", "items": self.token, "minItems": 1}
        several: Schema = {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_ANSWERS}
        prompts = [TEXT, several, ids, {"type": "array", "items": ids, "minItems": 1, "maxItems": MAX_ANSWERS}]
        return self._body({"prompt": {"anyOf": prompts}, **self._written()}, "prompt")

    def response(self) -> Schema:
        """`openapi_extra` of /v1/responses."""
        fields = {
            "input": {"anyOf": [TEXT, self._messages()]},
            "instructions": TEXT,
            "max_output_tokens": _whole(1),
            "steering": self._steering(),
            "stream": TRUTH,
            **self._sampling(),
        }
        return self._body(fields, "input")

    def detection(self) -> Schema:
        """`openapi_extra` of /v1/detect."""
        fields = {
            "input": {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_TEXTS}]},
            "feature": self._feature(),
            "sae": self._sae(),
            "pooling": {"enum": list(POOLINGS)},
            "pre_activations": TRUTH,
            "skip_first": _whole(0),
            "per_token": TRUTH,
        }
        return self._body(fields, "input", "feature")

    def _body(self, fields: Schema, *required: str) -> Schema:
        schema: Schema = {
            "type": "object",
            "properties": {"model": {"enum": list(self.reader.names)}, **fields, **dict.fromkeys(WITHOUT_EFFECT, {})},
            "required": ["model", *required],
            "additionalProperties": False,
        }
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    def _messages(self) -> Schema:
        parts: Schema = {
            "type": "object", "properties": {"type": {"enum": ["text"]}, "text": TEXT}, "required": ["type", "text"]
        }  # fmt: skip
        content: Schema = {"anyOf": [TEXT, {"type": "array", "items": parts}]}
        fields = {"role": {"enum": [*ROLES, "developer"]}, "content": content}
        message: Schema = {"type": "object", "properties": fields, "required": ["role", "content"]}
        return {"type": "array", "items": message, "minItems": 1}

    def _written(self) -> Schema:
        usage: Schema = {"type": "object", "properties": {"include_usage": TRUTH}, "additionalProperties": False}
        own: Schema = {"max_tokens": _whole(1), "n": _whole(1, MAX_ANSWERS), "stream": TRUTH, "stream_options": usage}
        return {**own, "steering": self._steering(), **self._sampling()}

    def _sampling(self) -> Schema:
        stop: Schema = {**TEXT, "minLength": 1}
        return {
            "temperature": _number(0, 100),
            "top_k": _whole(0),
            "top_p": _number(0, 1, above=True),
            "min_p": _number(0, 1),
            "repetition_penalty": _number(0, 100, above=True),
            "presence_penalty": _number(-2, 2),
            "frequency_penalty": _number(-2, 2),
            "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100)},
            "seed": _whole(-(2**63)),
            "stop": {"anyOf": [stop, {"type": "array", "items": stop, "maxItems": MAX_STOP_TEXTS}]},
        }

    def _steering(self) -> Schema:
        edit: Schema = {
            "type": "object",
            "properties": {
                "sae": self._sae(), "feature": self._feature(), "op": {"enum": list(OPS)}, "value": {"type": "number"},
                "unit": {"enum": list(UNITS)},
            },
            "required": ["feature", "op"],
            "additionalProperties": False,
        }  # fmt: skip
        scores: Schema = {"type": "array", "items": {"type": "number", "minimum": 0}, "maxItems": self._widest()}
        reweighting: Schema = {
            "type": "object",
            "properties": {
                "sae": self._sae(), "scores": scores, "mode": {"enum": ["swap", "weight"]}, "legacy": TRUTH
            },
            "required": ["scores"],
            "additionalProperties": False,
        }  # fmt: skip
        edit["properties"]["when"] = {"anyOf": [{"const": "active"}, self._gate()]}
        edit["properties"]["strength"] = {"anyOf": [{"const": "adaptive"}, self._strength()]}
        edit["properties"]["exclude_tokens"] = self._excluded()
        edits: Schema = {"type": "array", "items": {"anyOf": [edit, reweighting]}, "maxItems": MAX_EDITS}
        bound: Schema = {"type": ["integer", "null"]}
        ranges: Schema = {"type": "array", "items": bound, "minItems": 2, "maxItems": 2}
        positions = [{"enum": list(POSITIONS)}, {"type": "array", "items": ranges, "maxItems": MAX_RANGES}]
        several: Schema = {"type": "array", "items": self._sae(), "maxItems": len(self._saes())}
        whole: Schema = {
            "type": "object",
            "properties": {
                "edits": edits, "positions": {"anyOf": positions}, "keep_error": TRUTH, "reconstruct": several,
                "balance": TRUTH, "when": self._gate(), "exclude_tokens": self._excluded(),
                "strength": self._strength(), "receipt": {"type": ["object", "null"]},
            },
            "additionalProperties": False,
        }  # fmt: skip
        return {"anyOf": [whole, edits, {"enum": [False, None]}]}

    def _excluded(self) -> Schema:
        """Tokens by id, or by a name that the tokenizer knows."""
        known = [name for name in NAMED_TOKENS if has_named_token(name, self.reader.tokenizer)]
        tokens: Schema = {"anyOf": [_whole(0, LARGEST_ID), *([{"enum": known}] if known else [])]}
        return {"type": "array", "items": tokens, "maxItems": MAX_EXCLUDED}

    def _gate(self) -> Schema:
        """A condition, or several of which all or one must hold."""
        number: Schema = {"type": "number"}
        values = {
            "feature": self._feature(), "sae": self._sae(), "above": number, "pre_activations": TRUTH, "negate": TRUTH,
            "skip_first": _whole(0, MOST_SKIPPED),
        }  # fmt: skip
        pooled: Schema = {"over": {"enum": list(OVER)}, "pool": {"enum": list(POOLS)}}
        one = [
            {"type": "object", "properties": {**values, **more}, "required": needed, "additionalProperties": False}
            for more, needed in ((pooled, ["feature"]), ({"until": number}, ["feature", "until"]))
        ]
        parts: Schema = {"type": "array", "items": {"anyOf": one}, "minItems": 1, "maxItems": MAX_CONDITIONS}
        combined = [
            {
                "type": "object", "properties": {name: parts, "negate": TRUTH}, "required": [name],
                "additionalProperties": False,
            }
            for name in ("every", "some")
        ]  # fmt: skip
        return {"anyOf": [*one, *combined]}

    def _strength(self) -> Schema:
        number: Schema = {"type": "number"}
        values = {
            "feature": self._feature(), "sae": self._sae(), "unit": {"enum": list(STRENGTH_UNITS)},
            "pre_activations": TRUTH, "first": _whole(1), "decay": {"enum": list(DECAYS)},
            "over": {**number, "exclusiveMinimum": 0}, **dict.fromkeys(("low", "high", "least", "most"), number),
        }  # fmt: skip
        return {"type": "object", "properties": values, "additionalProperties": False}

    def _saes(self) -> list[Any]:
        return self.reader.model.config.sae_configs

    def _widest(self) -> int:
        return max((sae.d_sae for sae in self._saes()), default=0)

    def _sae(self) -> Schema:
        return _whole(0, max(0, len(self._saes()) - 1))

    def _feature(self) -> Schema:
        names = sorted({name for sae in self._saes() for name in sae.concepts if len(name) <= LONGEST_NAME})
        return {"anyOf": [_whole(0, max(0, self._widest() - 1)), {**TEXT, "examples": names[:8]}]}


def errors() -> dict[int | str, dict[str, Any]]:
    """`responses` of an endpoint with a body."""
    fields = {
        "message": TEXT,
        "type": TEXT,
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    }
    schema: Schema = {
        "type": "object",
        "properties": {"error": {"type": "object", "properties": fields, "required": list(fields)}},
        "required": ["error"],
    }
    content = {"application/json": {"schema": schema}}
    return {status: {"description": told, "content": content} for status, told in ERRORS.items()}


def _number(low: float, high: float, *, above: bool = False) -> Schema:
    return {"type": "number", "exclusiveMinimum" if above else "minimum": low, "maximum": high}


def _whole(low: int, high: int = 2**63 - 1) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}
