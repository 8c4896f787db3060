"""What a request's fields mean to us: each is annotated once with its `Support`, and everything else follows from it.

`RequestModel` refuses what is not honoured, `/v1/capabilities` lists it, and `validate` turns pydantic's findings
into one error of `cluster.errors` that names the field as OpenAI does (`messages[0].content`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, WithJsonSchema, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from cluster.errors import ForetokenError, InvalidValueError, UnsupportedFieldError

SupportStatus = Literal["honoured", "without_effect", "unsupported"]


@dataclass(frozen=True, slots=True)
class Support:
    """How far a field is honoured.

    `accepted` limits the values that are let through (None: all that the type allows); of an unsupported field they
    are the values that ask for nothing.
    """

    status: SupportStatus
    accepted: tuple[object, ...] | None = None
    note: str = ""

    def admits(self, value: object) -> bool:
        if self.accepted is None:
            return self.status != "unsupported"
        return any(type(value) is type(known) and value == known for known in self.accepted)


MAX_FIELDS = 256  # of one object

HONOURED = Support("honoured")
WITHOUT_EFFECT = Support("without_effect")


def without_effect(*accepted: object) -> Support:
    """A field that changes no token, with the values that ask for nothing else either."""
    return Support("without_effect", accepted=accepted)


def unsupported(*neutral: object, note: str = "") -> Support:
    """A field that is refused unless its value asks for nothing."""
    return Support("unsupported", accepted=neutral, note=note)


def invalid(text: str, *, field: str | None = None) -> PydanticCustomError:
    """For validators: a wrong value, of the `field` below where the validator is a model's."""
    return PydanticCustomError("invalid_value", "{text}", {"text": text, "field": field})


def not_honoured(text: str, *, field: str | None = None) -> PydanticCustomError:
    """For validators: a value that asks for what is not built."""
    return PydanticCustomError("unsupported_parameter", "{text}", {"text": text, "field": field})


class RequestModel(BaseModel):
    """A JSON object of a request: nothing is coerced, null is absence, an unknown or unsupported field is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    supports: ClassVar[dict[str, Support]] = {}  # by JSON name

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        found = {
            field.alias or name: [item for item in field.metadata if isinstance(item, Support)]
            for name, field in cls.model_fields.items()
        }
        wrong = [name for name, items in found.items() if len(items) != 1]
        if wrong:
            raise TypeError(f"{cls.__name__}: each field is annotated with one Support; see {', '.join(wrong)}")
        cls.supports = {name: items[0] for name, items in found.items()}

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_honoured(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            support = cls.supports.get(name)
            if support is not None:
                if value is None:
                    continue
                if not support.admits(value):
                    raise _refusal(name, support)
            kept[name] = value
            if len(kept) > MAX_FIELDS:
                raise invalid(f"has more than {MAX_FIELDS} fields")  # pydantic would gather each that is unknown
        return kept


def _refusal(name: str, support: Support) -> PydanticCustomError:
    hint = (
        f"; it may only be {' or '.join(json.dumps(value) for value in support.accepted)}" if support.accepted else ""
    )
    note = f" ({support.note})" if support.note else ""
    return not_honoured(f"this server does not honour it{hint}{note}", field=name)


def text_or_parts(*kinds: str) -> Any:
    """For a validator's `json_schema_input_type`: a text, or a list of parts of these types."""
    part = {
        "type": "object",
        "properties": {"type": {"enum": [*kinds]}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }
    return Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": part}]})]


Model = TypeVar("Model", bound=RequestModel)


def validate(model: type[Model], data: dict[str, Any]) -> Model:
    """`data` as a `model`. Raises `InvalidValueError` or `UnsupportedFieldError` with `param`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _translate(error.errors(include_url=False)[0]) from None


def _translate(found: ErrorDetails) -> ForetokenError:
    kind, loc, text = found["type"], found["loc"], found["msg"]
    field = found.get("ctx", {}).get("field")
    param = _path(loc if field is None else (*loc, field))
    if kind == "extra_forbidden":
        return UnsupportedFieldError(f"{param}: this server knows no such field; leave it out", param=param)
    if kind == "unsupported_parameter":
        return UnsupportedFieldError(f"{param}: {text}", param=param)
    if kind == "missing":
        return InvalidValueError(f"{param} is required", param=param)
    given = "" if kind == "invalid_value" else _given(found["input"])
    return InvalidValueError(f"{param}: {_lower_first(text)}{given}", param=param or None)


def _path(loc: tuple[object, ...]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _given(value: object) -> str:
    if isinstance(value, str | int | float) and len(shown := repr(value)) <= 64:
        return f", got {shown}"
    return f", got {type(value).__name__}" if isinstance(value, list | dict | str) else ""
