"""The structure of the code: imports point down, and files, functions and packages stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [  # from the ground up; a module imports from its own package and from those below
    {"startup", "limits"},
    {"errors"},
    {"instruction_sets"},
    {"files", "wheels", "hub", "optim", "native_build", "templates"},
    {"model"},
    {"config"},
    {"tokenizer"},
    {"corpus", "hardware"},
    {"checkpoint"},
    {"conversion"},
    {"shards"},
    {"data"},
    {"inference"},
    {"evaluation", "serving"},
    {"export", "distributed"},
    {"training"},
    {"sweeps"},
]
COMMAND = len(LAYERS)
FILES = [*ROOT.glob("*.py"), *(ROOT / "pocketlm").rglob("*.py")]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in FILES
    if path.name != "__init__.py"
}


def layer(module: str) -> int:
    """The number of a module's layer.

    The root's model.py belongs to the layer of pocketlm/model/; the other root files are commands.
    """
    top, _, rest = module.partition(".")
    package = module if module == "model" else rest.partition(".")[0]
    return (
        next((n for n, names in enumerate(LAYERS) if package in names), COMMAND)
        if rest or module == "model"
        else COMMAND
    )


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def own_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [
                f"{node.module}.{alias.name}"
                if f"{node.module}.{alias.name}" in MODULES
                else node.module
                for alias in node.names
            ]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def graph() -> dict[str, set[str]]:
    return {
        module: set(own_imports(ast.parse(path.read_text()))) for module, path in MODULES.items()
    }


def test_every_module_is_in_a_layer():
    assert {package(module) for module in MODULES if "." in module} == set.union(*LAYERS)


def test_imports_point_down():
    wrong = []
    for module, imported in graph().items():
        for other in imported:
            below = (
                layer(other) < layer(module)
                or layer(module) == layer(other) < COMMAND
                and package(module) == package(other)
            )
            if not below:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_nothing_imports_a_command():
    assert not {
        other for imported in graph().values() for other in imported if layer(other) == COMMAND
    }


def test_no_circle():
    imported, done = graph(), set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join((*path, module))}"
        if module not in done:
            for other in imported[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in imported:
        visit(module, ())


def test_no_own_import_stands_in_a_function():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, functions) and list(own_imports(node))), (
                f"{module}: {node.name}"
            )


GENERATE = "infer.main(['--ckpt', 'examples/microgpt.ckpt', '--new-document', '--device', 'cpu'])"


@pytest.mark.parametrize(
    "module, work",
    [
        pytest.param("infer", GENERATE, id="infer.py generates"),
        pytest.param("serve", "None", id="serve.py"),
        pytest.param("pocketlm.inference.generate", "None", id="the library"),
    ],
)
def test_inference_brings_in_no_library_that_takes_long_and_is_not_needed(module, work):
    """torch._dynamo (torch.compile) and sympy take a second, transformers two, Lightning five."""
    slow = {"lightning", "transformers", "datasets", "matplotlib", "torch._dynamo", "sympy"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; {work}; print({slow} & set(sys.modules))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.stdout.split("\n")[-2], done.returncode) == ("set()", 0), done.stderr


def test_importing_prints_nothing_and_opens_no_network():
    program = "import socket, sys; socket.socket.connect = None; import " + ", ".join(MODULES)
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# ---- sizes ----


def test_a_package_has_three_to_nine_modules():
    packages = [path.parent for path in (ROOT / "pocketlm").glob("*/__init__.py")]
    sizes = {path.name: len(list(path.glob("*.py"))) - 1 for path in packages}
    assert {name: size for name, size in sizes.items() if not 3 <= size <= 9} == {}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


SOURCES = [*FILES, *(ROOT / "benchmarks").glob("*.py")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_have_at_most_fifty_lines_and_seven_parameters(path):
    for function in functions(path):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        parameters = len(named) + bool(arguments.vararg) + bool(arguments.kwarg)
        assert function.end_lineno - function.lineno < 50, function.name
        assert parameters <= 7, function.name


def test_no_test_file_is_longer_than_five_hundred_lines():
    lengths = {
        path.name: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_no_test_file_imports_another():
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert not (module and module.split(".")[-1].startswith("test_")), path
