"""What is shipped: `kernels/` installs as `sapq_triton.kernels`, never under its bare name."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "sapq_triton", "kernels"]
IMPORT = """
import sapq_triton
from sapq_triton.kernels import solve_columns
print(sapq_triton.__file__, solve_columns.__file__, sep="\\n")
"""


def run(*args: object, cwd: Path, path: Path | None = None) -> str:
    """stdout of `python ARGS`, run in `cwd` with only `path` on PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def shipped_modules() -> set[str]:
    """The Python files of the checkout, by the names that an installation must give them."""
    package = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("sapq_triton/**/*.py")}
    return package | {
        f"sapq_triton/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("kernels/**/*.py")
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that a build leaves nothing in the real ones."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def dist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from that sdist."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    install = ["-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
    run(*install, "--target", folder, wheel, cwd=folder)
    return folder


def test_every_package_is_listed():
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = {name.rpartition("/")[0].replace("/", ".") for name in shipped_modules()}
    assert len(listed) == len(set(listed))
    assert set(listed) == folders


def test_wheel_carries_every_module(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.endswith(".py")}
    assert names == shipped_modules()
    assert names >= {"sapq_triton/kernels/solve_columns.py", "sapq_triton/models/resnet.py"}


def test_wheel_carries_the_launch_parameters(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert "sapq_triton/kernels/launch.json" in archive.namelist()


def test_wheel_has_one_top_level_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        top = {name.partition("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"sapq_triton"}


def test_sdist_keeps_the_layout(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"kernels/solve_columns.py", "sapq_triton/models/resnet.py", "LICENSE"}


def test_installed_wheel_imports_from_elsewhere(site, tmp_path):
    package, kernel = run("-c", IMPORT, cwd=tmp_path, path=site).splitlines()
    assert Path(package) == site / "sapq_triton" / "__init__.py"
    assert Path(kernel) == site / "sapq_triton" / "kernels" / "solve_columns.py"


def test_checkout_imports_without_installation(checkout, tmp_path):
    _, kernel = run("-c", IMPORT, cwd=tmp_path, path=checkout).splitlines()
    assert Path(kernel) == checkout / "kernels" / "solve_columns.py"


def test_checkout_on_the_path_leaves_the_name_kernels_to_its_owner(checkout, tmp_path):
    """Hugging Face's library, here a stand-in, wins although the checkout comes first."""
    owner = tmp_path / "kernels"
    owner.mkdir()
    (owner / "__init__.py").write_text("get_kernel = print\n")
    code = "import kernels; print(kernels.get_kernel and kernels.__file__)"
    found = run("-c", code, cwd=checkout, path=tmp_path)
    assert Path(found.strip()) == owner / "__init__.py"
