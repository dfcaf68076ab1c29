"""Read a YAML file or a preset, apply overrides, validate; errors say where, what was got, what to write."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import ultra
from ultra.config.fields import FieldProblems, Fields
from ultra.config.model import UltraConfig
from ultra.config.run import RunConfig
from ultra.config.schema import json_schema
from ultra.config.training import TrainingConfig
from ultra.config.yaml12 import MAX_BYTES, ConfigError, Document, Located, Place, dotted, parse, shorten
from ultra.config.yaml12 import Path as KeyPath

SECTIONS: dict[str, type[Fields]] = {"model": UltraConfig, "training": TrainingConfig}
EXAMPLES = {"model": "model: {hidden_size: 768}", "training": "training: {batch_size: 4}"}


def presets() -> dict[str, Path]:
    """Preset name → file: `configs/` beside the source tree, or the copy inside the installed package."""
    package = Path(ultra.__file__).parent
    for folder in (package / "presets", package.parent / "configs"):
        if (folder / "schema.yaml").is_file():
            return {path.stem: path for path in sorted(folder.glob("*.yaml")) if path.stem != "schema"}
    return {}


def load_config(path_or_preset: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated, immutable configuration.

    path_or_preset: a YAML file, or the name of one of `presets()`. overrides: `section.field=value`, the
    value read as YAML, applied in order. Raises ConfigError with all errors, sorted by place. Whether a path
    that a field names exists is not checked here.
    """
    source, text = _read(path_or_preset)
    document = parse(text, source)
    errors: list[Located] = []
    _check_shape(document, source, errors)
    for order, override in enumerate(overrides, start=1):
        _apply(override, order, document, errors)
    config = _validate(document, source, errors)
    if config is None:
        raise ConfigError(errors)
    return config


def explain(field: str) -> str:
    """Meaning, values and default of `field`, with or without its section. Raises ConfigError if unknown."""
    schema = json_schema()
    known = {"model_class": schema["properties"]["model_class"]}
    for section, fields in SECTIONS.items():
        properties = schema["$defs"][fields.__name__]["properties"]
        known |= {f"{section}.{name}": description for name, description in properties.items()}
    by_name = {path.rpartition(".")[2]: path for path in known}  # no name is in both sections
    path = field if field in known else by_name.get(field)
    if path is None:
        guess = _near(field.rpartition(".")[2], by_name)
        hint = f"did you mean {by_name[guess]!r}?" if guess else "`ultra schema` lists them all"
        raise ConfigError(f"{field}: unknown field; {hint}")
    found = known[path]
    default = shorten(found["default"], 200)
    return f"{path}\n  {found['description']}\n  allowed: {allowed(found)}\n  default: {default}"


def _read(path_or_preset: str | Path) -> tuple[str, str]:
    name, path = str(path_or_preset), Path(path_or_preset)
    known = presets()
    if name in known and not path.is_file():
        path = known[name]
        name = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        guess = path.stem if path.stem in known else _near(path.stem, known)
        hint = f"; did you mean the preset {guess!r}?" if guess else ""
        raise ConfigError(f"{name}: no such file or preset{hint}; presets: {', '.join(known)}") from None
    except (OSError, ValueError) as error:
        folder = isinstance(error, IsADirectoryError)
        reason = "is a folder, not a YAML file" if folder else f"unreadable: {error}"
        raise ConfigError(f"{name}: {reason}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than {MAX_BYTES >> 20} MiB, which no config is")
    try:
        return name, data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text; save the file as UTF-8") from None


def _check_shape(document: Document, source: str, errors: list[Located]) -> None:
    """Raise unless the document is a map; move what is not a known top-level key or its map to `errors`."""
    top, start = document.value, document.places.get((), Place(0, 1, 1, source))
    expected = "expected a map with model_class, model and training"
    if top is None:
        raise ConfigError([Located(start, f"empty file; {expected}, such as `{EXAMPLES['training']}`")])
    if not isinstance(top, dict):
        raise ConfigError(
            [Located(start, f"{_kind(top)} at the top level; {expected}, such as `{EXAMPLES['training']}`")]
        )
    for key in list(top):
        place = document.places[key,]
        if key in SECTIONS:
            if top[key] is None:
                top[key] = {}
            if not isinstance(top[key], dict):
                got = _got(top.pop(key))
                errors.append(Located(place, f"{key}: got {got}; expected a map, such as `{EXAMPLES[key]}`"))
        elif key != "model_class":
            errors.append(Located(place, f"{key}: unknown top-level key; {_hint_top(key)}"))
            del top[key]


