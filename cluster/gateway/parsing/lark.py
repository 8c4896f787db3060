"""Grammars in llguidance's dialect of Lark: of calls, and of text with structures in it.

A mark that the tokenizer has as one token is asked for by its id, as the model was taught to write it; llguidance lets
no other spelling of such a token through.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.gateway.openai_formats import Structure
from cluster.gateway.openai_tools import FunctionDefinition

# as `json.dumps` writes it, which is what models have seen in calls; and compactly, as everywhere else here
SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


def literal(text: str, tokens: Mapping[str, int]) -> str:
    """What stands for exactly `text` in a rule; `tokens` are those that the tokenizer adds to its vocabulary."""
    present = [re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token and token in text]
    parts = re.split(f"({'|'.join(present)})", text) if present else [text]
    return " ".join(
        f"<[{tokens[part]}]>" if part in tokens else json.dumps(part, ensure_ascii=False) for part in parts if part
    )


def schema_rule(schema: Mapping[str, Any], style: Mapping[str, Any]) -> str:
    """JSON by a schema; compiler options that the schema itself has do not count."""
    return "%json " + json.dumps({**schema, "x-guidance": dict(style)}, ensure_ascii=False)


def structural_tag(structures: Sequence[Structure], triggers: Sequence[str], tokens: Mapping[str, int]) -> str:
    """Free text; where it says a trigger, one of the structures that begin so follows."""
    rules = ["%llguidance {}", "TEXT: /(.|\\n)*/", "ending: TEXT"]
    names = []
    for place, trigger in enumerate(sorted(set(triggers), key=len, reverse=True)):
        mine = [item for item in structures if _trigger_of(item, triggers) == trigger]
        if not mine:
            continue
        names.append(f"tag_{place}")
        if trigger in tokens:
            head = f"TEXT {literal(trigger, tokens)}"
        else:
            rules.append(f"head_{place}[lazy]: TEXT {literal(trigger, {})}")
            head = f"head_{place}"
        bodies = [
            " ".join(
                (
                    literal(item.begin[len(trigger) :], tokens),
                    f"schema_{place}_{number}",
                    literal(item.end, tokens),
                )
            )
            for number, item in enumerate(mine)
        ]
        rules.append(f"tag_{place}: {head} ( {' | '.join(bodies)} )")
        rules += [f"schema_{place}_{number}: {schema_rule(item.schema_, COMPACT)}" for number, item in enumerate(mine)]
    return "\n".join([rules[0], f"start: ( {' | '.join(names)} )* ending", *rules[1:]]) + "\n"


def _trigger_of(structure: Structure, triggers: Sequence[str]) -> str:
    """The longest trigger that a structure begins with."""
    return max((trigger for trigger in triggers if structure.begin.startswith(trigger)), key=len)


def argument_rules(functions: Sequence[FunctionDefinition]) -> list[str]:
    """`arguments_<i>`: an object by the schema of function i."""
    return [
        f"arguments_{place}: {schema_rule({**(function.parameters or {}), 'type': 'object'}, SPACED)}"
        for place, function in enumerate(functions)
    ]


def call_head(function: FunctionDefinition) -> str:
    """A call's object up to its arguments."""
    return f'{{"name": "{function.name}", "arguments": '
