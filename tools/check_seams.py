"""Check that a vLLM source tree still has everything this project relies on: `python tools/check_seams.py PATH`.

PATH contains the package `vllm`: site-packages, an unpacked wheel, a checkout. Nothing of it is imported, so it may be
of any version and for any device. Each mismatch is one line that ends in the file of ours that depends on it; the exit
code is 1 if there are any. A kernel whose plain substitute no longer fits is only a note: without a GPU it would run in
Triton's interpreter.

The table is `seams.toml`. Two kinds are not in it but read from our own sources: names imported from vLLM, and the
parameters of the kernels that have plain substitutes. Whether something still means the same, no tool can tell.
"""

import argparse
import ast
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("seams.toml")
SOURCES = (ROOT / "vllm_easyspec", ROOT / "cpu" / "triton-interpreter" / "triton_interpreter_backend")
NOTE = "note: "
Statement = ast.stmt | ast.ExceptHandler


class MismatchError(Exception):
    """The message says what is missing in vLLM."""


# ---- reading sources ----


def own_names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The functions, classes and variables that statements define."""
    names: dict[str, ast.stmt] = {}
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[statement.name] = statement
        for target in getattr(statement, "targets", [getattr(statement, "target", None)]):
            if isinstance(target, ast.Name):
                names[target.id] = statement
    return names


def own_members(cls: ast.ClassDef) -> dict[str, ast.AST]:
    """Methods and attributes of a class, those that its methods set on `self` included."""
    stored = [node for node in ast.walk(cls) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    set_on_self = {node.attr: node for node in stored if getattr(node.value, "id", None) == "self"}
    return set_on_self | own_names(cls.body)


def decorators(node: ast.AST) -> dict[str, ast.expr]:
    """Decorators by name, called or not."""
    found = getattr(node, "decorator_list", [])
    return {getattr(part.func if isinstance(part, ast.Call) else part, "id", ""): part for part in found}


@dataclass(frozen=True)
class Parameter:
    name: str
    by_place: bool
    required: bool


def parameters(function: ast.AST | None) -> list[Parameter]:
    if not isinstance(function, ast.FunctionDef):
        raise MismatchError(f"what should be a function is {ast.unparse(function) if function else 'a module'!r}")
    given = function.args
    ordered = [*given.posonlyargs, *given.args]
    first_default = len(ordered) - len(given.defaults)
    by_name = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    found = [Parameter(part.arg, True, index < first_default) for index, part in enumerate(ordered)]
    return found + [Parameter(part.arg, False, default is None) for part, default in by_name]


def fields(cls: ast.ClassDef) -> list[Parameter]:
    """Parameters of a dataclass's constructor, to be given by keyword."""
    found = []
    for statement in cls.body:
        if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in getattr(statement.value, "keywords", [])}
            is_field = getattr(getattr(statement.value, "func", None), "id", "").lower() == "field"
            has_default = options.keys() & {"default", "default_factory"} if is_field else statement.value
            if options.get("init") != "False":
                found.append(Parameter(statement.target.id, False, not has_default))
    return found


@dataclass
class Module:
    name: str
    path: Path

    @cached_property
    def statements(self) -> list[ast.stmt]:
        """Statements of the module's top level, including those inside its `if`, `try` and `with`."""
        found = list(ast.parse(self.path.read_text("utf-8")).body)
        for statement in found:  # grows meanwhile
            if isinstance(statement, ast.If | ast.Try | ast.ExceptHandler | ast.With):
                found += [part for part in ast.iter_child_nodes(statement) if isinstance(part, Statement)]
        return found

    @cached_property
    def names(self) -> dict[str, ast.stmt]:
        return own_names(self.statements)

    @cached_property
    def imports(self) -> list[tuple[str, str, str]]:
        """(name here, module, name there) of each `from ... import`."""
        package = self.name.split(".") if self.path.name == "__init__.py" else self.name.split(".")[:-1]
        found = []
        for statement in self.statements:
            if isinstance(statement, ast.ImportFrom):
                above = package[: len(package) - statement.level + 1] if statement.level else []
                origin = ".".join([*above, *([statement.module] if statement.module else [])])
                found += [(alias.asname or alias.name, origin, alias.name) for alias in statement.names]
        return found


