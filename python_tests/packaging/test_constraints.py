"""constraints.txt pins what pyproject.toml asks for, and those versions are the ones tested."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("tomllib came with Python 3.11", allow_module_level=True)

import tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    project = PROJECT["project"]
    listed = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    return sorted(canonical(re.match(r"[\w.-]+", item)[0]) for item in listed)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    found = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in found}


@pytest.mark.parametrize("name", requirements())
def test_every_requirement_is_pinned_to_what_is_installed(name):
    assert name in pins()
    installed = importlib.metadata.version(name).split("+")[0]
    assert installed == pins()[name]


def test_the_build_needs_no_torch():
    names = {re.match(r"[\w-]+", item)[0] for item in PROJECT["build-system"]["requires"]}
    assert names == {"setuptools", "pybind11", "cmake", "ninja"}
