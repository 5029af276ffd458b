"""The import rules: server -> engine -> kernels, nothing the other way, and nothing heavy where it must stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("server", "engine", "kernels", "training")
ALLOWED = {
    "server": {"server", "engine"},
    "engine": {"engine", "kernels"},
    "kernels": {"kernels"},
    "training": {"training", "engine", "kernels"},
}
# The command line hands `tidar train` over to the training package, and only when it is asked to.
EXCEPTIONS = {("server/cli.py", "training")}


def imports(file: Path) -> list[str]:
    tree = ast.parse(file.read_text())
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.append(node.module or "")
    return names


def ours(package: str) -> list[tuple[str, str]]:
    found = []
    for file in sorted((ROOT / package).rglob("*.py")):
        relative = file.relative_to(ROOT).as_posix()
        for name in imports(file):
            root = name.split(".")[0]
            if root in (*PACKAGES, "tests", "benchmarks", "docs"):
                found.append((relative, name))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_lies_below_them(package):
    wrong = [
        (file, name)
        for file, name in ours(package)
        if name.split(".")[0] not in ALLOWED[package] and (file, name.split(".")[0]) not in EXCEPTIONS
    ]
    assert not wrong


def test_the_server_sees_only_the_names_that_the_engine_exports():
    wrong = [(file, name) for file, name in ours("server") if name.split(".")[0] == "engine" and name != "engine"]
    assert not wrong


def test_training_uses_only_models_and_configuration_of_the_engine():
    allowed = ("engine.models", "engine.config")
    wrong = [(f, n) for f, n in ours("training") if n.split(".")[0] == "engine" and not n.startswith(allowed)]
    assert not wrong


@pytest.mark.parametrize("module", ["kernels", "engine"])
def test_importing_a_package_loads_neither_torch_nor_transformers(module):
    code = f"import {module}, sys; assert not {{'torch', 'transformers'}} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def tracked(*patterns: str) -> list[str]:
    """Files that git has, or would take with the next commit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which a wheel of the tracked files is installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in tracked(*PACKAGES, "pyproject.toml", "README.md", "LICENSE*"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*install, str(source)], check=True)
    return target


def test_transformers_models_import_beside_an_installed_wheel(site, tmp_path):
    """Transformers takes any package named ``kernels`` for its own optional dependency and looks at its version."""
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import kernels, transformers\n"
        f"assert kernels.__file__.startswith({str(site)!r}), kernels.__file__\n"
        "from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)


def test_the_wheel_has_the_data_and_its_command_runs(site):
    data = tracked("server/bundled_model", "training/corpus/data", "training/corpus/facts.json")
    assert {"server/bundled_model/model.safetensors", "training/corpus/facts.json"} < set(data)
    assert [name for name in data if not (site / name).is_file()] == []
    shown = subprocess.run(
        [sys.executable, "-m", "server.cli", "--version"], cwd=site, check=True, capture_output=True, text=True
    )
    assert shown.stdout.startswith("tidar-server 20")
