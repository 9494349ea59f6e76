"""The structure of the code: layers, import circles, the cost of an import, and duplicated functions."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import rlhf_core

ROOT = Path(__file__).resolve().parents[1]

# A module imports its own layer or a lower one. `rlhf_core/__init__.py` re-exports names from all layers, so only the
# top layer may import it (and any module may import `__version__` from it).
LAYERS = {
    "batch": 0, "config": 0, "plugins": 0, "seeding": 0,
    "ops": 1, "losses": 1,
    "data": 2, "models": 2, "control": 2,
    "rollout": 3, "training": 3, "evaluation": 3,
    "trainers": 4, "report": 4, "demo": 4,
    "cli": 5, "__main__": 5, "__init__": 5,
}  # fmt: skip

DOCUMENTED = ["ops", "losses", "control.py", "batch.py", "models/forward.py"]
DISTRIBUTIONS = {"yaml": "pyyaml"}  # import name -> name in setup.cfg, where they differ


class Import(NamedTuple):
    """One import, with the dotted name that it reaches: `from a.b import c` is `a.b.c`."""

    file: Path
    line: int
    name: str
    lazy: bool  # inside a function, so that it runs when the function is called

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


@cache
def imports_of(file: Path, root: Path) -> tuple[Import, ...]:
    """Return every import in a file, including those in functions and those by `import_module("a literal")`."""
    package = [*file.relative_to(root).parent.parts]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names = [node.args[0].value]
        for name in names:
            yield Import(file.relative_to(root), node.lineno, name, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return tuple(visit(ast.parse(file.read_text(), str(file)), False))


def package_imports(folder: Path, root: Path) -> Iterator[Import]:
    for file in sorted(folder.rglob("*.py")):
        yield from imports_of(file, root)


def part_of(file: Path) -> str:
    """Return the name in LAYERS of a file: `rlhf_core/ops/kl.py` -> `ops`; `rlhf_core/batch.py` -> `batch`."""
    return file.with_suffix("").parts[1]


def layer_violations(root: Path) -> list[str]:
    """Return what is wrong with the imports of `root/rlhf_core`, one line each."""
    faults = []
    for file in sorted((root / "rlhf_core").rglob("*.py")):
        part = part_of(file.relative_to(root))
        if part not in LAYERS:
            faults.append(f"{file}: {part!r} is in no layer; add it to LAYERS in {Path(__file__).name}")
            continue
        for found in imports_of(file, root):
            target = [*found.name.split("."), "__init__"][1]
            target = target if target in LAYERS else "__init__"
            ours = found.top == "rlhf_core" and found.name != "rlhf_core.__version__"
            if ours and LAYERS[target] > LAYERS[part]:
                faults.append(f"{found}: {part} is in layer {LAYERS[part]}, {target} above it in {LAYERS[target]}")
    return faults


def test_imports_go_down():
    assert not layer_violations(ROOT)


def test_the_layers_are_of_what_exists():
    parts = {part_of(file.relative_to(ROOT)) for file in (ROOT / "rlhf_core").rglob("*.py")}
    assert parts == set(LAYERS)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("ops/kl.py", "from rlhf_core.models.forward import token_logprobs\n", "above it"),
        ("ops/kl.py", "def f():\n    import rlhf_core.trainers.ppo\n", "above it"),
        ("ops/kl.py", "from rlhf_core import models\n", "above it"),
        ("ops/kl.py", "from ..trainers import ppo\n", "above it"),
        ("ops/kl.py", "from .. import trainers\n", "above it"),
        ("ops/kl.py", "import importlib\nimportlib.import_module('rlhf_core.cli')\n", "above it"),
        ("training/loop.py", "from rlhf_core.trainers import ppo\n", "above it"),
        ("batch.py", "from rlhf_core.ops import kl\n", "above it"),
        ("config/groups.py", "from rlhf_core.data import loader\n", "above it"),
        ("data/rows.py", "from rlhf_core import preference_loss\n", "__init__ above it"),
        ("data/rows.py", "import rlhf_core\n", "__init__ above it"),
        ("attic/x.py", "import torch\n", "no layer"),
        ("ops/kl.py", "import torch\nfrom . import masked\nfrom ..batch import PackedBatch\n", None),
        ("ops/kl.py", "from rlhf_core import __version__\n", None),
        ("cli.py", "import rlhf_core\nfrom rlhf_core.trainers import ppo\n", None),
        ("__init__.py", "def f():\n    from rlhf_core.trainers import ppo\n", None),
    ],
)
def test_the_layer_checker_sees(tmp_path: Path, file: str, source: str, complaint: str | None):
    write(tmp_path / "rlhf_core" / file, source)
    faults = layer_violations(tmp_path)
    assert len(faults) == (complaint is not None), faults
    assert complaint is None or complaint in faults[0]


def write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


def import_graph(package: Path) -> dict[Path, set[Path]]:
    """Return, for each file of a package, the files of it that it imports: at module level, for type checkers, lazily.

    That importing `a.b` also runs `a/__init__.py` is not an edge, nor is an import of `rlhf_core.__version__`.
    """
    root = package.parent
    files = {file.relative_to(root) for file in package.rglob("*.py")}
    graph: dict[Path, set[Path]] = {}
    for file in files:
        names = {found.name for found in imports_of(root / file, root)} - {"rlhf_core.__version__"}
        graph[file] = {target for name in names if (target := file_of(name, files)) not in (None, file)}
    return graph


def file_of(name: str, files: set[Path]) -> Path | None:
    """Return the file that a dotted name reaches: of the module, or else of the module that the name is taken from."""
    parent, _, last = name.rpartition(".")
    module = Path(*parent.split("."))
    for file in (module / f"{last}.py", module / last / "__init__.py", Path(f"{module}.py"), module / "__init__.py"):
        if file in files:
            return file
    return None


def import_circles(graph: dict[Path, set[Path]]) -> list[str]:
    """Return each set of files that reach one another, as one line with the names in alphabetical order."""
    reachable = {}
    for start in graph:
        found, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        reachable[start] = found
    circles = {
        tuple(sorted(str(other) for other in reachable[file] if file in reachable[other]))
        for file in graph
        if file in reachable[file]
    }
    return [" <-> ".join(circle) for circle in sorted(circles)]


@pytest.mark.parametrize("package", ["rlhf_core", "kernels/rlhf_kernels"])
def test_no_import_circles(package: str):
    assert import_circles(import_graph(ROOT / package)) == []


@pytest.mark.parametrize(
    ("sources", "circles"),
    [
        ({"a.py": "from p.b import f\n", "b.py": "import torch\n"}, []),
        ({"a.py": "from p.b import f\n", "b.py": "def f():\n    from p import a\n"}, ["p/a.py <-> p/b.py"]),
        ({"a.py": "import p.b\n", "b.py": "from . import c\n", "c.py": "from .a import g\n"}, ["a.py", "c.py"]),
        ({"a.py": "from p.d import x\n", "d/__init__.py": "from p.d.x import x\n", "d/x.py": ""}, []),
        ({"a.py": "", "d/__init__.py": "from p.d.x import x\n", "d/x.py": "from p.d import y\n"}, ["p/d/__init__.py"]),
        (
            {"a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B\n",
             "b.py": "from p.a import A\n"},
            ["p/a.py <-> p/b.py"],
        ),
    ],
)  # fmt: skip
def test_the_circle_checker_sees(tmp_path: Path, sources: dict[str, str], circles: list[str]):
    for name, source in sources.items():
        write(tmp_path / "p" / name, source)
    found = import_circles(import_graph(tmp_path / "p"))
    assert len(found) == bool(circles)
    assert all(name in found[0] for name in circles)


def test_no_trainer_imports_a_trainer():
    for found in package_imports(ROOT / "rlhf_core/trainers", ROOT):
        assert not found.name.startswith("rlhf_core.trainers"), found


@pytest.mark.parametrize("part", ["ops", "losses"])
def test_the_maths_needs_torch_alone(part: str):
    ours = ("rlhf_core.ops", "rlhf_core.losses")
    allowed = {"torch"} | ({"rlhf_kernels"} if part == "ops" else set())
    for found in package_imports(ROOT / "rlhf_core" / part, ROOT):
        plain = found.top in sys.stdlib_module_names and found.top != "logging"
        assert plain or found.top in allowed or found.name.startswith(ours), found
    for file in (ROOT / "rlhf_core" / part).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            assert not any(base.endswith("Module") for base in bases), f"{file}:{node.lineno} is an nn.Module"


def test_configs_do_not_need_torch():
    config = ROOT / "rlhf_core/config"
    files = [*config.rglob("*.py")] or [config.with_suffix(".py")]
    assert [str(found) for file in files for found in imports_of(file, ROOT) if found.top == "torch"] == []


def test_only_ops_calls_the_kernels():
    for found in package_imports(ROOT / "rlhf_core", ROOT):
        assert found.top != "rlhf_kernels" or part_of(found.file) == "ops", found


def test_kernels_stand_alone():
    for found in package_imports(ROOT / "kernels", ROOT / "kernels"):
        assert found.top in {"torch", "triton", "rlhf_kernels"} | sys.stdlib_module_names, found
        assert found.top != "triton" or found.lazy or found.file.name.startswith("triton_"), found


def test_transformers_begins_with_the_models():
    for found in package_imports(ROOT / "rlhf_core", ROOT):
        part = part_of(found.file)
        assert found.top != "transformers" or part in ("models", "data") or LAYERS.get(part, 0) > 2, found


def test_trl_is_a_reference_and_never_a_part():
    for folder in ("rlhf_core", "kernels"):
        for found in package_imports(ROOT / folder, ROOT):
            assert found.top != "trl", found


def test_every_import_is_a_declared_dependency():
    """Packages of install_requires may be imported anywhere, those of an extra only lazily."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")

    def names(requirements: str) -> set[str]:
        lines = (line.partition(";")[0] for line in requirements.split("\n") if line)
        return {line.partition(">")[0].partition("[")[0].strip() for line in lines}

    required = names(setup["options"]["install_requires"])
    extra = set().union(*(names(value) for key, value in setup["options.extras_require"].items() if key != "dev"))
    for folder in ("rlhf_core", "kernels"):
        for found in package_imports(ROOT / folder, ROOT):
            if found.top in sys.stdlib_module_names or found.top in ("rlhf_core", "rlhf_kernels"):
                continue
            distribution = DISTRIBUTIONS.get(found.top, found.top)
            if found.name.startswith("torch.utils.tensorboard"):
                distribution = "tensorboard"
            by_extra = distribution in extra and (found.lazy or found.file.name.startswith("triton_"))
            assert distribution in required or by_extra, f"{found}: not in install_requires, nor lazily from an extra"


