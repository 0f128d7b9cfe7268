"""What the endpoints are asked for, read from bodies and checked against the model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..modeling import Steering
from .bodies import Body, checked_text, is_number, wrong
from .errors import RequestError
from .prompts import PromptReader
from .sampling import COLDEST, Sampling, published_sampling
from .steering_field import read_steering

MAX_ANSWERS, MAX_STOP_TEXTS = 128, 16
ROLES = ("system", "user", "assistant")
# They say something about the request, not about its answer.
WITHOUT_EFFECT = (
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
)  # fmt: skip
NO_TOOLS, NO_LOGPROBS = "this server calls no tools", "this server returns no log-probabilities"
FREE_TEXT = "answers are not constrained to a format; ask for it in words and check the answer"


@dataclass(frozen=True)
class Asked:
    """A request to write. prompts: token ids, one list for each. n: answers to each prompt."""

    prompts: tuple[tuple[int, ...], ...]
    steering: Steering
    sampling: Sampling
    n: int = 1
    stream: bool = False
    include_usage: bool = False


class Reader(PromptReader):
    """Reads requests for one model.

    Args:
        model: a `SaeForCausalLM`.
        names: under which the model is served; the first is told.
        max_tokens: of an answer, where a request does not say.
    """

    def __init__(self, model: Any, tokenizer: Any, names: Sequence[str], max_tokens: int) -> None:
        text_config = model.config.get_text_config(decoder=True)
        context = getattr(text_config, "max_position_embeddings", None) or 2**31
        super().__init__(tokenizer, names, model.config.sae_configs, context)
        self.model = model
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.published = published_sampling(model.generation_config, max_tokens)
        saved = getattr(model.generation_config, "sae_steering", None)
        default = model.steering if saved is None else Steering.coerce(saved)
        self.default_steering = default.with_tokenizer(tokenizer)

    # -- endpoints ---------------------------------------------------------------------------------------------------

    def chat(self, body: Body) -> Asked:
        self.check_model(body)
        messages = read_messages(body.take("messages"))
        template_options = body.take("chat_template_kwargs", {})
        reserved = inspect.signature(self.tokenizer.apply_chat_template).parameters
        if not isinstance(template_options, dict) or any(name in reserved for name in template_options):
            raise wrong("chat_template_kwargs", "must be an object of the template's own variables", template_options)
        for name, values in (("tools", [[]]), ("functions", [[]]), ("tool_choice", ["none", "auto"]),
                             ("function_call", ["none", "auto"])):  # fmt: skip
            body.neutral(name, values, NO_TOOLS)
        body.neutral("response_format", [{"type": "text"}], FREE_TEXT)
        body.neutral("logprobs", [False], NO_LOGPROBS)
        body.neutral("top_logprobs", [0], NO_LOGPROBS)
        body.neutral("modalities", [["text"]], "this server writes text")
        prompt = self.chat_ids(messages, template_options)
        longest = body.whole("max_completion_tokens", None, 1)
        max_tokens = body.whole("max_tokens", None, 1)
        return self._asked(body, [prompt], max_tokens if longest is None else longest)

    def completion(self, body: Body) -> Asked:
        self.check_model(body)
        prompts = self._prompts(body.take("prompt"))
        body.neutral("echo", [False], "the prompt is not repeated")
        body.neutral("suffix", [""], "the model does not fill in the middle")
        body.neutral("best_of", [1], NO_LOGPROBS)
        body.neutral("logprobs", [], NO_LOGPROBS)
        return self._asked(body, prompts, body.whole("max_tokens", None, 1))

    def _asked(self, body: Body, prompts: Sequence[Sequence[int]], max_tokens: int | None) -> Asked:
        steering = self.steering(body.take("steering"))
        n = body.whole("n", 1, 1, MAX_ANSWERS)
        if n * len(prompts) > MAX_ANSWERS:
            raise wrong("n", f"times the prompts must be at most {MAX_ANSWERS} answers", n)
        stream = body.truth("stream", False)
        options = body.take("stream_options", {})
        if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
            raise wrong("stream_options", "must be an object with include_usage", options)
        if options and not stream:
            raise wrong("stream_options", "goes with stream=true", options)
        sampling = self.sampling(body, prompts, max_tokens)
        body.ignore(*WITHOUT_EFFECT)
        body.end()
        wanted = tuple(tuple(prompt) for prompt in prompts)
        return Asked(wanted, steering, sampling, n, stream, bool(options.get("include_usage")))

    # -- parts -------------------------------------------------------------------------------------------------------

    def steering(self, value: Any) -> Steering:
        """None: the published default. False: none."""
        if value is None:
            return self.default_steering
        return read_steering(value, [sae.d_sae for sae in self.saes], self.check_steering, self.tokenizer)

    def check_steering(self, steering: Steering) -> None:
        """Raises ValueError for steering that this model does not have."""
        self.model.prepare_steering(steering)

    def sampling(self, body: Body, prompts: Sequence[Sequence[int]], max_tokens: int | None) -> Sampling:
        longest = max(len(prompt) for prompt in prompts)
        room = self.context - longest
        if room < (max_tokens or 1):
            raise self.too_long(f"{longest} of a prompt" + (f" and {max_tokens} of an answer" if max_tokens else ""))
        known = self.published
        temperature = body.number("temperature", known.temperature, 0, 100)
        stop = body.take("stop", ())
        stop = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
        if (
            not isinstance(stop, tuple)
            or len(stop) > MAX_STOP_TEXTS
            or not all(isinstance(s, str) and s for s in stop)
        ):
            raise wrong("stop", f"must be a text or a list of up to {MAX_STOP_TEXTS}, none empty", stop)
        return replace(
            known,
            max_tokens=min(known.max_tokens, room) if max_tokens is None else max_tokens,
            temperature=0.0 if temperature < COLDEST else temperature,
            top_k=body.whole("top_k", known.top_k),
            top_p=body.number("top_p", known.top_p, 0, 1, above=True),
            min_p=body.number("min_p", known.min_p, 0, 1),
            repetition_penalty=body.number("repetition_penalty", known.repetition_penalty, 0, 100, above=True),
            presence_penalty=body.number("presence_penalty", 0.0, -2, 2),
            frequency_penalty=body.number("frequency_penalty", 0.0, -2, 2),
            logit_bias=self._logit_bias(body.take("logit_bias", {})),
            seed=body.whole("seed", None, -(2**63)),
            stop=tuple(checked_text(one, "stop") for one in stop),
        )

    def _logit_bias(self, value: Any) -> dict[int, float]:
        if not isinstance(value, dict) or not all(is_number(v) and abs(v) <= 100 for v in value.values()):
            raise wrong("logit_bias", "must be an object of numbers from -100 to 100 by token id", value)
        ids = [int(name) if name.isascii() and name.isdigit() and len(name) < 10 else -1 for name in value]
        if not all(0 <= token < self.vocabulary for token in ids):
            raise wrong("logit_bias", f"must name token ids below {self.vocabulary}", value)
        return {token: float(bias) for token, bias in zip(ids, value.values(), strict=True)}

    def chat_ids(self, messages: list[dict[str, str]], options: dict[str, Any] | None = None) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise RequestError(
                "The model has no chat template. Use /v1/completions, or give the tokenizer one.", "messages"
            )
        import jinja2

        self.check_length([message["content"] for message in messages], "messages")
        try:
            text = self.tokenizing.rendered(messages, options or {})
            self.check_length([text], "messages")
            self.check_beginning(text, "messages")
            ids = self.tokenizing.ids(text, add_special_tokens=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RequestError(f"The chat template refuses these messages: {error}", "messages") from error
        if not ids:
            raise RequestError("The messages make an empty prompt.", "messages")
        return ids

    def _prompts(self, value: Any) -> list[list[int]]:
        """A text, several, the ids of one, or of several."""
        kind = "must be a text, a list of texts, or token ids"
        if isinstance(value, str):
            return [self.encode(value, "prompt")]
        if not isinstance(value, list) or not value or len(value) > MAX_ANSWERS:
            raise wrong("prompt", f"{kind}, at most {MAX_ANSWERS}", value)
        if all(isinstance(one, str) for one in value):
            return [self.encode(one, "prompt") for one in value]
        many = value if all(isinstance(one, list) and one for one in value) else [value]
        for ids in many:
            if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < self.vocabulary for i in ids):
                raise wrong("prompt", f"{kind} below {self.vocabulary}", value)
        return many


def read_messages(value: Any) -> list[dict[str, str]]:
    """Messages with `role` and `content` as plain text.

    Raises:
        RequestError: none, an unknown role, or a part that is no text.
    """
    if not isinstance(value, list) or not value:
        raise wrong("messages", "must be a list of messages, one at least", value)
    messages = []
    for place, message in enumerate(value):
        name = f"messages[{place}]"
        if not isinstance(message, dict):
            raise wrong(name, "must be an object with role and content", message)
        role = "system" if message.get("role") == "developer" else message.get("role")
        if role not in ROLES:
            raise wrong(f"{name}.role", f"must be one of {', '.join(ROLES)}", role)
        if message.get("tool_calls"):
            raise RequestError(f"`{name}.tool_calls` is not supported: {NO_TOOLS}.", name)
        messages.append({"role": role, "content": _content(message.get("content"), f"{name}.content")})
    return messages


def _content(value: Any, name: str) -> str:
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or part.get("type") not in ("text", "input_text", "output_text"):
            raise wrong(name, "must be a text, or a list of parts of type text", part)
        texts.append(checked_text(text, name))
    return "".join(texts)
