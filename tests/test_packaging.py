"""Wheel, sdist and checkout: what is inside, and that every module imports from where it is installed."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("launch", "trainer", "model", "data", "ds_configs", "recipes")
IMPORT_ALL = """
import importlib, json, pkgutil, sys
import basestone
places = {"basestone": basestone.__file__}
for module in pkgutil.walk_packages(basestone.__path__, "basestone."):
    places[module.name] = importlib.import_module(module.name).__file__
print()  # a library may have written a line
print(json.dumps(places))
"""
HEAVY = ("torch", "deepspeed", "megatron", "transformers")


def packages() -> set[str]:
    """Name every folder of the checkout that is a package, as it is called when installed."""
    inits = [path for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")]
    return {".".join(("basestone", *path.parent.relative_to(ROOT).parts)) for path in inits}


def sources() -> dict[str, Path]:
    """Give the path inside a wheel of every file that belongs there."""
    found = {f"basestone/{name}": ROOT / "basestone" / name for name in ("__init__.py", "py.typed")}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            found[f"basestone/{path.relative_to(ROOT)}"] = path
    tables = (ROOT / "trainer" / "meters").glob("*.csv")
    for path in [*(ROOT / "ds_configs").glob("*.json"), *(ROOT / "recipes").glob("*.toml"), *tables]:
        found[f"basestone/{path.relative_to(ROOT)}"] = path
    return found


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def python(code: str, cwd: Path, **environment: str) -> str:
    return run(sys.executable, "-c", code, cwd=cwd, **environment).stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an sdist, a wheel from it, and a wheel straight from the checkout, in a copy that has no leftovers."""
    folder = tmp_path_factory.mktemp("build")

    def leftovers(place: str, names: list[str]) -> set[str]:
        top = {"build", "dist", "runs"} if Path(place) == ROOT else set()
        return {
            name for name in names if name in top or name.startswith((".", "__pycache__")) or "egg-info" in name
        }

    shutil.copytree(ROOT, folder / "checkout", ignore=leftovers)
    build = [sys.executable, "-m", "build"]
    run(*build, "--outdir", str(folder / "from_sdist"), "checkout", cwd=folder)
    run(*build, "--wheel", "--outdir", str(folder / "direct"), "checkout", cwd=folder)
    return folder


def wheel(folder: Path) -> Path:
    (found,) = folder.glob("*.whl")
    return found


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    inside = {
        name: data for name, data in contents(wheel(built / "direct")).items() if ".dist-info/" not in name
    }
    expected = {name: path.read_bytes() for name, path in sources().items()}
    assert sorted(inside) == sorted(expected)
    assert inside == expected
    assert "basestone/ds_configs/zero3.json" in inside and "basestone/recipes/quickstart.toml" in inside
    assert {
        name.rpartition("/")[0].replace("/", ".") for name in inside if name.endswith(".py")
    } == packages() | {"basestone"}


