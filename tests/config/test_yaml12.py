from __future__ import annotations

import math

import pytest
import yaml

from ultra.config.yaml12 import MAX_NODES, ConfigError, Dumper, Place, parse


def value(text: str) -> object:
    return parse(f"x: {text}", "f").value["x"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-6", 1e-6),
        ("5E+3", 5000.0),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("-2.", -2.0),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("-.inf", -math.inf),
        ("!!float 3", 3.0),
        ("!!str 3", "3"),
        ("'1e-6'", "1e-6"),
        ("yes", "yes"),
        ("off", "off"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
    ],
)
def test_scalars_follow_the_core_schema(text: str, expected: object) -> None:
    got = value(text)
    assert got == expected
    assert type(got) is type(expected)


def test_places_of_keys_and_items() -> None:
    places = parse("a:\n  b: [x, y]\n", "f").places
    assert str(places["a", "b"]) == "f:2:3"
    assert str(places["a", "b", 1]) == "f:2:10"
    assert str(Place(1, 0, 0, "override 'x'")) == "override 'x'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "f:2:1: a: duplicate key (first at line 1); delete one of the two"),
        ("a: {b: 1, b: 2}", "f:1:11: a.b: duplicate key"),
        ("a:\n\t- b", "f:2:1: not valid YAML"),
        ("a: 1\n---\nb: 2", "f:2:1: not valid YAML: expected a single document"),
        ("a: !!python/object/apply:os.system [id]", "f:1:4: tag "),
        ("a: !!int x", "f:1:4: 'x' is not a int"),
        ("1: 2", "f:1:1: a key must be a field's name"),
        ("a: b\n \x01", "f:2:2: not valid YAML: character U+0001"),
        ("a: &a [*a]", "f:1:4: over"),
        ("[" * 5000, "f:1:1: nested too deeply"),
        ("a: *b", "f:1:4: not valid YAML: found undefined alias 'b'"),
    ],
)
def test_errors_are_placed(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "f")
    assert str(caught.value).startswith(message)


def test_alias_bomb_is_stopped() -> None:
    levels = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 9))
    with pytest.raises(ConfigError, match=f"over {MAX_NODES} values"):
        parse(f"l0: &l0 [x]\n{levels}", "f")


def test_written_strings_read_back_as_strings() -> None:
    data = {"x": ["1e-6", "yes", "010", "null", "1_0", "2020-01-01", 1e-6, 1e-8, 0.5, True, None, 3, "ü"]}
    text = yaml.dump(data, Dumper=Dumper, allow_unicode=True)
    assert parse(text, "f").value == data
    assert yaml.safe_load(text) == data  # readers of YAML 1.1 agree
