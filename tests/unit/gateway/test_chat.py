"""Chat templates, with transformers' `apply_chat_template` as the oracle."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CheckpointError, InvalidValueError, RequestError
from cluster.gateway.chat import ChatTemplate, load_template
from tests.support.scripted_worker import ScriptedWorker, byte_tokenizer
from tests.unit.gateway.conftest import Serve

CHATML = (
    "{%- for message in messages %}\n"
    "    {%- if loop.first and message['role'] != 'system' %}\n"
    "        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}\n"
    "{%- endif %}\n"
)
LLAMA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{{ bos_token }}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BLOCKS = (
    "{% for message in messages %}\n"
    "  {% if message.role == 'user' %}\n"
    "user: {{ message.content }}\n"
    "  {% elif message.role == 'assistant' %}\n"
    "{% generation %}assistant: {{ message.content }}{% endgeneration %}\n"
    "  {% else %}\n"
    "{{ message | tojson }} {{ {'b': '<é>', 'a': [1, 2.5, none, true]} | tojson(indent=2) }}\n"
    "    {% continue %}\n"
    "  {% endif %}\n"
    "  {% if loop.index > 3 %}{% break %}{% endif %}\n"
    "{% endfor %}\n"
    "{% set ns = namespace(total=0) %}{% for m in messages %}{% set ns.total = ns.total + m.content | length %}"
    "{% endfor %}{{ ns.total }} {{ strftime_now('%Y') }} {{ undefined_thing }}{{ eos_token }}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

SYSTEM = {"role": "system", "content": "Be <brief> & 'kind'. "}
USER = {"role": "user", "content": "  What is a wälnut?\n"}
ASSISTANT = {"role": "assistant", "content": "A nut. \n"}
CHATS = [[USER], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT, USER], [USER, ASSISTANT], [USER, ASSISTANT] * 4]


def oracle(source: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **SPECIAL)
    tokenizer.chat_template = source
    return tokenizer


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("source", [CHATML, LLAMA, BLOCKS], ids=["chatml", "llama", "blocks"])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_renders_as_transformers_does(source: str, add_generation_prompt: bool) -> None:
    template = ChatTemplate(source, SPECIAL)
    reference = oracle(source)
    for chat in CHATS:
        for variables in ({}, {"enable_thinking": False}, {"eos_token": "[E]"}):
            expected = reference.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
            )
            rendered = template.render(chat, add_generation_prompt=add_generation_prompt, variables=variables)
            assert rendered == expected


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("source", [CHATML, LLAMA, BLOCKS], ids=["chatml", "llama", "blocks"])
def test_continues_as_transformers_does(source: str) -> None:
    template = ChatTemplate(source, SPECIAL)
    reference = oracle(source)
    for text in ("A nut", " A nut. \n", "A"):
        chat = [USER, {"role": "assistant", "content": text}]
        expected = reference.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        assert template.render(chat, add_generation_prompt=False, continue_final_message=True) == expected


@pytest.mark.needs("transformers")
def test_reads_a_checkpoint_as_transformers_does(tmp_path: Path) -> None:
    oracle(CHATML).save_pretrained(tmp_path)
    loaded = load_template(tmp_path, timeout_s=5, max_chars=10_000)
    assert isinstance(loaded, ChatTemplate)
    assert loaded.source == CHATML
    assert loaded.special_tokens == SPECIAL


def write(folder: Path, **config: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> ChatTemplate | RequestError:
    return load_template(folder, timeout_s=5, max_chars=10_000)


def test_the_template_is_found_where_it_may_be(tmp_path: Path) -> None:
    def source(folder: Path) -> str:
        loaded = load(folder)
        assert isinstance(loaded, ChatTemplate)
        return loaded.source

    assert source(write(tmp_path, chat_template="one")) == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    assert source(write(tmp_path, chat_template=named)) == "three"
    loaded = load(tmp_path)
    assert isinstance(loaded, ChatTemplate)
    assert loaded.render([USER]) == "three"
    assert loaded.render([USER], tools=[{}]) == "two", "as transformers picks it"
    assert source(write(tmp_path, chat_template=named[:1])) == "two"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert source(tmp_path) == "four"


def test_special_tokens_in_their_forms(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<old>", "unk_token": {"content": "<unk>"}}')
    loaded = load(write(tmp_path, chat_template="x", bos_token={"content": "<s>"}, eos_token=None))
    assert isinstance(loaded, ChatTemplate)
    assert loaded.special_tokens == {"bos_token": "<s>", "unk_token": "<unk>"}


@pytest.mark.parametrize("template", [None, 5, [], [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]])
def test_no_usable_template_is_a_reason(tmp_path: Path, template: Any) -> None:
    reason = load(write(tmp_path, chat_template=template))
    assert isinstance(reason, RequestError)
    assert "no chat template" in reason.message


def test_a_broken_template_is_a_reason(tmp_path: Path) -> None:
    reason = load(write(tmp_path, chat_template="{% for %}"))
    assert isinstance(reason, RequestError)
    assert "cannot be compiled" in reason.message


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_config_is_a_broken_checkpoint(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load(tmp_path)


def test_a_developer_is_the_system_of_older_templates() -> None:
    chat = [{"role": "developer", "content": "Be brief."}, USER]
    assert "<|im_start|>system\nBe brief." in ChatTemplate(CHATML, SPECIAL).render(chat)
    newer = ChatTemplate("{{ messages[0].role }}{# developer #}", SPECIAL)
    assert newer.render(chat) == "developer"


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(InvalidValueError, match="Conversation roles must alternate") as caught:
        ChatTemplate(LLAMA, SPECIAL).render([USER, USER])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[5].content }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_a_template_that_fails_is_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidValueError):
        ChatTemplate(source, SPECIAL).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}.{% endfor %}{% endfor %}",
    ],
    ids=["silent", "talkative"],
)
def test_an_endless_template_is_cut(source: str) -> None:
    template = ChatTemplate(source, SPECIAL, timeout_s=0.05, max_chars=2**40)
    started = time.monotonic()
    with pytest.raises(InvalidValueError, match=r"needs more than 0\.05 s"):
        template.render([USER])
    assert time.monotonic() - started < 5


def test_a_long_output_is_cut() -> None:
    with pytest.raises(InvalidValueError, match="1000 characters"):
        ChatTemplate("{% for i in range(2000) %}ab{% endfor %}", SPECIAL, max_chars=1000).render([USER])


def test_a_final_message_that_the_template_drops_cannot_be_continued() -> None:
    with pytest.raises(InvalidValueError, match="cannot be continued"):
        ChatTemplate("{{ messages[0].content }}", SPECIAL).render([USER, ASSISTANT], continue_final_message=True)


@pytest.mark.anyio
async def test_without_a_template_completions_still_work(serve: Serve, worker: ScriptedWorker, tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    served = await serve(model_path=tmp_path)
    await served.ready()
    response = await served.chat()
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]
    assert (await served.complete()).status_code == 200


@pytest.mark.anyio
async def test_a_stuck_template_ends_its_own_request_only(serve: Serve, tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    write(tmp_path, chat_template="{% if messages | length > 1 %}" + endless + "{% endif %}ok")
    served = await serve(model_path=tmp_path, template_timeout_s=0.05)
    await served.ready()
    response = await served.chat(messages=[USER, USER])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    assert (await served.chat()).status_code == 200
