"""What pyproject.toml cannot say: the compiled kernels, left out where there is no compiler."""

from setuptools import Extension, setup

KERNELS = Extension(
    "axial_fusion.cpu._kernels",
    ["axial_fusion/cpu/kernels.c"],
    depends=["axial_fusion/cpu/axial_attention.h"],
    extra_compile_args=["-O3", "-Wno-psabi"],
    optional=True,
)
setup(ext_modules=[KERNELS])
