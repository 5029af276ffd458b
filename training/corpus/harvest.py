"""Harvest facts (signature, first docstring sentence) about standard-library names into `facts.json`.

The file is frozen in the repository because docstrings differ between Python versions and platforms.
Run `python -m training.corpus.harvest` with CPython 3.11 to write it again; the result is sorted and free of addresses.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import platform
import random
import re
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FACTS = HERE / "facts.json"
BUILTIN_TYPES = ("str", "list", "dict", "set")
MAX_PARAMETERS = 4
MAX_LEFT_OUT = 900
INVENTED = 1000
# Modules of which nothing is taught: their names serve as real names that the model must admit not to know.
_UNTAUGHT_MODULES_TEXT = """
smtplib ftplib imaplib poplib telnetlib xmlrpc.client ast dis tokenize symtable codeop cmd curses mailbox mimetypes
binascii quopri plistlib netrc colorsys wave imghdr gettext selectors ssl select mmap codecs stringprep email.message
email.utils html.parser http.cookies cmath numbers tarfile lzma bz2 zlib zipimport pkgutil runpy trace tracemalloc
cProfile pstats faulthandler bdb weakref array sched hmac graphlib locale unicodedata filecmp linecache fileinput stat
ipaddress socketserver http.client http.cookiejar wsgiref.util xml.etree.ElementTree xml.dom.minidom
"""
UNTAUGHT_MODULES = _UNTAUGHT_MODULES_TEXT.split()


def taught_names() -> dict[str, str]:
    """Every taught dotted name with its module (`builtins` for builtins and methods of builtin types)."""
    table = tomllib.loads((HERE / "data" / "names.toml").read_text())
    names = {_dotted(module, short): _home(module) for module, shorts in table.items() for short in shorts.split()}
    for name in tomllib.loads((HERE / "data" / "answers.toml").read_text()):
        names[name] = module_of(name)
    return dict(sorted(names.items()))


def _dotted(module: str, short: str) -> str:
    return short if module == "builtins" else f"{module}.{short}"


def _home(module: str) -> str:
    return "builtins" if module in BUILTIN_TYPES else module


def module_of(name: str) -> str:
    """The longest importable prefix of a dotted name."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in BUILTIN_TYPES:
            return "builtins"
        try:
            importlib.import_module(prefix)
        except ImportError:
            continue
        return prefix
    return "builtins"


def resolve(name: str, module: str) -> Any:
    """The object that a dotted name stands for."""
    target: Any = importlib.import_module(module)
    path = name if module == "builtins" else name[len(module) + 1 :]
    for part in path.split("."):
        target = inspect.getattr_static(target, part) if inspect.isclass(target) else getattr(target, part)
    if isinstance(target, (classmethod, staticmethod)):
        return target.__func__
    return target


def signature(target: Any, name: str) -> str:
    """A short signature: no self, no annotations, at most four parameters; empty for values and properties."""
    if not callable(target):
        return ""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return _signature_from_doc(target, name)
    if parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    shown = [_parameter(p) for p in parameters]
    return _call(shown)


def _call(shown: list[str]) -> str:
    if len(shown) > MAX_PARAMETERS:
        shown = [*shown[: MAX_PARAMETERS - 1], "..."]
    return f"({', '.join(shown)})"


def _parameter(parameter: inspect.Parameter) -> str:
    name = parameter.name.lstrip("_") or "x"
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return f"*{name}"
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return f"**{name}"
    if parameter.default is inspect.Parameter.empty:
        return name
    default = repr(parameter.default)
    return name if "<" in default or len(default) > 12 else f"{name}={default}"


def _signature_from_doc(target: Any, name: str) -> str:
    """C functions often state their signature in the first line of the docstring."""
    short = name.rsplit(".", 1)[-1]
    match = re.match(rf"(?:\w+\.)*{re.escape(short)}\((.*?)\)", inspect.getdoc(target) or "")
    if match is None:
        return "(...)"
    text = re.sub(r"[\[\]]", "", match[1])
    text = re.sub(r"\s*->.*", "", text)
    parts = [p.strip() for p in text.split(",") if p.strip() and p.strip() not in ("/", "*")]
    return _call(parts)