def run_python(code: str) -> str:
    path = [str(ROOT), str(ROOT / "kernels")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_rlhf_core_is_cheap():
    heavy = run_python(
        "import rlhf_core\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'pyarrow', 'matplotlib', 'trl', 'triton'}\n"
        "print(*heavy & set(sys.modules))"
    )
    assert heavy.split() == []


def test_every_public_name_is_imported_from_its_module():
    """At run time (lazily) and for type checkers, from the same modules."""
    for name in rlhf_core.__all__:
        assert getattr(rlhf_core, name) is not None
    lazily = {f"{module}.{name}" for name, module in rlhf_core._HOMES.items()}
    for_checkers = {i.name for i in imports_of(ROOT / "rlhf_core/__init__.py", ROOT) if i.top == "rlhf_core"}
    assert lazily == for_checkers


def test_importing_the_kernels_looks_for_neither_triton_nor_transformers():
    """Not even whether they are installed: looking a package up may import its parents."""
    run_python(
        "import torch\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert name.partition('.')[0] not in ('triton', 'transformers', 'kernels'), name\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import pkgutil, importlib, rlhf_kernels\n"
        "for module in pkgutil.walk_packages(rlhf_kernels.__path__, 'rlhf_kernels.'):\n"
        "    if not module.name.rpartition('.')[2].startswith('triton_'):\n"
        "        importlib.import_module(module.name)\n"
    )


def functions_of(file: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield functions, and methods as Class.method; not functions inside functions."""

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                yield prefix + node.name, node
            elif isinstance(node, ast.ClassDef):
                yield from visit(node.body, f"{prefix}{node.name}.")

    yield from visit(ast.parse(file.read_text()).body, "")


def test_public_functions_and_classes_have_docstrings():
    """Methods need none where the docstring of their class explains them."""
    missing = []
    for name in DOCUMENTED:
        path = ROOT / "rlhf_core" / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for node in ast.parse(file.read_text()).body:
                named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
                if named and not ast.get_docstring(node):
                    missing.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not missing


class Anonymous(ast.NodeTransformer):
    """Rename a function's arguments and variables in order of appearance, so that a renamed copy is equal."""

    def __init__(self, function: ast.FunctionDef):
        stores = (n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        arguments = (n.arg for n in ast.walk(function.args) if isinstance(n, ast.arg))
        self.local = {*stores, *arguments}
        self.seen: dict[str, str] = {}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if node.id in self.local:
            node.id = self.seen.setdefault(node.id, f"v{len(self.seen)}")
        return node


def copied_functions(folders: list[Path], at_least: int = 8) -> list[str]:
    """Return functions with equal bodies of `at_least` lines, up to local names, docstrings and comments."""
    places = defaultdict(list)
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            for name, function in functions_of(file):
                body = function.body[1:] if ast.get_docstring(function) else function.body
                text = "\n".join(ast.unparse(statement) for statement in body)
                if text.count("\n") + 1 < at_least:
                    continue
                anonymous = Anonymous(function)
                key = "\n".join(ast.dump(anonymous.visit(statement)) for statement in body)
                places[key].append(f"{file}:{function.lineno} {name}")
    return [" = ".join(where) for where in places.values() if len(where) > 1]


def test_no_function_is_written_twice():
    assert not copied_functions([ROOT / "rlhf_core", ROOT / "kernels"])


def test_the_copy_checker_sees_a_renamed_copy(tmp_path: Path):
    body = "".join(f"    {{y}} = {{x}} * {line} + offset\n    use({{y}})\n" for line in range(4))
    first = "def f(x):\n    'Compute something.'\n" + body.format(x="x", y="y")
    second = "class C:\n" + "".join(
        f"    {line}\n" for line in ("def g(self, logprobs):\n" + body.format(x="logprobs", y="z")).splitlines()
    )
    (tmp_path / "first.py").write_text(first)
    (tmp_path / "second.py").write_text(second)
    assert len(copied_functions([tmp_path])) == 1
    (tmp_path / "second.py").write_text(second.replace("* 3", "* 4"))
    assert copied_functions([tmp_path]) == []
