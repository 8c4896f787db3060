"""`foretoken generate`: one prompt through the same worker process and messages as the server, without HTTP."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster import logs
from cluster.config import Settings
from cluster.control.model import Model, find_model
from cluster.control.worker_folders import socket_folder
from cluster.control.worker_process import local_worker
from cluster.gateway.chat import load_template
from cluster.gateway.fields import validate
from cluster.gateway.generation import Unobserved
from cluster.gateway.openai import ChatCompletionRequest, CompletionRequest, GenerationRequest
from cluster.gateway.parsing.reply_format import ReplyShape
from cluster.gateway.pool import Endpoint, WorkerPool
from cluster.gateway.settings import GatewaySettings, SamplingDefaults
from cluster.gateway.submit import Texts, encode, make_submits, render_chat
from cluster.gateway.tokenizer import TextTokenizer
from cluster.protocol import Submit

STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Prompt:
    """What to complete, and how. None: for `max_tokens` what the context has left, for `temperature` the checkpoint's
    default, for `seed` a new one."""

    text: str
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    chat: bool = False


@dataclass
class Completion:
    """What came of it so far."""

    num_prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def as_json(self) -> str:
        """One line: text, token_ids (generated ones, a final EOS included), finish_reason, usage."""
        usage = {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": len(self.token_ids),
            "total_tokens": self.num_prompt_tokens + len(self.token_ids),
        }
        return json.dumps(
            {"text": self.text, "token_ids": self.token_ids, "finish_reason": self.finish_reason, "usage": usage}
        )


def run(settings: Settings, prompt: Prompt, *, as_json: bool) -> None:
    """Print the completion on standard output: as it comes, or with `as_json` as one line at the end.

    Raises `ForetokenError`.
    """
    logs.configure(settings.log_level, settings.log_format)
    model = find_model(settings)
    completion = asyncio.run(complete(settings, model, prompt, on_text=_ignore if as_json else _print))
    print(completion.as_json() if as_json else "", flush=True)


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(text: str) -> None:
    pass


async def complete(settings: Settings, model: Model, prompt: Prompt, *, on_text: Callable[[str], None]) -> Completion:
    """Start a worker, complete the prompt on it, end it. `on_text` gets the text piece by piece."""
    gateway = GatewaySettings(model.name, model.path, SamplingDefaults.from_checkpoint(model.path))
    request, texts = read_prompt(prompt, gateway)
    timeout_s = settings.request_timeout_s
    with socket_folder() as folder:
        worker = local_worker(settings, model.path, model.name, folder)
        try:
            await worker.start()
            async with WorkerPool([Endpoint("worker", worker.launch.address)], max_resumptions=0) as pool:
                hello = await pool.ready(settings.start_timeout_s)
                (submit,) = make_submits(
                    request,
                    texts,
                    reply_id="generate",
                    hello=hello,
                    settings=gateway,
                    timeout_s=timeout_s,
                    shape=ReplyShape(),
                )
                return await _collect(pool, submit, timeout_s, on_text)
        finally:
            await worker.stop(STOP_TIMEOUT_S)


def read_prompt(prompt: Prompt, gateway: GatewaySettings) -> tuple[GenerationRequest, Texts]:
    """The API's request for a prompt, and its tokens: raw text as the tokenizer's post-processor has it, or a chat.

    Raises `CheckpointError` for tokenizer files that cannot be read, `RequestError` for what cannot be asked.
    """
    body = {
        "model": gateway.served_name,
        "max_tokens": prompt.max_tokens,
        "temperature": prompt.temperature,
        "seed": prompt.seed,
    }
    tokenizer = TextTokenizer.from_checkpoint(gateway.model_path)
    if not prompt.chat:
        request = validate(CompletionRequest, body | {"prompt": prompt.text})
        return request, encode(request, tokenizer, None)
    template = load_template(
        gateway.model_path, timeout_s=gateway.template_timeout_s, max_chars=gateway.max_rendered_chars
    )
    chat = validate(ChatCompletionRequest, body | {"messages": [{"role": "user", "content": prompt.text}]})
    return chat, encode(chat, tokenizer, render_chat(chat, template))


async def _collect(pool: WorkerPool, submit: Submit, timeout_s: float, on_text: Callable[[str], None]) -> Completion:
    completion = Completion(len(submit.prompt_ids))
    with pool.submit([submit], timeout_s=timeout_s, observer=Unobserved()) as generation:
        while outputs := await generation.read():
            for _, output in outputs:
                completion.token_ids.extend(output.token_ids)
                completion.text += output.text
                on_text(output.text)
                if output.finish is not None:
                    completion.finish_reason = output.finish.reason
    return completion
