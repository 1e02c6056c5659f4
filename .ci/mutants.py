"""Mutants: does a test notice when a module is changed in one place?

    nice -n 19 .venv/bin/python .ci/mutants.py fnreg/grid.py tests/test_grid.py [--count 100] [--seed 0] [--line 12 15]

Each mutant lives in a forked process only, where the module is compiled from the changed tree: no file is ever written.
The tests that reach the changed line run, fast ones before slow ones, and where the module caches then the others.  The
first that fails kills the mutant; so does twice the time of all.  What survives is printed.  With `--line` only the
mutants of these lines are made.
"""

import argparse
import ast
import importlib.machinery
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy  # noqa: F401 - loaded here what every process would load anew
import pytest
import scipy.ndimage  # noqa: F401
import SimpleITK  # noqa: F401
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
PAIRS = "Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, And Or, Add Sub, Mult Div, BitAnd BitOr, LShift RShift"
SWAPS = [tuple(getattr(ast, name) for name in pair.split()) for pair in PAIRS.split(", ")]
SWAPS = [
    *SWAPS,
    *(pair[::-1] for pair in SWAPS),
    (ast.FloorDiv, ast.Mult),
    (ast.Mod, ast.FloorDiv),
    (ast.Pow, ast.Mult),
]
NAMES = {"min": "max", "any": "all", "amin": "amax", "floor": "ceil", "sin": "cos", "zeros": "ones"}
NAMES |= {value: key for key, value in NAMES.items()}


def places(parent: ast.AST) -> Iterator[tuple[Any, Any, str, int | None]]:
    """Every node with its place, but annotations, decorators, docstrings, and what only guards: `raise`, `strict=`."""
    for name, value in ast.iter_fields(parent):
        guards = isinstance(parent, ast.Raise) or getattr(parent, "arg", None) == "strict"
        if guards or name in ("annotation", "returns", "decorator_list"):
            continue
        for k, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(node, ast.AST) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                yield node, parent, name, k
                yield from places(node)


def changes(node: Any, parent: Any) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    yield from (new() for old, new in SWAPS if type(node) is old)
    match node:
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.UnaryOp():
            yield node.operand
        case ast.BinOp(left, ast.MatMult(), right):
            yield ast.BinOp(right, ast.MatMult(), left)
        case ast.IfExp(test, body, other):
            yield ast.IfExp(test, other, body)
        case ast.Call(ast.Attribute(receiver)) if ast.unparse(receiver) not in ("torch", "math"):
            yield receiver
        case ast.Expr() | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Assign([ast.Name(name)], value) if any(getattr(n, "id", "") == name for n in ast.walk(value)):
            yield ast.Pass()
        case ast.Attribute(value, name) if name in NAMES and getattr(parent, "func", None) is node:
            yield ast.Attribute(value, NAMES[name], node.ctx)
        case ast.Name(name) if name in NAMES and getattr(parent, "func", None) is node:
            yield ast.Name(NAMES[name], node.ctx)
    for k, keyword in enumerate(node.keywords if isinstance(node, ast.Call) else ()):
        if keyword.arg and keyword.arg != "strict":
            yield ast.Call(node.func, node.args, node.keywords[:k] + node.keywords[k + 1 :])
    if (
        isinstance(parent, ast.If | ast.While)
        and parent.test is node
        and not isinstance(node, ast.Compare | ast.UnaryOp)
    ):
        yield ast.UnaryOp(ast.Not(), node)


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, what changes, and the changed source, of every mutant."""
    tree = ast.parse(source)
    for node, parent, name, k in list(places(tree)):
        for new in changes(node, parent):
            owner, key = (getattr(parent, name), k) if k is not None else (vars(parent), name)
            shown = parent if isinstance(node, ast.operator | ast.boolop | ast.cmpop | ast.Constant) else node
            before, owner[key] = ast.unparse(shown), new
            after, changed = ast.unparse(parent if shown is parent else new), ast.unparse(tree)
            owner[key] = node
            line = next((n.lineno for n in (node, shown, parent) if hasattr(n, "lineno")), 0)
            yield line, f"{before}  =>  {after}", changed


class Watch:
    """A pytest plugin: the time of every test and the lines of the module that it reaches; the order of the tests."""

    def __init__(self, path: Path, order: dict[str, Any] | None) -> None:
        self.path, self.order, self.seen = str(path), order, dict[str, tuple[float, list[int]]]()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if order := self.order:
            items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        begin, lines = time.perf_counter(), set[int]()

        def trace(frame: Any, *_: Any) -> Any:
            return lines.add(frame.f_lineno) or trace if frame.f_code.co_filename == self.path else None

        sys.settrace(None if self.order else trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.seen[item.nodeid] = time.perf_counter() - begin, sorted(lines)


def run(path: Path, tests: list[str], source: str | None, order: Any, limit: float, told: Path) -> int:
    """pytest's exit code in a process of its own, where the module has another source."""
    if process := os.fork():
        end = time.monotonic() + limit
        while not (done := os.waitpid(process, os.WNOHANG))[0]:
            time.sleep(0.02)
            if time.monotonic() > end:
                os.kill(process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(done[1])
    code, plain = 3, importlib.machinery.SourceFileLoader.get_code

    def get_code(loader: Any, name: str) -> Any:
        return compile(source, path, "exec") if source and loader.path == str(path) else plain(loader, name)

    try:
        importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
        os.dup2(os.open(told.with_suffix(".txt"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
        os.dup2(1, 2)
        watch = Watch(path, order)
        # pytest that rewrites assertions would read the module from its file
        options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "timeout=0", "--assert=plain"]
        code = int(pytest.main([*options, *tests], plugins=[watch]))
        told.write_text(json.dumps(watch.seen))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description="Does a test notice when a module is changed in one place?")
    parser.add_argument("module")
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--count", type=int, help="how many mutants; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--line", type=int, nargs="*")
    given = parser.parse_args()
    os.chdir(ROOT)
    os.environ.setdefault("HYPOTHESIS_PROFILE", "brief")
    sys.path.insert(0, str(ROOT))
    sys.dont_write_bytecode = True
    path, tests = ROOT / given.module, [*given.tests, given.module]  # the examples in its docstrings too
    made = [mutant for mutant in mutants(path.read_text()) if not given.line or mutant[0] in given.line]
    count = min(given.count or len(made), len(made))
    survived, begin = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told"
        if run(path, tests, None, None, 3600, told):
            sys.exit("a test fails without any mutant:\n" + told.with_suffix(".txt").read_text()[-3000:])
        limit, seen = 10 + 2 * (time.monotonic() - begin), json.loads(told.read_text())
        for number, (line, what, source) in enumerate(random.Random(given.seed).sample(made, count)):
            print(f"{number} of {count}, {survived} survived", end="\r", file=sys.stderr, flush=True)
            order = {test: (line not in lines, seconds) for test, (seconds, lines) in seen.items()}
            near = {test: key for test, key in order.items() if not key[0]}
            # what is cached, or runs on import, is seen to be reached by one test or none
            if run(path, tests, source, order if "@constant" in source or not near else near, limit, told) == 0:
                survived += 1
                print(f"{given.module}:{line}  {what}", flush=True)
    print(f"{given.module}: {count} of {len(made)} mutants, {count - survived} killed, {survived} survived")


if __name__ == "__main__":
    main()
