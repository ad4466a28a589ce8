"""All metadata, and the two import packages: `axial_fusion` and `aftersam`."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="aftersam",
    version=(ROOT / "kernels" / "axial_fusion" / "VERSION").read_text(encoding="utf-8").strip(),
    description="Segment organs in CT with SAM, LoRA and attention across neighbouring slices",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["aftersam*"]) + find_packages("kernels"),
    package_dir={"axial_fusion": "kernels/axial_fusion"},
    package_data={
        "aftersam": ["py.typed", "weights/*/*", "weights/*/*/*"],
        "axial_fusion": ["py.typed", "VERSION", "measured/*.json"],
    },
    ext_modules=[  # left out where there is no compiler
        Extension(
            "axial_fusion.cpu._kernels",
            ["kernels/axial_fusion/cpu/kernels.c"],
            depends=[
                f"kernels/axial_fusion/cpu/{name}.h"
                for name in ("level", "axial_attention", "slice_attention", "group_norm")
            ],
            extra_compile_args=["-O3", "-Wno-psabi"],
            optional=True,
        )
    ],
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "accelerate>=1.10",
        "matplotlib>=3.8",
        "monai>=1.6,<1.7",
        "nibabel>=5.2",
        "numpy>=1.26,<3",
        "rich>=13",
        "safetensors>=0.4.5",
        "scipy>=1.11",
        "segment-anything>=1.0",
        "tensorboard>=2.15",
        "tyro>=0.9",
    ],
    extras_require={
        "flash": ["flash-attn>=2.8; platform_system == 'Linux'"],
        "xformers": ["xformers>=0.0.35"],
        "dicom": [
            "highdicom>=0.26",
            "pydicom>=3",
            "pylibjpeg>=2.0",
            "pylibjpeg-openjpeg>=2.3",  # JPEG 2000 and HTJ2K
            "python-gdcm>=3.0.24",  # JPEG and JPEG-LS; refuses a truncated stream, which pylibjpeg-libjpeg fills up
        ],
        "cohort": [
            "fsspec>=2024.10",  # which has an atomic create; gcsfs and adlfs open gs:// and az:// beside it
            "pyarrow>=17",
            "s3fs>=2024.10",
        ],
        "ray": ["ray[data]>=2.51"],
        "export": ["onnxscript>=0.5"],  # torch writes ONNX through it
        "accuracy": ["einops>=0.7"],  # MONAI's Swin stages, in the accuracy table alone
        "hosts": [  # 2D models that axial_fusion.lift is tested on
            "diffusers>=0.36",
            "timm>=1.0.20",
            "torchvision>=0.26",
            "transformers>=5.0",
        ],
        "test": [
            "einops>=0.7",  # Swin UNETR and Swin-Unet in the accuracy table
            "fsspec>=2024.10",
            "highdicom>=0.26",  # DICOM segmentations are read back
            "hypothesis>=6.100",
            "moto[server]>=5",  # an S3 of this machine
            "onnxruntime>=1.23",  # what export writes is run by it and compared with torch
            "onnxscript>=0.5",
            "peft>=0.17",  # adapters that come from it and go back are tested against it
            "pyarrow>=17",
            "pydicom>=3",
            "pylibjpeg>=2.0",
            "pylibjpeg-openjpeg>=2.3",
            "pytest>=8.2",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",  # one worker a core
            "python-gdcm>=3.0.24",  # compressed slices, with the two of pylibjpeg
            "ray[data]>=2.51",
            "s3fs>=2024.10",
            "setuptools>=77",
        ],
        "dev": ["mypy>=1.15", "ruff>=0.12"],
    },
    entry_points={"console_scripts": ["aftersam = aftersam.__main__:main"]},
    classifiers=[
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
)
