"""The tree is what ARCHITECTURE.md says: a folder per op, imports one way, importing does nothing, contracts stated."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ultra_kernels
import ultra_kernels.nn
from ultra.config.fields import ModelFields
from ultra.ffn import FFNS
from ultra.layers.module import GROUPS, Component, Mixer
from ultra.mixers import MIXERS
from ultra.norms import NORMS
from ultra_kernels._dispatch import _FILES, OPS
from ultra_kernels._testing import cases

ROOT = Path(__file__).resolve().parent.parent
CSRC, KERNELS = ROOT / "csrc", ROOT / "ultra_kernels"
FOLDERS = sorted(path.parent for path in KERNELS.glob("*/op.py"))
COMPULSORY = {"__init__.py", "op.py", "reference.py", "cases.py"}
BACKENDS = {f"{file}.py": backend for backend, file in _FILES.items() if backend != "reference"}
SOURCES = {"native.py": "{}_cpu.cpp", "cuda.py": "{}_cuda.cu"}  # the compiled half of a backend
MODULES = sorted(p for top in ("ultra", "ultra_kernels") for p in (ROOT / top).rglob("*.py"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "__pycache__"}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


# ---- folders


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_an_op_folder_holds_its_files_and_no_others(folder: Path) -> None:
    assert COMPULSORY <= names(folder) <= COMPULSORY | BACKENDS.keys()
    tables = {backend for op in OPS.values() if op.kernels == f"ultra_kernels.{folder.name}" for backend in op.names}
    assert tables - {"reference"} == {BACKENDS[name] for name in names(folder) & BACKENDS.keys()}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_a_compiled_backend_has_its_source(folder: Path) -> None:
    """csrc/<op>/<op>_cpu.cpp for native.py; likewise for cuda.py."""
    for name, source in SOURCES.items():
        own = CSRC / folder.name / source.format(folder.name)
        assert own.exists() == (folder / name).exists(), f"{folder.name}/{name}"


@pytest.mark.parametrize(
    "folder", sorted(p for p in CSRC.iterdir() if p.is_dir() and p.name != "common"), ids=lambda p: p.name
)
def test_a_csrc_folder_belongs_to_an_op(folder: Path) -> None:
    op = folder.name
    assert KERNELS / op in FOLDERS
    compiled = {source.format(op) for source in SOURCES.values()}
    assert names(folder) & compiled and names(folder) <= compiled | {f"{op}.h", f"{op}.cuh"}
    for name, source in SOURCES.items():
        assert (folder / source.format(op)).exists() == (KERNELS / op / name).exists()


def test_packages_of_ultra_kernels_are_ops() -> None:
    packages = {p.parent for p in KERNELS.glob("*/__init__.py")}
    assert packages == set(FOLDERS)
    assert {Path(*op.package.split(".")).name for op in OPS.values()} == {p.name for p in FOLDERS}


@pytest.mark.parametrize("name", OPS)
def test_an_op_is_public_tested_and_benched(name: str) -> None:
    folder = OPS[name].package.rpartition(".")[2]
    assert name in ultra_kernels.__all__ and callable(getattr(ultra_kernels, name))
    own = (ROOT / "tests" / "ops" / f"test_{folder}.py").read_text(encoding="utf-8")
    assert re.search(rf"\b{name}\b", own), "its own test file does not call it"
    listed = cases(name)
    assert len({case.name for case in listed}) == len(listed) >= 3
    assert any(case.bench for case in listed) or name == "retention_step"
    assert f"| `{name}` |" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(names[-1] == "reference" for names in OPS[name].order.values())


def test_packages_are_typed() -> None:
    """PEP 561: a type checker reads the annotations of an installed package only where py.typed lies in it."""
    assert (ROOT / "ultra" / "py.typed").is_file() and (KERNELS / "py.typed").is_file()


# ---- imports

# A module imports its own line and those above; what is not listed is a tool, on the line of ultra.estimate.
ORDER = (
    ("ultra", "ultra.errors", "ultra.config", "ultra.config.fields", "ultra.config.yaml12", "ultra.config.training"),
    ("ultra.layers",),
    ("ultra.norms", "ultra.ffn"),
    ("ultra.mixers",),
    ("ultra.model",),
    ("ultra.config.model", "ultra.config.run", "ultra.config.schema", "ultra.config.load"),
    ("ultra.data",),
    ("ultra.train",),
    ("ultra.export",),
    ("ultra.inference", "ultra.estimate"),
    ("ultra.cli", "ultra.__main__"),
)
RANK = {name: rank for rank, line in enumerate(ORDER) for name in line}
EXACT = {"ultra", "ultra.config"}  # their submodules stand on lines of their own


def rank(module: str) -> int:
    """Of the longest listed name that `module` is or lies in."""
    name = module
    while name not in RANK or (name in EXACT and name != module):
        if not name:
            return RANK["ultra.estimate"]
        name = name.rpartition(".")[0]
    return RANK[name]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(imported module, line): also inside functions, but not for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for child in ast.walk(statement)
    }
    package = dotted(path).split(".") if path.name == "__init__.py" else dotted(path).split(".")[:-1]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])])
            base = base if node.level else str(node.module)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = (ROOT / Path(*inner.split("."))).with_suffix(".py").exists()
                yield (inner if is_module else base), node.lineno


def test_imports_point_one_way() -> None:
    wrong = []
    for path in MODULES:
        module = dotted(path)
        for target, line in imports(path):
            top = target.partition(".")[0]
            if module.startswith("ultra_kernels"):
                if top in ("ultra", "bench", "tests"):
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: ultra_kernels imports {target}")
            elif top in ("bench", "tests"):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {target} is not installed")
            elif top == "ultra" and module != "ultra" and rank(target) > rank(module):
                # (the package ultra itself is the door: its functions import what they call)
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {module} imports {target}, which stands above it")
    assert not wrong, "\n".join(wrong)


def test_the_order_of_imports_is_checked() -> None:
    """That the rule would see a breach: the trainer stands above the model, the ops below everything."""
    assert rank("ultra.train.optim") > rank("ultra.data.cache") > rank("ultra.config.load") > rank("ultra.model.block")
    assert rank("ultra.model.block") > rank("ultra.mixers.ode") > rank("ultra.norms.derf") > rank("ultra.layers.linear")
    assert rank("ultra.layers.linear") > rank("ultra.config.fields") == rank("ultra.config") == rank("ultra.errors")
    assert rank("ultra.export.ternary") < rank("ultra.doctor") == rank("ultra.estimate") < rank("ultra.cli")
    found = dict(imports(ROOT / "ultra_kernels" / "bidirectional_scan" / "op.py"))
    assert {"ultra_kernels._dispatch", "ultra_kernels.selective_scan.op", "torch"} <= found.keys()


QUIET = r"""
import importlib, os, sys
import torch, numpy, pydantic, yaml, pyarrow.parquet, tokenizers, safetensors.torch, tqdm, filelock
try:
    import triton, triton.language
