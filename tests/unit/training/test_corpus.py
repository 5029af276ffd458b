"""The training corpus: frozen, deterministic, complete for what people ask most, and apart from its evaluation."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from random import Random
from typing import Any

import pytest

from training.corpus import build, phrasings
from training.corpus.build import Corpus, build_corpus, corpus_hash

HASH = "6322191403e09181ad4d8ac46ded168db8352884efc4c02d566a131b74dff52d"
DATA = Path(build.__file__).parent / "data"
_POPULAR_TEXT = """
print len range sorted enumerate zip map filter open isinstance sum min max any all input int str.split str.join
str.format str.replace str.strip str.startswith list.append list.extend list.sort list.pop dict.get dict.items
dict.update dict.setdefault set.add reversed super property getattr os.path.join os.walk os.listdir os.makedirs
os.environ os.path.exists pathlib.Path pathlib.Path.mkdir pathlib.Path.read_text pathlib.Path.glob shutil.copy
shutil.rmtree glob.glob tempfile.TemporaryDirectory collections.Counter collections.defaultdict collections.deque
collections.namedtuple collections.OrderedDict itertools.chain itertools.groupby itertools.product
itertools.combinations functools.lru_cache functools.partial functools.reduce functools.wraps json.dumps json.loads
re.sub re.match re.findall re.compile csv.reader csv.DictReader textwrap.dedent string.Template base64.b64encode
hashlib.sha256 struct.pack pickle.dumps copy.deepcopy math.sqrt math.ceil math.floor random.randint random.choice
random.shuffle statistics.mean decimal.Decimal datetime.datetime datetime.timedelta time.sleep time.perf_counter
subprocess.run sys.argv argparse.ArgumentParser logging.getLogger threading.Thread threading.Lock asyncio.run
asyncio.gather asyncio.sleep concurrent.futures.ThreadPoolExecutor contextlib.contextmanager dataclasses.dataclass
enum.Enum unittest.TestCase heapq.heappush bisect.insort urllib.request.urlopen sqlite3.connect
"""
POPULAR = _POPULAR_TEXT.split()


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus()


def _written() -> dict[str, dict[str, Any]]:
    return tomllib.loads((DATA / "answers.toml").read_text())


def _namespace() -> dict[str, Any]:
    names = [*tomllib.loads((DATA / "modules.toml").read_text()), "html"]
    loaded = {name.split(".")[0]: importlib.import_module(name.split(".")[0]) for name in names}
    for name in names:
        importlib.import_module(name)
    return {**loaded, "Decimal": loaded["decimal"].Decimal}


def test_the_corpus_is_frozen(corpus: Corpus) -> None:
    assert corpus_hash(corpus) == HASH, (
        "The corpus changed. If that is intended, put corpus_hash(build_corpus()) into HASH and train the bundled model again."
    )


def test_sampling_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import random; from training.corpus.build import build_corpus, corpus_hash; c = build_corpus();"
        "r = random.Random(5); print(corpus_hash(c), [c.sample(r) for _ in range(200)], len(c.dev_questions))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]


def test_what_people_ask_most_is_covered(corpus: Corpus) -> None:
    ids = {item.id for item in corpus.items}
    written = _written()
    for name in POPULAR:
        assert f"about:{name}" in ids
        assert len(written[name]["tasks"]) >= 2
        assert written[name]["held_out_task"]


def test_answers_contain_what_is_required_and_nothing_forbidden(corpus: Corpus) -> None:
    for item in corpus.items:
        assert all(text in item.answer for text in item.required), item.id
        assert not any(text in item.answer for text in item.forbidden), item.id


def test_stated_results_are_true() -> None:
    namespace = _namespace()
    for name, entry in _written().items():
        if "result" in entry:
            assert repr(eval(entry["example"], dict(namespace))) == entry["result"], name
        else:
            compile(entry["example"], name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_module_overviews_name_only_what_is_taught_or_exists() -> None:
    namespace = _namespace()
    for module, entry in tomllib.loads((DATA / "modules.toml").read_text()).items():
        for quoted in entry["about"].split("`")[1::2]:
            if "." in quoted:
                eval(quoted, {**namespace, "unittest": importlib.import_module("unittest.mock") and namespace["unittest"]})
        assert f"`{module}`" in entry["about"]


def test_a_refusal_never_repeats_the_name(corpus: Corpus) -> None:
    unknown = [item for item in corpus.items if item.kind == "unknown"]
    assert len(unknown) > 1000
    assert all(item.name not in item.answer for item in unknown)


def test_no_taught_spelling_is_refused(corpus: Corpus) -> None:
    forms = {form for item in corpus.items for form in item.forms}
    dev = {item.name for _, item in corpus.dev_questions if item.kind == "unknown"}
    unknown = {item.name for item in corpus.items if item.kind == "unknown"}
    assert not forms & (unknown | dev)
    assert not dev & unknown


def test_enough_real_names_are_left_out() -> None:
    facts = json.loads((DATA.parent / "facts.json").read_text())
    assert len(facts["left_out"]) >= 250
    assert not {fact["name"] for fact in facts["facts"]} & set(facts["left_out"])
    assert " at 0x" not in json.dumps(facts["facts"])


def test_training_never_samples_an_evaluation_question(corpus: Corpus) -> None:
    def plain(text: str) -> str:
        return text.lower().strip(" ?.!")

    dev = {plain(question) for question, _ in corpus.dev_questions}
    rng = Random(11)
    for question in (corpus.sample(rng)[0] for _ in range(8000)):
        assert plain(question) not in dev
        assert not build.is_held_out(question)


def test_held_out_shapes_are_no_training_shapes() -> None:
    assert len(phrasings.held_out["about"]) >= 12
    assert len(phrasings.held_out["reverse"]) >= 6
    assert not set(phrasings.held_out["about"]) & set(phrasings.ABOUT)
    assert not set(phrasings.held_out["reverse"]) & set(phrasings.REVERSE)


def test_every_item_can_be_asked(corpus: Corpus) -> None:
    rng = Random(2)
    for item in corpus.items:
        question = item.question(rng)
        assert "{" not in question.replace("{}", ""), question


def test_the_answers_stay_within_what_the_model_can_hold(corpus: Corpus) -> None:
    assert sum(map(len, {item.answer for item in corpus.items})) < 150_000