def _apply(override: str, order: int, document: Document, errors: list[Located]) -> None:
    source = f"override {override!r}"
    place = Place(order, 0, 0, source)
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or len(path) > 2 or (len(path) == 2) != (path[0] in SECTIONS):
        errors.append(Located(place, "write section.field=value, such as training.batch_size=2"))
        return
    if len(path) == 1 and path != ("model_class",):
        errors.append(Located(place, f"{path[0]}: unknown top-level key; {_hint_top(path[0])}"))
        return
    try:
        value, places = parse(text, source, order=order, inline=True)
    except ConfigError as error:
        errors.extend(error.errors)
        return
    target = document.value if len(path) == 1 else document.value.setdefault(path[0], {})
    target[path[-1]] = value
    document.places.setdefault(path[:1], place)
    for old in [known for known in document.places if known[: len(path)] == path]:
        if old != path[:1] or len(path) == 1:
            del document.places[old]
    document.places.update({(*path, *inner): found for inner, found in places.items()})
    document.places[path] = place


def _validate(document: Document, source: str, errors: list[Located]) -> RunConfig | None:
    """The RunConfig, or None with the reasons added to `errors`."""
    start = Place(0, 1, 1, source)
    parts: dict[str, Any] = {"model_class": document.value.get("model_class", "frankenstein")}
    for section, fields in SECTIONS.items():
        values = document.value.get(section, {})
        try:
            parts[section] = fields.model_validate(values)
        except ValidationError as error:
            for path, message in _messages(error, section, fields, values):
                known = (document.places.get(path[:length]) for length in range(len(path), 0, -1))
                place = next((place for place in known if place is not None), start)
                errors.append(Located(place, f"{dotted(path)}: {message}"))
            parts[section] = fields()
    try:
        config = RunConfig.model_validate(parts)
    except ValidationError:
        message = _wrong(parts["model_class"], json_schema()["properties"]["model_class"])
        errors.append(Located(document.places["model_class",], f"model_class: {message}"))
    return None if errors else config


def _messages(
    error: ValidationError, section: str, fields: type[Fields], values: dict[str, Any]
) -> Iterator[tuple[KeyPath, str]]:
    """One message per wrong value.

    pydantic reports a union once per member, and beside a wrong item the list as too short: both are merged.
    """
    top = json_schema()["$defs"][fields.__name__]
    seen: set[KeyPath] = set()
    items_first = sorted(error.errors(), key=lambda found: -len(found["loc"]))
    for found in items_first:
        loc: KeyPath = found["loc"]
        if isinstance(problem := found.get("ctx", {}).get("error"), FieldProblems):
            yield from (((section, *loc, field), message) for field, message in problem.problems)
            continue
        if found["type"] == "extra_forbidden":
            _, parent, schema = _descend(loc[:-1], values, top)
            name = str(loc[-1])
            if len(loc) == 1:
                yield (section, name), _unknown(name, section, parent[name])
            else:
                yield (section, *loc), _unknown_inside(name, schema)
            continue
        path, value, schema = _descend(loc, values, top)
        path = (section, *path)
        if path not in seen:
            seen |= {path[:length] for length in range(2, len(path) + 1)}
            yield path, _wrong(value, schema)


def _descend(loc: KeyPath, value: Any, schema: dict[str, Any]) -> tuple[KeyPath, Any, dict[str, Any]]:
    """(path, value there, its schema) as far as pydantic's `loc`, which goes on into unions, is one of the YAML."""
    path: KeyPath = ()
    for part in loc:
        if isinstance(part, str) and isinstance(value, dict) and part in schema.get("properties", {}):
            if part not in value:  # a field that another one needs
                break
            value, schema = value[part], _resolve(schema["properties"][part])
        elif isinstance(part, int) and isinstance(value, list):
            items = _items(schema)
            if len(items) not in (0, len(value)):  # a list of the wrong length is at fault as a whole
                break
            value, schema = value[part], items[part] if items else _resolve(schema["items"])
        else:
            break
        path = (*path, part)
    return path, value, schema


