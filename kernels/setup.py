"""What pyproject.toml cannot say: the compiled kernels, left out where there is no compiler."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "axial_fusion.cpu._kernels",
            ["axial_fusion/cpu/kernels.c"],
            extra_compile_args=["-O3", "-Wno-psabi"],
            optional=True,
        )
    ]
)