@dataclass
class VllmTree:
    folder: Path  # holds `vllm`
    modules: dict[str, Module | None] = field(default_factory=dict)

    def module(self, name: str) -> Module | None:
        if name not in self.modules:
            stem = self.folder.joinpath(*name.split("."))
            path = next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)
            self.modules[name] = Module(name, path) if path else None
        return self.modules[name]

    def find(self, module: str, name: str, on_the_way: tuple = ()) -> tuple[Module, ast.stmt | None]:
        """Where a module's name is defined; no statement if it is itself a module, or from outside vLLM."""
        source = self.module(module)
        if source is not None and (module, name) not in on_the_way:
            if name in source.names:
                return source, source.names[name]
            for here, origin, there in source.imports:
                if here == name and not origin.startswith("vllm"):
                    return source, None
                if here in (name, "*") and origin.startswith("vllm"):
                    with suppress(MismatchError):
                        return self.find(origin, there if here == name else name, (*on_the_way, (module, name)))
            if submodule := self.module(f"{module}.{name}"):
                return submodule, None
        raise MismatchError(f"there is no {module}.{name}")

    def lineage(self, module: str, name: str) -> list[ast.ClassDef]:
        """A class and its bases in vLLM, nearest first."""
        home, cls = self.find(module, name)
        if not isinstance(cls, ast.ClassDef):
            raise MismatchError(f"{module}.{name} is no class")
        found = [cls]
        for base in cls.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                with suppress(MismatchError):  # from outside vLLM
                    found += self.lineage(home.name, base.id)
        return found

    def members(self, place: str) -> dict[str, ast.AST]:
        module, _, name = place.partition(":")
        found: dict[str, ast.AST] = {}
        for cls in reversed(self.lineage(f"vllm.{module}", name)):
            found |= own_members(cls)
        return found

    def parameters(self, place: str) -> list[Parameter]:
        """Of a function, a method or a class's constructor, without `self`."""
        module, _, path = place.partition(":")
        name, _, method = path.partition(".")
        _, node = self.find(f"vllm.{module}", name)
        if not isinstance(node, ast.ClassDef):
            return parameters(node)
        function = self.members(f"{module}:{name}").get(method or "__init__")
        if isinstance(function, ast.FunctionDef):
            return parameters(function)[0 if "staticmethod" in decorators(function) else 1 :]
        if method:
            raise MismatchError(f"vllm.{module}:{name} has no method {method}")
        return [part for cls in reversed(self.lineage(f"vllm.{module}", name)) for part in fields(cls)]


# ---- the table's kinds ----


def check_has(vllm: VllmTree, place: str, names: str) -> None:
    missing = [name for name in names.split() if name not in vllm.members(place)]
    if missing:
        raise MismatchError(f"vllm.{place} has no {', '.join(missing)}")


def check_takes(vllm: VllmTree, written: str, exactly: bool = False) -> None:
    place, _, rest = " ".join(written.split()).partition("(")
    theirs = vllm.parameters(place)
    call = ast.parse(f"call({rest}", mode="eval").body
    in_place, keywords = [argument.id for argument in call.args], {keyword.arg for keyword in call.keywords}
    names, given = [part.name for part in theirs], {*in_place, *keywords}
    fits = [part.name for part in theirs if part.by_place][: len(in_place)] == in_place and keywords <= set(names)
    if (
        not fits
        or any(part.required and part.name not in given for part in theirs)
        or (exactly and given != set(names))
    ):
        raise MismatchError(f"vllm.{place} takes ({', '.join(names)}), and we give ({rest}")