def _resolve(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    return dict(json_schema()["$defs"][name]) if name else schema


def _unknown(name: str, section: str, value: Any) -> str:
    if isinstance(value, dict):
        known = SECTIONS[section].model_fields
        inner = ", ".join(guess for key in value if (guess := _near(str(key), known)))
        return (
            f"holds a map, but {section} is flat: write its fields directly under {section}:"
            + (f" (perhaps {inner})" if inner else "")
            + "; `ultra config explain FIELD` describes one"
        )
    for other, fields in SECTIONS.items():
        if name in fields.model_fields:
            return f"unknown field; it belongs under {other}:"
    if name == "model_class":
        return "unknown field; it belongs at the top level"
    guess = _near(name, SECTIONS[section].model_fields)
    if guess:
        return f"unknown field; did you mean {guess!r}?"
    for other, fields in SECTIONS.items():
        if guess := _near(name, fields.model_fields):
            return f"unknown field; did you mean {other}.{guess}?"
    return "unknown field; `ultra schema` lists them all"


def _unknown_inside(name: str, schema: dict[str, Any]) -> str:
    """Of a key inside a list's entry."""
    known = schema.get("properties", {})
    guess = _near(name, known)
    return f"unknown field; did you mean {guess!r}?" if guess else f"unknown field; allowed: {', '.join(known)}"


def _wrong(value: Any, schema: dict[str, Any]) -> str:
    """What was got, what is allowed, and the likeliest cure."""
    return f"got {_got(value)}; allowed: {allowed(schema)}{_cure(value, schema)}"


def _cure(value: Any, schema: dict[str, Any]) -> str:
    kinds = {option.get("type") for option in schema.get("anyOf", [schema])}
    options = schema.get("anyOf", [schema.get("items", schema)])
    names = [name for option in options for name in _names(option)]
    if "items" in schema and value is not None and not isinstance(value, (list, dict)):
        return f"; write [{_near(value, names) or value if isinstance(value, str) else value}]"
    if isinstance(value, str):
        if "|" in value and names and all(part.strip() in names for part in value.split("|")):
            return "; the sample lists the alternatives: write one of them"
        if guess := _near(value, names):
            return f"; did you mean {guess!r}?"
        if "boolean" in kinds and value.lower() in ("yes", "no", "on", "off", "true", "false", "y", "n"):
            return f"; write {'true' if value.lower() in ('yes', 'on', 'true', 'y') else 'false'}"
        if kinds & {"integer", "number"} and re.fullmatch(r"[-+.\deE_,]*\d[-+.\deE_,]*", value):
            return f"; write {re.sub('[_,]', '', value)} without quotes, underscores or commas"
    if "integer" in kinds and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    return ""


def allowed(schema: dict[str, Any]) -> str:
    """The values that a JSON Schema of ours admits, in words."""
    if "anyOf" in schema:
        return " or ".join(allowed(option) for option in schema["anyOf"])
    if names := _names(schema):
        return ", ".join(names)
    kind = schema.get("type", "object")
    if kind == "array":
        if items := _items(schema):
            return f"a list of {len(items)}, each {allowed(items[0])}"
        at_least = f" of {schema['minItems']} or more" if "minItems" in schema else ""
        return f"a list{at_least}, each {allowed(_resolve(schema['items']))}"
    if "properties" in schema:
        return f"a map with some of {', '.join(schema['properties'])}"
    limits = [
        f"{sign} {schema[key]}"
        for key, sign in [
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        ]
        if key in schema
    ]
    words = {
        "integer": "an integer",
        "number": "a number",
        "boolean": "true or false",
        "string": "a text",
        "null": "null",
    }
    return " ".join([words.get(kind, "a map"), " and ".join(limits)]).strip()


def _names(schema: dict[str, Any]) -> list[str]:
    if "const" in schema:
        return [schema["const"]]
    return list(schema.get("enum", []))


def _items(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return list(schema.get("prefixItems", []))


def _got(value: Any) -> str:
    return _kind(value) if value in ([], {}, "") else f"{shorten(value)} ({_kind(value)})"


def _kind(value: Any) -> str:
    kinds = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "a map",
    }
    if isinstance(value, (list, dict, str)) and not value:
        return f"an empty {kinds[type(value)].split()[1]}"
    return kinds.get(type(value), "nothing")


def _near(name: str, known: Any) -> str | None:
    """The closest of `known`, letter case and dashes aside."""
    found = difflib.get_close_matches(name.lower().replace("-", "_"), list(known), n=1, cutoff=0.7)
    return found[0] if found else None


def _hint_top(key: str) -> str:
    for section, fields in SECTIONS.items():
        if key in fields.model_fields:
            return f"it belongs under {section}:"
    guess = _near(key, ["model_class", *SECTIONS])
    return f"did you mean {guess!r}?" if guess else "allowed: model_class, model, training"