except ImportError:
    pass
root, modules = sys.argv[1], sys.argv[2:]
breaches = set()

def ours(skip):
    # The innermost caller outside the standard library's wrappers, if it is a file of ours.
    frame = sys._getframe(2)
    while frame is not None and os.path.basename(frame.f_code.co_filename) in skip:
        frame = frame.f_back
    name = "" if frame is None else frame.f_code.co_filename
    # a virtual environment may lie inside the checkout
    mine = name.startswith(root) and "site-packages" not in name
    return f"{name[len(root) + 1:]}:{frame.f_lineno}" if mine else None

real_getitem = os._Environ.__getitem__
def getitem(self, key):
    where = ours(("os.py", "_collections_abc.py", "<frozen os>", "<frozen _collections_abc>"))
    if where:
        breaches.add(f"{where} reads the environment: {key}")
    return real_getitem(self, key)
os._Environ.__getitem__ = getitem

def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "subprocess.Popen", "socket.connect"):
        where = ours(("pathlib.py", "io.py", "__init__.py", "_local.py", "glob.py", "<frozen os>", "os.py"))
        if where and not str(arguments[0]).endswith((".py", ".pyc")):
            breaches.add(f"{where} touches {event}: {arguments[0]}")
sys.addaudithook(hook)

def forbidden(*args, **kwargs):
    breaches.add(f"{ours(()) or 'a library'} asks for the CUDA device")
    return 0
for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_properties",
             "_lazy_init", "init", "synchronize"):
    setattr(torch.cuda, name, forbidden)

for module in modules:
    importlib.import_module(module)
