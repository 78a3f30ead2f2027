"""sdist and wheel, built as a user's pip builds them, on a machine without nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCES = (
    ".git",
    ".venv",
    "build",
    "dist",
    "runs",
    "*.egg-info",
    "*.so",
    "__pycache__",
    ".*_cache",
)
SOURCES = (".py", ".typed", ".html", ".css", ".js", ".h", ".cpp", ".cu", ".md")

# The build sets up its own environment twice, for the sdist and for the wheel.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def path_without(tool: str) -> str:
    """PATH less the folders that hold `tool`."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(f for f in folders if not (Path(f) / tool).exists())


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> tuple[Path, str]:
    """Folder with the sdist and the wheel made from it, and what the build printed."""
    pytest.importorskip("build")
    path = path_without("nvcc")
    if shutil.which("c++", path=path) is None:
        pytest.skip("no C++ compiler outside the folder of nvcc")
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "PYTHONPATH")}
    run = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), "source"],
        cwd=folder,
        env={**environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return folder / "dist", run.stdout + run.stderr


def test_a_build_without_nvcc_says_so(build):
    assert "nvcc is neither in CUDACXX nor on PATH, building for the CPU only" in build[1]


def test_sdist_holds_the_sources_and_nothing_else(build):
    (archive,) = build[0].glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    files = {name for name in names if not any(n.startswith(name + "/") for n in names)}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("petite_fast", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in SOURCES
    }
    wanted |= {
        "setup.py",
        "pyproject.toml",
        "CMakeLists.txt",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
    }
    assert wanted <= files, wanted - files
    made = {"PKG-INFO", "setup.cfg"}
    extra = {f for f in files - wanted - made if not f.startswith("petite_fast.egg-info/")}
    assert not extra, extra


def test_wheel_holds_the_package_and_nothing_else(build):
    (wheel,) = build[0].glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    assert "petite_fast/py.typed" in names
    assert [n for n in names if n.endswith(".so")] == [n for n in names if "/_native." in n]
    assert sum(n.endswith(".so") for n in names) == 1
    endings = (".py", ".html", ".css", ".js")
    sources = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "petite_fast").rglob("*")
        if p.suffix in endings
    }
    assert sources == {n for n in names if n.endswith(endings)}
    assert all(n.startswith("petite_fast/") or ".dist-info/" in n for n in names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert any(n.endswith("entry_points.txt") for n in names)


def test_the_wheel_built_without_nvcc_works(build, tmp_path):
    (wheel,) = build[0].glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "site")
    code = (
        "import torch, petite_fast\n"
        "from petite_fast.backends import native\n"
        "info = native.build_info()\n"
        "assert info['cuda'] is False and info['version'] == petite_fast.__version__, info\n"
        "w = native.effective_weight(torch.ones(2, 2, 1, 1, 1), None, None, 1.0,\n"
        "                            torch.tensor([1., 2.]), 1, False, torch.bfloat16)\n"
        "assert w.sum() == 6\n"
        "print(petite_fast.__file__)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path / "site"))
