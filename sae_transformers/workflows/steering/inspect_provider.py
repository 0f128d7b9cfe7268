"""The model provider `sae-transformers` of Inspect AI: a model with SAEs in process, steered by task or by request.

    inspect eval TASK --model sae-transformers/FOLDER -M steering=steering.json

Inspect loads this module by its entry point. Requests are read as the server reads them and share its running batch.
https://inspect.aisi.org.uk/extensions.html#model-apis
"""

from __future__ import annotations

import json
import math
import threading
from typing import TYPE_CHECKING, Any

from ...latents.optional_packages import needs

with needs("A provider of Inspect", "inspect-ai", "inspect"):
    from inspect_ai.model import (  # pyright: ignore[reportMissingImports]
        ChatCompletionChoice,
        ChatMessageAssistant,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        modelapi,
    )

if TYPE_CHECKING:
    from ...serving.engine import Engine
    from ...serving.requests import Asked

FIELDS = {"stop_seqs": "stop", "num_choices": "n"}  # Inspect's name of a setting: OpenAI's
FIELDS |= {
    name: name
    for name in ("max_tokens", "temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty",
                 "logit_bias", "logprobs", "top_logprobs")
}  # fmt: skip
# What Inspect does itself, and what says nothing about one answer.
OF_INSPECT = (
    "adaptive_connections", "attempt_timeout", "cache", "cache_prompt", "extra_body", "max_connections", "max_retries",
    "max_tool_output", "parallel_tool_calls", "stream_idle_timeout", "system_message", "timeout",
)  # fmt: skip
OPTIONS = ("steering", "saes", "hook_point", "base", "model_dtype", "revision", "max_concurrent")