def summary(target: Any) -> str:
    """The first sentence of the docstring, on one line."""
    doc = inspect.getdoc(target) or ""
    doc = re.sub(r"^[\w.]+\([^\n]*\)(\s*->[^\n]*)?(\s*--)?\s*\n*", "", doc).strip()
    first = re.split(r"\n\s*\n", doc)[0]
    first = " ".join(first.split())
    match = re.match(r"(.+?[^.A-Z])\.(\s|$)", first)
    return match[1] if match else first.rstrip(".")


def fact(name: str, module: str) -> dict[str, str]:
    """What is kept of one name."""
    target = resolve(name, module)
    has_doc = not isinstance(target, (str, int, list, dict, float))
    return {
        "name": name,
        "module": module,
        "signature": signature(target, name),
        "summary": summary(target) if has_doc else "",
    }


def left_out(taught: dict[str, str]) -> list[str]:
    """Real names that are deliberately not taught, so that the model learns to say that it does not know them."""
    modules = [*UNTAUGHT_MODULES, *dict.fromkeys(m for m in taught.values() if m != "builtins")]
    known = {id(resolve(name, module)) for name, module in taught.items()}
    tails = {name.rsplit(".", 1)[-1] for name in taught}
    found = {name for module in sorted(set(modules)) for name in _public(module, known) if name not in taught}
    clear = [n for n in found if n.rsplit(".", 1)[-1] not in tails or n.split(".")[0] in UNTAUGHT_MODULES]
    by_hash = sorted(clear, key=lambda n: hashlib.sha256(n.encode()).hexdigest())
    return sorted(by_hash[:MAX_LEFT_OUT])


def _public(module: str, known: set[int]) -> list[str]:
    target = importlib.import_module(module)
    names = getattr(target, "__all__", None) or [
        n for n in vars(target) if getattr(vars(target)[n], "__module__", "") == module
    ]
    good = [n for n in names if re.fullmatch(r"[A-Za-z]\w+", n) and not n.isupper() and hasattr(target, n)]
    return [f"{module}.{n}" for n in good if callable(getattr(target, n)) and id(getattr(target, n)) not in known]


def invented(taught: dict[str, str], seed: int = 0) -> list[str]:
    """Names that do not exist: mixed words, camel case, and taught names put into the wrong module."""
    rng = random.Random(seed)
    parts = tomllib.loads((HERE / "data" / "refusals.toml").read_text())["invented"]
    modules = sorted({m for m in taught.values() if m != "builtins"}) + list(BUILTIN_TYPES)
    tails = [name.rsplit(".", 1)[-1] for name in taught if "." in name]
    made = list(parts["known_mistakes"])
    for _ in range(INVENTED // 4):
        verb, noun, word = rng.choice(parts["verbs"]), rng.choice(parts["nouns"]), rng.choice(parts["words"])
        made += [
            f"{rng.choice(modules)}.{word}",
            f"{rng.choice(modules)}.{verb}_{noun}",
            f"{rng.choice(modules)}.{rng.choice(tails)}",
            rng.choice(
                (
                    f"{verb}_{noun}",
                    f"{verb}{noun.title()}",
                    f"{rng.choice(modules)}.{verb.title()}{noun.title()}",
                    f"{word}_{noun}",
                )
            ),
        ]
    return [name for name in dict.fromkeys(made) if not _exists(name)]


def _exists(name: str) -> bool:
    module = module_of(name)
    try:
        resolve(name, module)
    except (AttributeError, ImportError):
        return False
    return True


def harvest() -> dict[str, Any]:
    """All facts with their origin, the names left out and the names that do not exist."""
    taught = taught_names()
    return {
        "header": {
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "note": "Docstring text comes from CPython and stands under the Python Software Foundation licence.",
        },
        "facts": [fact(name, module) for name, module in taught.items()],
        "left_out": left_out(taught),
        "invented": invented(taught),
    }


if __name__ == "__main__":
    FACTS.write_text(json.dumps(harvest(), indent=1) + "\n")
