"""JSON schemas of growing difficulty, by name: those that a grammar can follow, and those that it has to refuse."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(properties: Schema, *required: str, **more: Any) -> Schema:
    """An object of exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required or properties),
        "additionalProperties": False,
        **more,
    }


_INTEGER, _STRING, _SHORT = {"type": "integer"}, {"type": "string"}, {"type": "string", "maxLength": 12}

SCALARS: dict[str, Schema] = {
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "integer": _INTEGER,
    "number": {"type": "number"},
    "string": _STRING,
    "several types": {"type": ["integer", "null", "boolean"]},
    "const text": {"const": "exactly this"},
    "const with everything": {"const": {"a": [1, 2.5, {"b": None}], "ü": 'é\n"q"'}},
    "enum of texts": {"enum": ["red", "green", "blue"]},
    "enum of all types": {"enum": [1, "1", None, True, [1], {"a": 1}, 2.5]},
    "anything": {},
}

BOUNDS: dict[str, Schema] = {
    "integer bounds": {"type": "integer", "minimum": -17, "maximum": 1023},
    "integer exclusive bounds": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    "large integer bounds": {"type": "integer", "minimum": 999_999_999_998, "maximum": 1_000_000_000_003},
    "number bounds": {"type": "number", "minimum": 0.25, "maximum": 0.375},
    "number exclusive bounds": {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 1},
    "multiple of an integer": {"type": "integer", "multipleOf": 7, "minimum": 0},
    "text lengths": {"type": "string", "minLength": 2, "maxLength": 6},
    "one character": {"type": "string", "minLength": 1, "maxLength": 1},
    "array lengths": {"type": "array", "items": _INTEGER, "minItems": 2, "maxItems": 5},
    "empty array": {"type": "array", "maxItems": 0},
    "number of properties": {"type": "object", "minProperties": 1, "maxProperties": 3, "additionalProperties": _INTEGER},
}

PATTERNS: dict[str, Schema] = {
    "pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"},
    "pattern anywhere": {"type": "string", "pattern": "[0-9]+x", "maxLength": 12},
    "alternatives in a pattern": {"type": "string", "pattern": "^(low|mid(dle)?|high)$"},
    "pattern of umlauts": {"type": "string", "pattern": "^[äöüß]{1,4}$"},
    "pattern of a unicode class": {"type": "string", "pattern": "^\\p{Lu}{1,3}$"},
    "pattern and length": {"type": "string", "pattern": "^(ab)+$", "maxLength": 8},
    "date-time": {"type": "string", "format": "date-time"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "e-mail": {"type": "string", "format": "email"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "uuid": {"type": "string", "format": "uuid"},
    "property names by pattern": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,3}$": _INTEGER},
        "additionalProperties": False,
        "maxProperties": 3,
    },
}

OBJECTS: dict[str, Schema] = {
    "any object": {"type": "object"},
    "empty object": _object({}),
    "one property": _object({"name": _SHORT}),
    "several properties": _object(
        {"name": _SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "ok": {"type": "boolean"}}
    ),
    "optional properties": _object({"a": _INTEGER, "b": _SHORT, "c": {"type": "null"}}, "b"),
    "all optional": {"type": "object", "properties": {"a": _INTEGER, "b": _INTEGER}, "additionalProperties": False},
    "further properties": {"type": "object", "properties": {"a": _INTEGER}, "required": ["a"], "maxProperties": 3},
    "further properties of a type": {
        "type": "object",
        "properties": {"a": _INTEGER},
        "required": ["a"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 4,
    },
    "a map": {
        "type": "object",
        "additionalProperties": {"type": "array", "items": _INTEGER, "maxItems": 2},
        "maxProperties": 3,
    },
    "a forbidden property": {
        "type": "object",
        "properties": {"a": False, "b": _INTEGER},
        "required": ["b"],
        "maxProperties": 2,
    },
    "unicode keys and values": _object(
        {"größe": {"enum": ["klein", "groß"]}, "色": {"const": "赤"}, "🙂": {"type": "boolean"}}
    ),
    "keys that need escapes": _object({'a"b': _INTEGER, "c\\d": _INTEGER, "e\nf": _INTEGER, "": _INTEGER}),
    "nested": _object({"a": _object({"b": _object({"c": _object({"d": _INTEGER})})})}),
    "annotations": _object({"a": {"type": "integer", "title": "A", "description": "number", "default": 3, "examples": [1]}}),
}

ARRAYS: dict[str, Schema] = {
    "array of anything": {"type": "array", "maxItems": 4},
    "array of texts": {"type": "array", "items": _SHORT, "minItems": 1, "maxItems": 3},
    "array of objects": {"type": "array", "items": _object({"x": _INTEGER, "y": _INTEGER}), "minItems": 1, "maxItems": 3},
    "matrix": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 2},
        "minItems": 2,
        "maxItems": 3,
    },
    "tuple": {"type": "array", "prefixItems": [_INTEGER, _SHORT, {"type": "boolean"}], "items": False, "minItems": 3},
    "tuple with a tail": {"type": "array", "prefixItems": [_SHORT], "items": _INTEGER, "minItems": 1, "maxItems": 4},
    "tuple of draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [_INTEGER, {"type": "null"}],
        "additionalItems": False,
        "minItems": 2,
    },
}

