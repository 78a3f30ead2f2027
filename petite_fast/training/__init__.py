"""Training, inference and evaluation of PET reconstruction networks.

`petite_fast.training.loop`, `.inference` and the modules above them need the extra ``app``
(Lightning Fabric, MONAI); `.metrics` and `.objectives` need torch alone.
"""
