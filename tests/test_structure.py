"""The house rules that a program can check: layers, sizes, twins, names, documents, types."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import edgert

ROOT = Path(__file__).parents[1]
FOLDERS = ("storage", "quant", "kernels_cpu", "models", "cli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUP = PROJECT["tool"]["setuptools"]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70

# package -> what it may import of edgert; a name allows itself and everything below it.
ALLOWED = {
    "edgert.errors": (),
    "edgert.units": ("edgert.errors",),
    "edgert.quant": ("edgert.errors", "edgert.units", "edgert.quant"),
    "edgert.storage": ("edgert.errors", "edgert.units", "edgert.quant.formats", "edgert.storage"),
    "edgert.kernels_cpu": (
        "edgert.errors",
        "edgert.units",
        "edgert.quant.formats",
        "edgert.quant.packing",
        "edgert.quant.planes",
        "edgert.quant.reference",
        "edgert.kernels_cpu",
    ),
    "edgert.models": (
        "edgert.errors",
        "edgert.units",
        "edgert.quant",
        "edgert.kernels_cpu",
        "edgert.models",
    ),
    "edgert.cli": ("edgert.cli",),  # and public names: checked by name below
}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def package_files() -> list[Path]:
    """Every source file of the package; the links inside edgert/ are not followed."""
    files = list((ROOT / "edgert").glob("*.py"))
    for folder in FOLDERS:
        files += (ROOT / folder).rglob("*.py")
    return sorted(files)


def all_files() -> list[Path]:
    return [*package_files(), *sorted((ROOT / "tests").rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "edgert" else ("edgert", *parts))
    return name.removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in a file, also inside functions and `if TYPE_CHECKING`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those inside `if` and `for` included."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.For):
            yield from top_level([*statement.body, *statement.orelse])


def below(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ----------------------------------------------------------------------------- packaging


def test_every_package_is_listed_and_linked() -> None:
    expected = {"edgert": "edgert"} | {f"edgert.{f}": f for f in FOLDERS}
    assert SETUP["package-dir"] == expected
    assert set(SETUP["packages"]) == set(expected)
    for folder in FOLDERS:
        link = ROOT / "edgert" / folder
        assert link.is_symlink() and str(link.readlink()) == f"../{folder}"
        inits = list((ROOT / folder).rglob("__init__.py"))
        assert inits == [ROOT / folder / "__init__.py"], "list nested packages in pyproject.toml"


def test_no_second_copy_of_a_module() -> None:
    assert not [m for m in sys.modules if m.split(".")[0] in FOLDERS]


def test_the_version_is_one() -> None:
    assert edgert.__version__ == PROJECT["project"]["version"]


# ----------------------------------------------------------------------------- layers and sizes


@pytest.mark.parametrize("path", package_files(), ids=relative)
def test_imports_point_inwards(path: Path) -> None:
    here = module_name(path)
    packages = [name for name in ALLOWED if below(here, (name,))]
    for module, name in imports_of(path):
        assert module.split(".")[0] not in FOLDERS, f"write edgert.{module}"
        if module.split(".")[0] != "edgert" or "demo" in path.parts:
            continue
        target = f"{module}.{name}" if module in ("edgert", *SETUP["packages"]) else module
        if not packages:
            inside = not below(target, ("edgert.cli",)) or here == "edgert.__main__"
            assert inside, f"{here} must not know the command line"
        elif below(here, ("edgert.cli",)):
            public = module == "edgert" and name in ("", *edgert.__all__)
            assert public or below(target, ALLOWED["edgert.cli"]), f"{target} is not public"
        else:
            assert below(target, ALLOWED[packages[0]]), f"{here} must not import {target}"


@pytest.mark.parametrize("path", all_files(), ids=relative)
def test_files_and_functions_are_short(path: Path) -> None:
    assert path.read_text().count("\n") <= MAX_FILE_LINES
    if "kernels_cpu" in path.parts:
        return
    for function in functions_of(path):
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= MAX_FUNCTION_LINES, f"{function.name} has {lines} lines"


def test_every_kernel_has_a_twin() -> None:
    """`_foo_kernel` has `foo_ref`; `_foo_variant_kernel` may share the twin of `foo`."""
    folders = ("kernels_cpu", "quant", "models")
    files = [p for p in package_files() if p.relative_to(ROOT).parts[0] in folders]
    names = {f.name for path in files for f in functions_of(path)}
    kernels = [n for n in names if n.startswith("_") and n.endswith("_kernel")]
    assert kernels, "no kernel was found: the rule has lost its object"
    for kernel in kernels:
        words = kernel.removeprefix("_").removesuffix("_kernel").split("_")
        twins = {"_".join(words[:n]) + "_ref" for n in range(1, len(words) + 1)}
        assert twins & names, f"{kernel} needs one of {sorted(twins)}"


# ----------------------------------------------------------------------------- public names


@pytest.mark.parametrize("path", package_files(), ids=relative)
def test_all_is_sorted_and_true(path: Path) -> None:
    bound: set[str] = set()
    public: set[str] = set()
    exported: list[str] | None = None
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
    for statement in top_level(tree_of(path).body):
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            bound.add(statement.name)
            public |= set() if statement.name.startswith("_") else {statement.name}
        if not isinstance(statement, ast.Assign | ast.AnnAssign):
            continue
        single = isinstance(statement, ast.AnnAssign)
        for target in [statement.target] if single else statement.targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            bound |= {name.id for name in names if isinstance(name, ast.Name)}
            if isinstance(target, ast.Name) and target.id == "__all__":
                assert statement.value is not None
                exported = ast.literal_eval(statement.value)
    if exported is None:
        assert not public or "demo" in path.parts, f"{relative(path)} has no __all__"
        return
    by_case = sorted(set(exported), key=lambda name: (_case(name), name))
    assert exported in (by_case, sorted(set(exported)))
    assert set(exported) <= bound, set(exported) - bound


def _case(name: str) -> int:
    """Constants before classes before functions, the order of ruff's RUF022."""
    if name.isupper():
        return 0
    return 1 if name[:1].isupper() else 2