def test_the_wheel_has_licence_script_and_extras(built):
    inside = {
        name.partition(".dist-info/")[2]: data for name, data in contents(wheel(built / "direct")).items()
    }
    assert inside["entry_points.txt"].decode().split() == [
        "[console_scripts]",
        "basestone",
        "=",
        "basestone.launch.cli:main",
    ]
    assert inside["licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    metadata = inside["METADATA"].decode()
    for line in (
        "Name: basestone",
        "Requires-Python: >=3.11",
        "License-Expression: Apache-2.0",
        "Provides-Extra: hf",
    ):
        assert line in metadata.splitlines()


def test_a_wheel_from_the_sdist_is_the_same(built):
    direct, again = contents(wheel(built / "direct")), contents(wheel(built / "from_sdist"))
    assert sorted(direct) == sorted(again)
    assert [name for name in direct if direct[name] != again[name]] == []


def test_the_sdist_holds_the_tests(built):
    (path,) = (built / "from_sdist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "Makefile", "constraints.txt", "tests/small.py"} <= names
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    assert tests <= names
    assert not [name for name in names if "__pycache__" in name]


def test_every_module_imports_from_an_installed_wheel(built, tmp_path):
    """Installed beside the checkout, with the working directory elsewhere."""
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check")
    run(*pip, "--target", str(target), str(wheel(built / "direct")), cwd=tmp_path)
    places = json.loads(python(IMPORT_ALL, tmp_path, PYTHONPATH=str(target)).splitlines()[-1])
    assert places["basestone"] == str(target / "basestone/__init__.py")
    assert [name for name, place in places.items() if not place.startswith(f"{target}/basestone/")] == []
    modules = {path.relative_to(ROOT).with_suffix("") for path in sources().values() if path.suffix == ".py"}
    expected = {".".join(("basestone", *module.parts)).removesuffix(".__init__") for module in modules}
    expected = {name.replace("basestone.basestone", "basestone") for name in expected}
    assert set(places) == expected
    version = python("import basestone; print(basestone.__version__)", tmp_path, PYTHONPATH=str(target))
    assert f"basestone-{version}-" in wheel(built / "direct").name


# ---- a checkout that is not installed -----------------------------------------------------------------------


def test_a_checkout_runs_from_its_root_and_by_pythonpath(tmp_path):
    code = "import basestone.trainer.config as module; print(module.__file__)"
    expected = str(ROOT / "trainer/config.py")
    assert python(code, ROOT) == expected
    assert python(code, tmp_path, PYTHONPATH=str(ROOT)) == expected


def test_data_files_are_found_in_a_checkout(tmp_path):
    code = (
        "from importlib import resources\n"
        "print(resources.files('basestone.ds_configs').joinpath('zero1.json').is_file(),\n"
        "      resources.files('basestone.recipes').joinpath('quickstart.toml').is_file())"
    )
    assert python(code, tmp_path, PYTHONPATH=str(ROOT)) == "True True"


def test_the_package_is_not_inside_itself(tmp_path):
    code = "import importlib.util as u; print(u.find_spec('basestone.basestone.basestone'))"
    assert python(code, tmp_path, PYTHONPATH=str(ROOT)) == "None"


def test_importing_setup_builds_nothing(tmp_path):
    assert python("import basestone.setup; print('ok')", tmp_path, PYTHONPATH=str(ROOT)) == "ok"


@pytest.mark.parametrize("module", ["trainer.config", "trainer.load", "trainer.plan", "trainer.places"])
def test_a_folder_is_no_package_of_its_own(module):
    """From the root `import trainer.config` finds the folder: it must fail, or classes would exist twice."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "attempted relative import beyond top-level package" in done.stderr


# ---- rules about imports ------------------------------------------------------------------------------------


def absolute_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_inside_the_package_imports_are_relative(folder):
    wrong = {
        str(path.relative_to(ROOT)): name
        for path in (ROOT / folder).rglob("*.py")
        for name in absolute_imports(path)
        if name.partition(".")[0] in (*FOLDERS, "tests") or name.startswith("basestone.")
    }
    assert wrong == {}


def test_tests_and_benches_import_the_package_by_its_name():
    wrong = {
        str(path.relative_to(ROOT)): name
        for folder in ("tests", "bench")
        for path in (ROOT / folder).rglob("*.py")
        for name in absolute_imports(path)
        if name.partition(".")[0] in FOLDERS
    }
    assert wrong == {}


def test_inits_are_empty():
    assert [
        path for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py") if path.stat().st_size
    ] == []


def modules_of(*folders: str) -> list[str]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]
    names = [path.relative_to(ROOT).with_suffix("").parts for path in paths if path.stem != "__init__"]
    return [".".join(("basestone", *parts)) for parts in names]


LIGHT = {
    "the command line": ["basestone.launch.cli"],
    "launch": modules_of("launch"),
    "data": modules_of("data"),
    "plain modules": [
        *(f"basestone.model.{name}" for name in ("config", "presets", "layout", "flops")),
        *(f"basestone.trainer.{name}" for name in ("config", "load", "plan", "schedule", "errors", "places")),
        *(
            f"basestone.trainer.{name}"
            for name in (
                "checkpoint.reader",
                "checkpoint.writer",
                "rundir",
                "run_lock",
                "report.records",
                "report.page",
                "report.live",
            )
        ),
    ],
}


@pytest.mark.parametrize("modules", LIGHT.values(), ids=LIGHT)
def test_what_must_start_quickly_leaves_torch_alone(modules):
    code = f"import sys, {', '.join(modules)}; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code, ROOT) == "[]"


def test_every_test_file_is_collected():
    """A folder with a name on pytest's list of those that it passes over would be silent."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", ""],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