UNIONS: dict[str, Schema] = {
    "anyOf scalars": {"anyOf": [_INTEGER, _SHORT, {"type": "null"}]},
    "oneOf scalars": {"oneOf": [{"type": "integer"}, {"type": "boolean"}]},
    "tagged union": {
        "oneOf": [
            _object({"kind": {"const": "circle"}, "radius": {"type": "number", "minimum": 0}}),
            _object({"kind": {"const": "square"}, "side": _INTEGER}),
            _object({"kind": {"const": "point"}}),
        ]
    },
    "anyOf objects that overlap": {"anyOf": [_object({"a": _INTEGER}), _object({"a": _INTEGER, "b": _INTEGER})]},
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": _INTEGER}, "required": ["a"]},
            {"properties": {"b": _SHORT}, "required": ["b"]},
        ],
        "maxProperties": 2,
    },
    "allOf bounds": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    "union in an array": {
        "type": "array",
        "items": {"anyOf": [_INTEGER, _object({"v": _INTEGER})]},
        "minItems": 1,
        "maxItems": 4,
    },
    "optional union": _object({"a": {"anyOf": [{"type": "null"}, _object({"b": {"enum": ["x", "y"]}})]}}),
}

REFERENCES: dict[str, Schema] = {
    "reference": {"$defs": {"id": {"type": "integer", "minimum": 1, "maximum": 99}}, **_object({"a": {"$ref": "#/$defs/id"}})},
    "references to references": {
        "$defs": {
            "a": {"$ref": "#/$defs/b"},
            "b": {"type": "array", "items": {"$ref": "#/$defs/c"}, "maxItems": 2},
            "c": _INTEGER,
        },
        "$ref": "#/$defs/a",
    },
    "definitions of draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"x": {"enum": [1, 2]}},
        **_object({"a": {"$ref": "#/definitions/x"}}),
    },
    "anchor": {"$defs": {"a": {"$anchor": "number", "type": "integer"}}, "$ref": "#number"},
    "list by recursion": {
        "$defs": {
            "list": {"anyOf": [{"type": "null"}, _object({"value": {"enum": [1, 2]}, "next": {"$ref": "#/$defs/list"}})]}
        },
        "$ref": "#/$defs/list",
    },
    "tree": {
        "$defs": {
            "node": _object({"name": _SHORT, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}})
        },
        "$ref": "#/$defs/node",
    },
    "recursion by two": {
        "$defs": {
            "a": {"anyOf": [_INTEGER, {"type": "array", "items": {"$ref": "#/$defs/b"}, "maxItems": 2}]},
            "b": _object({"a": {"$ref": "#/$defs/a"}}),
        },
        "$ref": "#/$defs/a",
    },
    "recursion to the root": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    "expressions": {
        "$defs": {
            "e": {
                "anyOf": [
                    {"type": "integer", "minimum": 0, "maximum": 9},
                    _object(
                        {
                            "op": {"enum": ["+", "*"]},
                            "args": {"type": "array", "items": {"$ref": "#/$defs/e"}, "minItems": 2, "maxItems": 2},
                        }
                    ),
                ]
            }
        },
        "$ref": "#/$defs/e",
    },
}

