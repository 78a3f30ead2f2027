"""`import petite_fast`: the public names, nothing printed, nothing heavy pulled in."""

from __future__ import annotations

import subprocess
import sys

import petite_fast


def test_public_names_exist():
    assert petite_fast.__version__
    for name in petite_fast.__all__:
        assert getattr(petite_fast, name) is not None


def test_import_is_silent_and_light():
    code = (
        "import sys; from petite_fast import LoRAConv3d\n"
        "heavy = {'monai', 'lightning', 'lightning_fabric', 'typer', 'matplotlib', 'nilearn',"
        " 'nibabel', 'scipy', 'peft', 'pydicom', 'tensorboard'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