def check_overrides(vllm: VllmTree, path: Path, cls: str, place: str, names: str) -> None:
    ours, theirs = own_members(Module("", path).names[cls]), vllm.members(place)
    abstract = {name for name, node in theirs.items() if "abstractmethod" in decorators(node)}
    wanted = dict.fromkeys(abstract, False) | {name.rstrip("?"): name.endswith("?") for name in names.split()}
    for name, may_be_missing in wanted.items():
        if name not in theirs and may_be_missing:
            continue
        if name not in theirs or name not in ours:
            lacking = f"vllm.{place}" if name not in theirs else f"our {cls}"
            raise MismatchError(f"{lacking} has no {name}, and {cls} has to override vllm.{place}'s")
        if ast.FunctionDef in {type(ours[name]), type(theirs[name])}:
            takes, took = ([part.name for part in parameters(of[name])] for of in (theirs, ours))
            if takes != took:
                raise MismatchError(
                    f"vllm.{place}.{name} takes ({', '.join(takes)}), and {cls}'s takes ({', '.join(took)})"
                )
    clashes = sorted(ours.keys() & theirs.keys() - wanted.keys() - {"__init__"})
    if clashes:
        raise MismatchError(f"vllm.{place} has {', '.join(clashes)}, which {cls} would replace by accident")


def check_says(vllm: VllmTree, path: str, text: str) -> None:
    file = vllm.folder / "vllm" / path
    if not file.is_file() or text not in file.read_text("utf-8"):
        raise MismatchError(f"vllm/{path} does not say {text}")


def check_kernel(vllm: VllmTree, kernel: str, stand_in: ast.FunctionDef) -> None:
    place = kernel.removeprefix("vllm.") if kernel.startswith("vllm.") else f"v1.worker.gpu.{kernel}"
    theirs = vllm.parameters(":".join(place.rsplit(".", 1)))
    if [part.name for part in theirs] != [part.name for part in parameters(stand_in)][1:]:
        raise MismatchError(f"{NOTE}vllm.{place} has other parameters than {stand_in.name}")


# ---- all seams: our file, and checks with their arguments, one of which must pass ----
Seam = tuple[str, list[tuple]]


def in_table() -> Iterator[Seam]:
    for ours, kinds in tomllib.loads(TABLE.read_text("utf-8")).items():
        for place, names in kinds.get("has", {}).items():
            yield ours, [(check_has, place, names)]
        for calls in kinds.get("takes", []):
            yield ours, [(check_takes, call) for call in ([calls] if isinstance(calls, str) else calls)]
        yield from ((ours, [(check_takes, call, True)]) for call in kinds.get("stands_for", []))
        for cls, places in kinds.get("overrides", {}).items():
            yield from ((ours, [(check_overrides, ROOT / ours, cls, *place)]) for place in places.items())
        for path, texts in kinds.get("says", {}).items():
            yield from ((ours, [(check_says, path, text)]) for text in texts)


def in_our_sources() -> Iterator[Seam]:
    """Kernels with substitutes, and imports: if a file imports a name from several places, one must have it."""
    for path in (path for folder in SOURCES for path in sorted(folder.rglob("*.py"))):
        ours, imported = str(path.relative_to(ROOT)), {}
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("vllm."):
                for alias in node.names:
                    imported.setdefault(alias.asname or alias.name, []).append((node.module, alias.name))
            if isinstance(node, ast.Import):
                dotted = [alias.name.rpartition(".") for alias in node.names if alias.name.startswith("vllm.")]
                imported |= {name: [(module, name)] for module, _, name in dotted}
            if "stands_for" in decorators(node):
                yield ours, [(check_kernel, decorators(node)["stands_for"].args[0].value, node)]
        for places in imported.values():
            yield ours, [(VllmTree.find, *place) for place in places]


def check_all(folder: Path) -> tuple[int, list[str]]:
    """How many seams there are, and a line for each mismatch or note."""
    vllm = VllmTree(folder)
    if vllm.module("vllm") is None:
        raise SystemExit(f"{folder} contains no package vllm. Give the folder that contains vllm/")
    seams, mismatches = [*in_table(), *in_our_sources()], []
    for ours, alternatives in seams:
        reasons = []
        for check, *arguments in alternatives:
            try:
                check(vllm, *arguments)
            except MismatchError as mismatch:
                reasons.append(str(mismatch))
        if len(reasons) == len(alternatives):
            mismatches.append(f"{'; '.join(reasons)} [{ours}]")
    return len(seams), mismatches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the folder that contains vllm/")
    count, lines = check_all(parser.parse_args().path)
    mismatches = sum(not line.startswith(NOTE) for line in lines)
    print(*lines, f"{count} seams checked, {mismatches} mismatches", sep="\n")
    return int(mismatches > 0)


if __name__ == "__main__":
    sys.exit(main())
