"""Readers of typed event streams: each event where it may come and nowhere else, and what they say together."""

from __future__ import annotations

import json
from typing import Any


class ResponseOrder:
    """Of OpenAI's responses."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.open: dict[str, Any] | None = None
        self.part: dict[str, Any] | None = None
        self.state = "new"
        self.final: dict[str, Any] = {}
        self.ids: set[str] = set()
        self.num_events = 0

    def take(self, event: dict[str, Any]) -> None:
        assert self.state != "ended", event
        assert event["sequence_number"] == self.num_events
        self.num_events += 1
        kind = event["type"]
        if kind == "response.created":
            assert (self.state, event["response"]["status"], event["response"]["output"]) == ("new", "in_progress", [])
            self.state, self.id = "created", event["response"]["id"]
        elif kind == "response.in_progress":
            assert self.state == "created"
            self.state = "running"
        elif kind == "response.output_item.added":
            assert (self.state, self.open) == ("running", None)
            self.open = event["item"]
            assert event["output_index"] == len(self.items)
            assert self.open["status"] == "in_progress"
            assert self.open["id"] not in self.ids
            self.ids.add(self.open["id"])
            assert self.open.get("content", []) == []
            assert self.open.get("arguments", "") == ""
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            assert (self.state, self.open) == ("running", None)
            assert event["response"]["status"] == kind.removeprefix("response.")
            assert event["response"]["output"] == self.items
            assert event["response"]["id"] == self.id
            self.state, self.final = "ended", event["response"]
        else:
            self._inside(kind, event)

    def _inside(self, kind: str, event: dict[str, Any]) -> None:
        assert self.open is not None, event
        assert event["output_index"] == len(self.items)
        if kind == "response.output_item.done":
            assert self.part is None
            item = event["item"]
            assert {key: item[key] for key in ("id", "type")} == {key: self.open[key] for key in ("id", "type")}
            assert item["status"] != "in_progress"
            if item["type"] == "function_call":
                assert item["arguments"] == self.open["arguments"]
            else:
                assert item["content"] == self.open["content"]
            self.items.append(item)
            self.open = None
            return
        assert event["item_id"] == self.open["id"]
        if kind == "response.function_call_arguments.delta":
            assert self.open["type"] == "function_call"
            self.open["arguments"] += event["delta"]
        elif kind == "response.function_call_arguments.done":
            assert event["arguments"] == self.open["arguments"]
        elif kind == "response.content_part.added":
            assert (self.part, event["content_index"]) == (None, 0)
            self.part = event["part"]
        else:
            self._in_part(kind, event)

    def _in_part(self, kind: str, event: dict[str, Any]) -> None:
        assert self.part is not None, event
        assert self.open is not None
        if kind == "response.content_part.done":
            assert event["part"] == self.part
            self.open["content"].append(self.part)
            self.part = None
            return
        name = {"message": "output_text", "reasoning": "reasoning_text"}[self.open["type"]]
        assert kind in (f"response.{name}.delta", f"response.{name}.done")
        if kind.endswith("delta"):
            self.part["text"] += event["delta"]
            if name == "output_text":
                self.part["logprobs"] += event["logprobs"]
        else:
            assert event["text"] == self.part["text"]
            if name == "output_text":
                self.part["logprobs"] = event["logprobs"]


class MessageOrder:
    """Of Anthropic's messages."""

    def __init__(self) -> None:
        self.message: dict[str, Any] = {}
        self.open: dict[str, Any] | None = None
        self.json = ""
        self.state = "new"

    def take(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "message_start":
            assert self.state == "new"
            self.message = event["message"]
            assert (self.message["content"], self.message["stop_reason"]) == ([], None)
            self.state = "blocks"
        elif kind == "ping":
            assert self.state == "blocks"
        elif kind == "content_block_start":
            assert (self.state, self.open, event["index"]) == ("blocks", None, len(self.message["content"]))
            self.open, self.json = event["content_block"], ""
        elif kind == "content_block_delta":
            assert self.open is not None
            assert event["index"] == len(self.message["content"])
            self._add(event["delta"], self.open)
        elif kind == "content_block_stop":
            assert self.open is not None
            assert event["index"] == len(self.message["content"])
            if self.open["type"] == "tool_use":
                try:
                    self.open["input"] = json.loads(self.json)
                except ValueError:
                    assert self.open["input"] == {}
            self.message["content"].append(self.open)
            self.open = None
        elif kind == "message_delta":
            assert (self.state, self.open) == ("blocks", None)
            self.message |= event["delta"]
            self.message["usage"] = event["usage"]
            self.state = "ending"
        else:
            assert (kind, self.state) == ("message_stop", "ending")
            self.state = "ended"

    def _add(self, delta: dict[str, Any], block: dict[str, Any]) -> None:
        kind = delta["type"]
        if kind == "input_json_delta":
            assert block["type"] == "tool_use"
            self.json += delta["partial_json"]
        elif kind == "signature_delta":
            assert block["type"] == "thinking"
            block["signature"] = delta["signature"]
        else:
            member = {"text_delta": "text", "thinking_delta": "thinking"}[kind]
            assert block["type"] == member
            block[member] += delta[member]
