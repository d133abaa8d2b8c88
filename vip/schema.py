"""A schema of dataclasses, read: its keys with their types and descriptions, and the words for what does not fit it."""

import dataclasses
import difflib
import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError


def walk(schema: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, type, description) of every leaf of a schema, in order; a key of several alternatives comes once."""
    hints = get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        kind, *notes = (
            get_args(hints[field.name]) if get_origin(hints[field.name]) is Annotated else (hints[field.name],)
        )
        nested = [choice for choice in (kind, *get_args(kind)) if dataclasses.is_dataclass(choice)]
        seen = set()
        for inner in nested:
            for key, name, text in walk(inner, f"{prefix}{field.name}."):
                if key not in seen:
                    yield key, name, text
                seen.add(key)
        if not nested:
            text = next((note.description for note in notes if getattr(note, "description", None)), "")
            yield f"{prefix}{field.name}", _type_name(kind), text


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_yaml(value: Any) -> str:
    """One value as it would be typed."""
    return value if isinstance(value, str) else json.dumps(value)


def near(word: str, known: list[str] | Any) -> str:
    """`; nearest: x`, by whole key, or else by the key's last part."""
    known = list(known)
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not found:
        tails = {key.rpartition(".")[2]: key for key in reversed(known)}
        found = [tails[t] for t in difflib.get_close_matches(word.rpartition(".")[2], list(tails), n=1, cutoff=0.6)]
    return f"; nearest: {found[0]}" if found else ""


def first_problem(schema: Any, error: ValidationError) -> str:
    """The first of pydantic's complaints in one line: key, value and what would do."""
    problem = error.errors(include_url=False)[0]
    key, known = "", [known for known, *_ in walk(schema)]
    for part in problem["loc"]:  # which names members of unions too
        longer = f"{key}.{part}" if key else str(part)
        if any(f"{k}.".startswith(f"{longer}.") for k in known):
            key = longer
    if problem["type"] == "value_error":  # raised by a check of ours, which names its key
        return f"{key}.{problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
    message = problem["msg"].removeprefix("Input ")
    return f"{key}: {message}" if problem["type"] == "missing" else f"{key}={as_yaml(problem['input'])}: {message}"


def _type_name(kind: Any) -> str:
    """`int`, `a | b | c` for choices, `x or null` for what may be left out."""
    if get_origin(kind) is Annotated:
        return _type_name(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"[{', '.join('...' if part is ... else _type_name(part) for part in get_args(kind))}]"
    if get_origin(kind) in (UnionType, Union):
        return " or ".join(_type_name(part) for part in get_args(kind))
    return "null" if kind is NoneType else kind.__name__