class SaeTransformersAPI(ModelAPI):
    """A model with SAEs, as `load` takes it.

    Args:
        model_name: a folder or Hub id.
        base_url, api_key: of other providers; there is no server here.
        config: Inspect's.
        model_args: `steering`, in place of the model's own: a file, JSON, or false for none; `max_concurrent`, answers
            that are written together; and `saes`, `hook_point`, `base`, `model_dtype`, `revision` as
            `load` has them.

    Raises:
        ValueError: another argument, a steering that is none or not of this model, or what `load` refuses.
        OSError: the model or the steering's file is not there.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  (as Inspect's own providers)
        **model_args: Any,
    ) -> None:
        if unknown := sorted(model_args.keys() - set(OPTIONS)):
            raise ValueError(f"-M takes {', '.join(OPTIONS)}. Received: {', '.join(unknown)}.")
        if base_url is not None:
            raise ValueError(
                f"The model runs in this process; `openai-api` asks a server. Received: base_url={base_url!r}."
            )
        super().__init__(model_name, None, api_key, [], config)
        from ...modeling import Steering
        from ...serving.requests import Reader
        from ..loading import load, read_steering
        from ..settings.publish import ServeSettings

        given = model_args.pop("steering", None)
        settings = ServeSettings(**{name: model_args.pop(name) for name in ("max_concurrent",) if name in model_args})
        self._concurrent = settings.max_concurrent
        if isinstance(given, (dict, list)):  # as -M reads JSON
            given = json.dumps(given)
        steering = Steering() if given is False else None if given is None else read_steering(given, model_name)
        self.model, self.tokenizer, _ = load(model_name, **model_args)
        if steering is not None:
            self.model.steering = steering.with_tokenizer(self.tokenizer)
            defaults: Any = self.model.generation_config
            defaults.sae_steering = None
        self._reader = Reader(self.model, self.tokenizer, (model_name,), settings.max_answer_tokens)
        self._reader.check_steering(self._reader.default_steering)
        self._engine: Engine | None = None

    async def generate(self, input: Any, tools: Any, tool_choice: Any, config: GenerateConfig) -> ModelOutput:
        """Write what follows a conversation. `steering` in the config's `extra_body` holds for this request alone.

        Raises:
            RequestError: a setting that is not served, by its name, or a steering that the model does not have.
        """
        import anyio.to_thread

        from ...serving.engine import Answer
        from ...serving.errors import RequestError

        try:
            asked = self._asked(input, tools, config)
        except RequestError as error:
            if error.code != "context_length_exceeded":
                raise
            return ModelOutput.from_content(self.model_name, error.message, stop_reason="model_length")
        texts, ends, ended = [""] * asked.n, [""] * asked.n, threading.Semaphore(0)

        def take(answer: Answer, piece: str, finish: str | None) -> None:
            texts[answer.number] += piece
            if finish is not None:
                ends[answer.number] = finish
                ended.release()

        (prompt,) = asked.prompts
        answers = [
            Answer(prompt, asked.steering, asked.sampling, self.tokenizer, take, number) for number in range(asked.n)
        ]
        try:
            self._started().submit(answers)
            for _ in answers:
                limiter = anyio.CapacityLimiter(math.inf)
                await anyio.to_thread.run_sync(ended.acquire, abandon_on_cancel=True, limiter=limiter)
        finally:
            for answer in answers:
                answer.cancel()
        for error in (answer.error for answer in answers):
            if error is not None:
                raise error
        written = sum(len(answer.tokens) for answer in answers)
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(content=text, model=self.model_name, source="generate"),
                    stop_reason="max_tokens" if end == "length" else "stop",
                )
                for text, end in zip(texts, ends, strict=True)
            ],
            usage=ModelUsage(input_tokens=len(prompt), output_tokens=written, total_tokens=len(prompt) + written),
        )

    def _asked(self, messages: Any, tools: Any, config: GenerateConfig) -> Asked:
        """The request as the server reads it, each setting under its name there."""
        from ...serving.bodies import Body
        from ...serving.errors import RequestError

        said = {name: value for name, value in config.model_dump(exclude_none=True).items() if name not in OF_INSPECT}
        if unknown := sorted(said.keys() - FIELDS.keys()):
            raise RequestError(f"`{unknown[0]}` is not supported. Expected of: {', '.join(FIELDS)}.", unknown[0])
        if "logit_bias" in said:
            said["logit_bias"] = {str(token): value for token, value in said["logit_bias"].items()}
        body = {"model": self.model_name, **{FIELDS[name]: value for name, value in said.items()}}
        body |= {"tools": [tool.name for tool in tools], **(config.extra_body or {})}
        if getattr(self.tokenizer, "chat_template", None):
            return self._reader.chat(Body({**body, "messages": [_message(one) for one in messages]}))
        if [one.role for one in messages] != ["user"] or tools:
            roles = ", ".join(one.role for one in messages)
            raise RequestError(
                "Without a chat template the model continues one message of the user, and calls no tools. "
                f"Received: {roles} and {len(tools)} tools.",
                "messages",
            )
        del body["tools"]
        return self._reader.completion(Body({**body, "prompt": messages[0].text}))

    def _started(self) -> Engine:
        from ...serving.engine import Engine

        if self._engine is None:
            self._engine = Engine(self.model, self.tokenizer, self._concurrent)
            self._engine.start()
        return self._engine

    def close(self) -> None:
        """End the thread that writes; the next request starts another."""
        if self._engine is not None:
            self._engine.stop()
            self._engine = None

    def max_connections(self) -> int:
        """Requests at a time: as many as are written together."""
        return self._concurrent


def _message(message: Any) -> dict[str, Any]:
    """With `role` and `content`; parts that are no text keep their type, by which they are refused."""
    content = message.content
    if not isinstance(content, str):
        content = [{"type": part.type, "text": getattr(part, "text", None)} for part in content]
    return {"role": message.role, "content": content}


@modelapi(name="sae-transformers")
def provider() -> type[ModelAPI]:
    """What Inspect makes of `--model sae-transformers/...`."""
    return SaeTransformersAPI
