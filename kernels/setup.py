"""What pyproject.toml cannot say: the compiled kernels, left out where there is no compiler."""

from setuptools import Extension, setup

KERNELS = Extension(
    "axial_fusion.cpu._kernels",
    ["axial_fusion/cpu/kernels.c"],
    depends=[
        f"axial_fusion/cpu/{name}.h" for name in ("level", "axial_attention", "slice_attention", "group_norm")
    ],
    extra_compile_args=["-O3", "-Wno-psabi"],
    optional=True,
)
setup(ext_modules=[KERNELS])