def test_public_names_resolve() -> None:
    for name in edgert.__all__:
        assert getattr(edgert, name) is not None, name
    assert set(edgert.__all__) <= set(dir(edgert))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        edgert.nonsense  # noqa: B018


def test_every_exit_code_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    codes = {e.exit_code for e in vars(edgert.errors).values() if hasattr(e, "exit_code")}
    for code in codes | {0}:
        assert re.search(rf"^\| {code} \|", readme, re.MULTILINE), code


# ----------------------------------------------------------------------------- what is loaded


def loaded_by(statement: str) -> set[str]:
    """Top-level names in sys.modules after a statement in a fresh interpreter."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in json.loads(run.stdout.splitlines()[-1])}


def test_import_is_light() -> None:
    heavy = {"numba", "llvmlite", "numpy", "tokenizers", "jinja2", "rich", "click", "psutil"}
    assert not loaded_by("import edgert") & heavy


def test_one_file_imports_the_compiler() -> None:
    """What else imports it costs the process 60 MiB. `edgert doctor` asks LLVM about the CPU."""
    for path in all_files():
        if not {"tests", "demo", "diagnosis.py"} & set(path.relative_to(ROOT).parts):
            found = {module.split(".")[0] for module, _ in imports_of(path)}
            assert not found & {"numba", "llvmlite"}, f"{path}: import it from kernels_cpu.compiler"


def test_help_is_light() -> None:
    heavy = {"numba", "llvmlite", "numpy", "tokenizers", "jinja2", "rich", "prompt_toolkit"}
    for arguments in (["--help"], ["run", "--help"], ["stress", "--help"]):
        call = f"from edgert.cli.main import main\ntry: main({arguments})\nexcept SystemExit: pass"
        assert not loaded_by(call) & heavy, arguments


# ----------------------------------------------------------------------------- documents


def test_every_environment_variable_is_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in package_files():
        for name in re.findall(r"\b(?:EDGERT|NUMBA)_[A-Z][A-Z_]+\b", path.read_text()):
            assert f"`{name}`" in readme, f"{name} of {relative(path)} is not in README.md"


def text_files() -> list[Path]:
    folders = ("edgert", *FOLDERS, "tests")
    found = [p for p in ROOT.iterdir() if p.suffix in (".md", ".toml")]
    for folder in folders:
        found += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md", ".jinja")]
    return [*found, ROOT / ".ci" / "run"]


def test_the_project_speaks_of_itself_alone() -> None:
    words = ["/".join(("", "work", "")), "/".join(("", "tmp", "w/")), "CONTRACT" + ".md"]
    words += ["style" + ".md", "ecosystem" + ".md", "TO" + "DO", "FIX" + "ME"]
    for path in text_files():
        text = path.read_text()
        for word in words:
            assert word not in text, f"{word} in {relative(path)}"


def test_links_in_documents_exist() -> None:
    for path in [p for p in text_files() if p.suffix == ".md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if not re.match(r"[a-z]+:", target):
                assert (path.parent / target).exists(), f"{target} in {relative(path)}"


def test_the_two_commands() -> None:
    """README.md gives one command to use edgert and one to test it, and .ci/run runs the second."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    commands = [line for line in blocks[0].splitlines() if line and not line.startswith("#")]
    assert len(commands) == 2
    assert commands[0].endswith('/edgert run -p "Once upon a time"')
    assert f'\n{commands[1]} "$@"\n' in (ROOT / ".ci" / "run").read_text()


# ----------------------------------------------------------------------------- other checkers


@pytest.mark.timeout(600)
def test_mypy_sees_every_file() -> None:
    pytest.importorskip("mypy")
    run = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"no issues found in (\d+) source files", run.stdout)
    assert found, run.stdout
    installed = [path for path in package_files() if "demo" not in path.parts]
    assert int(found[1]) == len(installed)


def test_ruff() -> None:
    pytest.importorskip("ruff")
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
