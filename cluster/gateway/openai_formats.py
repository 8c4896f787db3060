"""What a request may ask its answer to match: OpenAI's `response_format`, vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from cluster.gateway.fields import HONOURED, WITHOUT_EFFECT, RequestModel, invalid, unsupported
from cluster.protocol import Grammar

MAX_CHOICES = 1024
MAX_TAGS = 128

Pattern = Annotated[str, StringConstraints(min_length=1, max_length=128 * 1024)]
Mark = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


def _schema(value: Any) -> Any:
    """A JSON schema, or its text."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            value = None
    if not isinstance(value, dict):
        raise invalid("must be a JSON schema: an object, or the text of one")
    return value


def _structural_tag(value: Any) -> Any:
    return _schema(value) if isinstance(value, str) else value


Schema = Annotated[dict[str, Any], BeforeValidator(_schema, json_schema_input_type=str | dict[str, Any])]
Choices = Annotated[list[Pattern], Field(min_length=1, max_length=MAX_CHOICES)]


class JsonSchemaFormat(RequestModel):
    schema_: Annotated[dict[str, Any], HONOURED, Field(alias="schema")]
    name: Annotated[str, WITHOUT_EFFECT] = ""
    description: Annotated[str, WITHOUT_EFFECT] = ""
    strict: Annotated[bool, WITHOUT_EFFECT] = True  # a schema is always followed


class Structure(RequestModel):
    """What a trigger may begin: `begin`, JSON by the schema, `end`."""

    begin: Annotated[Mark, HONOURED]
    schema_: Annotated[dict[str, Any], HONOURED, Field(alias="schema")] = {}
    end: Annotated[str, HONOURED, StringConstraints(max_length=1024)] = ""


class StructuralTag(RequestModel):
    """Free text; where it says one of the triggers, one of the structures that begin so follows."""

    type: Annotated[Literal["structural_tag"], HONOURED] = "structural_tag"
    structures: Annotated[list[Structure], HONOURED, Field(min_length=1, max_length=MAX_TAGS)]
    triggers: Annotated[list[Mark], HONOURED, Field(min_length=1, max_length=MAX_TAGS)]
    format: Annotated[Any, unsupported(note="give structures and triggers")] = None

    @model_validator(mode="after")
    def _check_triggers(self) -> StructuralTag:
        check_triggers(self.structures, self.triggers)
        return self


def check_triggers(structures: list[Structure], triggers: list[str]) -> None:
    for place, structure in enumerate(structures):
        if not any(structure.begin.startswith(trigger) for trigger in triggers):
            raise invalid(f"structures[{place}] begins with none of them", field="triggers")


class ResponseFormat(RequestModel):
    type: Annotated[Literal["text", "json_object", "json_schema", "structural_tag"], HONOURED]
    json_schema: Annotated[JsonSchemaFormat | None, HONOURED] = None
    structures: Annotated[list[Structure] | None, HONOURED, Field(min_length=1, max_length=MAX_TAGS)] = None
    triggers: Annotated[list[Mark] | None, HONOURED, Field(min_length=1, max_length=MAX_TAGS)] = None
    format: Annotated[Any, unsupported(note="give structures and triggers")] = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        for name, of in (
            ("json_schema", "json_schema"),
            ("structures", "structural_tag"),
            ("triggers", "structural_tag"),
        ):
            if (self.type == of) != (getattr(self, name) is not None):
                raise invalid(f"is given exactly where the type is {of}", field=name)
        if self.structures and self.triggers:
            check_triggers(self.structures, self.triggers)
        return self

    @property
    def answer(self) -> Grammar | StructuralTag | None:
        if self.type == "json_object":
            return Grammar(kind="json_object", source="")
        if self.json_schema is not None:
            return schema_grammar(self.json_schema.schema_)
        if self.structures is not None and self.triggers is not None:
            return StructuralTag.model_construct(structures=self.structures, triggers=self.triggers)
        return None


class StructuredOutputs(RequestModel):
    """Exactly one of its members."""

    json_: Annotated[Schema | None, HONOURED, Field(alias="json")] = None
    regex: Annotated[Pattern | None, HONOURED] = None
    choice: Annotated[Choices | None, HONOURED] = None
    grammar: Annotated[Pattern | None, HONOURED] = None  # in Lark, as llguidance reads it
    json_object: Annotated[bool, HONOURED] = False
    structural_tag: Annotated[
        StructuralTag | None, HONOURED, BeforeValidator(_structural_tag, json_schema_input_type=str | StructuralTag)
    ] = None
    disable_fallback: Annotated[bool, WITHOUT_EFFECT] = False  # there is one backend
    disable_any_whitespace: Annotated[bool, WITHOUT_EFFECT] = False  # JSON is compact
    disable_additional_properties: Annotated[bool, unsupported(False)] = False
    whitespace_pattern: Annotated[Any, unsupported(note="JSON is compact")] = None

    @model_validator(mode="after")
    def _check(self) -> StructuredOutputs:
        given = [self.json_, self.regex, self.choice, self.grammar, self.json_object or None, self.structural_tag]
        if sum(value is not None for value in given) != 1:
            raise invalid("give exactly one of json, regex, choice, grammar, json_object and structural_tag")
        return self

    @property
    def answer(self) -> Grammar | StructuralTag:
        if self.structural_tag is not None:
            return self.structural_tag
        if self.json_ is not None:
            return schema_grammar(self.json_)
        if self.regex is not None:
            return Grammar(kind="regex", source=self.regex)
        if self.choice is not None:
            return choice_grammar(self.choice)
        if self.grammar is not None:
            return Grammar(kind="lark", source=self.grammar)
        return Grammar(kind="json_object", source="")


def schema_grammar(schema: dict[str, Any]) -> Grammar:
    return Grammar(kind="json_schema", source=orjson.dumps(schema).decode())


def choice_grammar(choices: list[str]) -> Grammar:
    return Grammar(kind="choice", source=orjson.dumps(choices).decode())