sys.exit("\n".join(sorted(breaches)) or 0)
"""


def quietly(root: Path, modules: list[str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", QUIET, str(root), *modules]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=root, check=False)


def test_importing_does_nothing() -> None:
    """No device query, no environment read, no file access, by any module of both packages."""
    has_triton = importlib.util.find_spec("triton") is not None
    modules = [dotted(p) for p in MODULES if p.name != "__main__.py" and (has_triton or "triton" not in p.stem)]
    done = quietly(ROOT, modules)
    assert done.returncode == 0, done.stderr


def test_a_loud_import_would_be_noticed(tmp_path: Path) -> None:
    lines = ["import os, pathlib, torch", "os.environ.get('HOME')", "pathlib.Path('data').read_text()",
             "torch.cuda.is_available()"]  # fmt: skip
    (tmp_path / "loud.py").write_text("\n".join(lines))
    (tmp_path / "data").touch()
    done = quietly(tmp_path, ["loud"])
    assert done.returncode == 1
    for line, breach in (2, "reads the environment: HOME"), (3, "touches open: data"), (4, "asks for the CUDA device"):
        assert f"loud.py:{line} {breach}" in done.stderr


# ---- contracts


def definitions() -> Iterator[tuple[Path, str, ast.FunctionDef]]:
    """Every function and method that is public by its name, with its qualified name."""

    def visit(body: list[ast.stmt], prefix: str, path: Path) -> Iterator[tuple[Path, str, ast.FunctionDef]]:
        for node in body:
            if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
                yield path, prefix + node.name, node
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body, f"{prefix}{node.name}.", path)

    for path in MODULES:
        yield from visit(ast.parse(path.read_text(encoding="utf-8")).body, "", path)


def test_no_public_function_takes_any_keyword() -> None:
    """A misspelt option must be an error, so no `**kwargs`."""
    found = list(definitions())
    assert len(found) > 300
    assert not [f"{path.relative_to(ROOT)}: {name}" for path, name, node in found if node.args.kwarg is not None]


def contract(name: str, text: str | None) -> list[str]:
    """What the docstring of a public object lacks."""
    text = text or ""
    wanted = {
        "an equation": re.search(r"\S = \S", text),
        "shapes in brackets": re.search(r"`\[[^\]`]*\]`", text),
        "what it raises": "Raises" in text,
        "a source": re.search(r"arXiv:\d{4}\.\d{4,5}|et al\. \d{4}", text),
    }
    return [f"{name}: {what}" for what, there in wanted.items() if not there]


def test_every_op_states_its_contract() -> None:
    functions = [n for n in ultra_kernels.__all__ if inspect.isfunction(getattr(ultra_kernels, n))]
    ops = [n for n in functions if n in OPS or n.endswith("ternary")]
    assert set(functions) - set(ops) == {"available", "use_backend"}
    lacking = [problem for n in ops for problem in contract(n, getattr(ultra_kernels, n).__doc__)]
    assert not lacking, "\n".join(lacking)
    for name in ("available", "use_backend", "BackendUnavailable", "MoEStats", "PackedTernary"):
        assert len((getattr(ultra_kernels, name).__doc__ or "").split()) >= 8, name
    assert "Raises" in (ultra_kernels.use_backend.__doc__ or "")


def test_every_layer_states_its_contract() -> None:
    layers = ultra_kernels.nn
    lacking = [problem for name in layers.__all__ for problem in contract(name, getattr(layers, name).__doc__)]
    assert not lacking, "\n".join(lacking)
    for name in layers.__all__:
        layer = getattr(layers, name)
        parameters = inspect.signature(layer.__init__).parameters
        if name not in ("PackedBitLinear", "PackedMoE"):  # made from a layer
            assert parameters["device"].default is None and parameters["dtype"].default is None, name
            assert "reset_parameters" in dir(layer)


def test_entry_points_of_ultra_state_their_contract() -> None:
    import ultra
    from ultra.config import load_config
    from ultra.export import save_ternary
    from ultra.inference import Pipeline
    from ultra.model import Encoder, build_model
    from ultra.train import train

    methods = Encoder.forward, Pipeline.fill_mask, Pipeline.embed, Pipeline.evaluate
    for function in (ultra.load, ultra.load_ternary, save_ternary, load_config, build_model, train, *methods):
        text = function.__doc__ or ""
        assert len(text.split()) >= 15 and "Raises" in text, function.__qualname__
        for parameter in inspect.signature(function).parameters:
            assert parameter in ("self", "cfg") or re.search(rf"\b{parameter}\b", text), function.__qualname__


@pytest.mark.parametrize("name", [*MIXERS, *NORMS, *FFNS])
def test_a_component_states_what_it_must(name: str) -> None:
    component = {**MIXERS, **NORMS, **FFNS}[name]
    assert issubclass(component, Component) and issubclass(component.Fields, ModelFields)
    assert issubclass(component, Mixer) == (name in MIXERS)
    assert component.param_group in GROUPS
    module = sys.modules[component.__module__]
    assert (Path(module.__file__ or "").name == f"{name}.py") or name in FFNS
    assert component.Fields.__module__ == component.__module__, "its fields stand beside it"
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", f"{module.__doc__} {component.__doc__}"), "a source"
    for field in component.Fields.__annotations__:
        assert component.Fields.model_fields[field].description
