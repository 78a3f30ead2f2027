"""Builds petite_fast._native with CMake and Ninja; everything else is in pyproject.toml.

PETITE_FAST_CUDA=auto (default): compile the CUDA part when nvcc is found, else build for the CPU
and say so. "on" makes a missing nvcc an error, "off" builds for the CPU alone. nvcc is taken from
CUDACXX, else from PATH. Nothing is downloaded.

PETITE_FAST_SANITIZE=on builds for the CPU alone, with address and undefined-behaviour checks, for
`make sanitize`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """Path of nvcc, or None for a CPU build."""
    mode = os.environ.get("PETITE_FAST_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"PETITE_FAST_CUDA must be auto, on or off, got {mode!r}")
    if mode == "off":
        print("petite_fast: PETITE_FAST_CUDA=off, building for the CPU only")
        return None
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    if nvcc is None and mode == "on":
        raise SystemExit("PETITE_FAST_CUDA=on, but nvcc is neither in CUDACXX nor on PATH")
    if nvcc is None:
        print("petite_fast: nvcc is neither in CUDACXX nor on PATH, building for the CPU only")
    return nvcc


def find_tool(name: str) -> str:
    """Path of a build tool, or an error that names it."""
    tool = shutil.which(name)
    if tool is None:
        raise SystemExit(f"petite_fast needs {name} to build: pip install {name}")
    return tool


class CMakeBuild(build_ext):
    """Configure and build the one extension in a build folder of its own."""

    def build_extension(self, ext: Extension) -> None:
        """Leave the built module where setuptools expects it."""
        import pybind11

        sanitize = os.environ.get("PETITE_FAST_SANITIZE") == "on"
        nvcc = None if sanitize else find_nvcc()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One folder per kind of build, so that neither inherits the other's CMake cache.
        kind = "cmake-sanitize" if sanitize else "cmake-cuda" if nvcc else "cmake-cpu"
        build = Path(self.build_temp).resolve() / kind
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target.parent),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PETITE_FAST_VERSION": self.distribution.get_version(),
            "PETITE_FAST_WITH_CUDA": "ON" if nvcc else "OFF",
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        if sanitize:
            options["CMAKE_CXX_FLAGS"] = "-g -fsanitize=address,undefined -fno-sanitize-recover"
        cmake = find_tool("cmake")
        defines = [f"-D{name}={value}" for name, value in options.items()]
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defines]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            hint = " (PETITE_FAST_CUDA=off builds without CUDA)" if nvcc else ""
            raise SystemExit(f"petite_fast: the native build failed, see above{hint}") from error


setup(
    ext_modules=[Extension("petite_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