LIFELIKE: dict[str, Schema] = {
    "person": _object(
        {
            "name": {"type": "string", "minLength": 1, "maxLength": 16},
            "born": {"type": "string", "format": "date"},
            "emails": {"type": "array", "items": {"type": "string", "format": "email"}, "maxItems": 2},
            "address": _object({"street": _SHORT, "city": _SHORT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}, "city"),
        },
        "name",
        "address",
    ),
    "steps of a solution": _object(
        {
            "steps": {
                "type": "array",
                "items": _object({"explanation": _SHORT, "output": _SHORT}),
                "minItems": 1,
                "maxItems": 3,
            },
            "final_answer": _SHORT,
        }
    ),
    "tool call": {
        "anyOf": [
            _object(
                {"name": {"const": "weather"}, "arguments": _object({"city": _SHORT, "unit": {"enum": ["°C", "°F"]}}, "city")}
            ),
            _object({"name": {"const": "add"}, "arguments": _object({"a": {"type": "number"}, "b": {"type": "number"}})}),
        ]
    },
    "invoice": _object(
        {
            "id": {"type": "string", "pattern": "^INV-[0-9]{4}$"},
            "lines": {
                "type": "array",
                "items": _object(
                    {
                        "item": _SHORT,
                        "count": {"type": "integer", "minimum": 1, "maximum": 99},
                        "net": {"type": "number", "minimum": 0},
                    }
                ),
                "minItems": 1,
                "maxItems": 2,
            },
            "paid": {"type": "boolean"},
            "note": {"anyOf": [_SHORT, {"type": "null"}]},
        },
        "id",
        "lines",
        "paid",
    ),
    "a form": _object(
        {
            "fields": {
                "type": "array",
                "items": {
                    "anyOf": [
                        _object(
                            {
                                "type": {"const": "text"},
                                "label": _SHORT,
                                "max": {"type": "integer", "minimum": 1, "maximum": 80},
                            }
                        ),
                        _object(
                            {
                                "type": {"const": "choice"},
                                "label": _SHORT,
                                "options": {"type": "array", "items": _SHORT, "minItems": 1, "maxItems": 2},
                            }
                        ),
                    ]
                },
                "minItems": 1,
                "maxItems": 2,
            }
        }
    ),
}

ENDLESS: dict[str, Schema] = {
    "never complete": {
        "$defs": {"a": _object({"a": {"$ref": "#/$defs/a"}})},
        "$ref": "#/$defs/a",
    },
}
"""Schemas that no finite text satisfies: an output ends when its tokens are used up."""

SCHEMAS: dict[str, Schema] = {
    **SCALARS,
    **BOUNDS,
    **PATTERNS,
    **OBJECTS,
    **ARRAYS,
    **UNIONS,
    **REFERENCES,
    **LIFELIKE,
    **ENDLESS,
}

REFUSED: dict[str, tuple[Schema, str]] = {
    "not": ({"not": _STRING}, "$"),
    "if": (_object({"a": {"if": _STRING, "then": {"maxLength": 2}}}), "$.properties.a"),
    "unique items": (_object({"a": {"type": "array", "uniqueItems": True}}), "$.properties.a"),
    "contains": ({"type": "array", "contains": _INTEGER}, "$"),
    "property names": ({"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}}, "$"),
    "dependent properties": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "$"),
    "unevaluated properties": ({"type": "object", "unevaluatedProperties": False}, "$"),
    "oneOf that overlaps": ({"anyOf": [{"oneOf": [_INTEGER, {"type": "number"}]}]}, "$.anyOf[0]"),
    "look-ahead": ({"type": "array", "items": {"type": "string", "pattern": "^(?=a)b$"}}, "$.items"),
    "back-reference": ({"$defs": {"x": {"type": "string", "pattern": "^(a)\\1$"}}, "$ref": "#/$defs/x"}, "$.$defs.x"),
    "unknown format": (_object({"a b": {"type": "string", "format": "klingon"}}), '$.properties["a b"]'),
    "unknown type": ({"type": "strin"}, "$"),
    "remote reference": (_object({"a": {"$ref": "https://example.com/x.json"}}), "$.properties.a"),
    "missing definition": ({"$ref": "#/$defs/nowhere"}, "$"),
    "nothing to choose from": (_object({"a": {"enum": []}}), "$.properties.a"),
    "bounds that exclude each other": (_object({"a": {"type": "integer", "minimum": 5, "maximum": 2}}), "$.properties.a"),
    "types that exclude each other": ({"allOf": [_STRING, _INTEGER]}, "$"),
}
"""Schemas that are refused, and the place that the message names."""
