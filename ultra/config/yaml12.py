"""YAML as the configuration reads and writes it: the YAML 1.2 core schema, with the place of every value.

Differences from PyYAML's safe loader, which reads YAML 1.1: `1e-6` is a number (not a string), `010` is ten
(not eight), `yes`, `no`, `on`, `off` and `12:30` are strings. Duplicate keys and tags beyond the core schema
are errors, `<<` is a key like any other; aliases are followed within the limits below.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from ultra.errors import UserError

MAX_BYTES = 1 << 20
MAX_NODES = 10_000  # aliases count each time: ten levels of ten aliases would be 10^10 values
MAX_DEPTH = 20

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_TAG = "tag:yaml.org,2002:"
_CORE = [("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT)]


class Place(NamedTuple):
    """Where a value was written: `file:line:col`, or an override."""

    order: int  # 0: the file; overrides count from 1
    line: int
    column: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


class Located(NamedTuple):
    place: Place
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class ConfigError(UserError):
    """Everything that is wrong with a configuration, one placed message a line."""

    def __init__(self, errors: list[Located] | str) -> None:
        self.errors = [] if isinstance(errors, str) else sorted(dict.fromkeys(errors))
        super().__init__(errors if isinstance(errors, str) else "\n".join(map(str, self.errors)))


class CoreLoader(yaml.SafeLoader):
    """Composes nodes with YAML 1.2 core tags."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML declares it on the instance


class Dumper(yaml.SafeDumper):
    """Writes what YAML 1.1 and 1.2 readers understand alike: quotes strings that look like numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        flat = not any(isinstance(item, (dict, list, tuple)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)


for _name, _pattern in _CORE:
    CoreLoader.add_implicit_resolver(_TAG + _name, _pattern, None)
    Dumper.add_implicit_resolver(_TAG + _name, _pattern, None)

Path = tuple[str | int, ...]


class Document(NamedTuple):
    """A parsed text: plain values, and the place of every key and item by its path."""

    value: Any
    places: dict[Path, Place]


def parse(text: str, source: str, *, order: int = 0, inline: bool = False) -> Document:
    """Raises ConfigError with every duplicate key, or with the first syntax error.

    `inline`: the text is one value of an override; its places carry no line.
    """
    places: dict[Path, Place] = {}
    errors: list[Located] = []
    count = 0

    def place(mark: yaml.Mark) -> Place:
        return Place(order, 0, 0, source) if inline else Place(order, mark.line + 1, mark.column + 1, source)

    def stop(mark: yaml.Mark, message: str) -> ConfigError:
        return ConfigError([*errors, Located(place(mark), message)])

    def construct(node: yaml.Node, path: Path) -> Any:
        nonlocal count
        count += 1
        if count > MAX_NODES or len(path) > MAX_DEPTH:
            raise stop(node.start_mark, f"over {MAX_NODES} values or {MAX_DEPTH} levels; check the aliases")
        places.setdefault(path, place(node.start_mark))
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            value: dict[str, Any] = {}
            for key_node, value_node in node.value:
                if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                    raise stop(key_node.start_mark, "a key must be a field's name")
                key = key_node.value
                if key in value:
                    first = places[(*path, key)]
                    where = f" (first at line {first.line})" if first.line else ""
                    errors.append(
                        Located(
                            place(key_node.start_mark),
                            f"{dotted((*path, key))}: duplicate key{where}; delete one of the two",
                        )
                    )
                    continue
                places[(*path, key)] = place(key_node.start_mark)
                value[key] = construct(value_node, (*path, key))
            return value
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [construct(item, (*path, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and (tag == "str" or tag in dict(_CORE)):
            try:
                return scalar(tag, node.value)
            except ValueError:
                raise stop(node.start_mark, f"{shorten(node.value)} is not a {tag}") from None
        raise stop(node.start_mark, f"tag {node.tag!r} is not allowed here; write plain values")

    try:
        loader = CoreLoader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
        value = None if root is None else construct(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        where = Place(order, 0, 0, source) if mark is None else place(mark)
        raise ConfigError([Located(where, f"not valid YAML: {message}")]) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        where = Place(order, before.count("\n") + 1, error.position - before.rfind("\n"), source)
        raise ConfigError(
            [Located(where, f"not valid YAML: character U+{error.character:04X} is not allowed")]
        ) from None
    except RecursionError:
        raise ConfigError([Located(Place(order, 1, 1, source), "nested too deeply to be a config")]) from None
    if errors:
        raise ConfigError(errors)
    return Document(value, places)


def scalar(tag: str, text: str) -> str | int | float | bool | None:
    """One plain value of the core schema. Raises ValueError when the text does not fit an explicit tag."""
    if tag == "str":
        return text
    if not dict(_CORE)[tag].match(text):
        if tag == "float" and _INT.match(text):
            return float(text)
        raise ValueError(text)
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    if tag == "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def dotted(path: Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def shorten(value: Any, limit: int = 60) -> str:
    """The value as YAML would show it, cut to `limit` characters."""
    if isinstance(value, (dict, list)):
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
