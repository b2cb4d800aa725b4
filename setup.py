"""Packaging of diffusers-dualrate. The version lives in `src/diffusers_dualrate/__init__.py` and nowhere else."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
INIT = (ROOT / "src" / "diffusers_dualrate" / "__init__.py").read_text(encoding="utf-8")
README = ROOT / "README.md"

TRAIN = ["accelerate", "datasets", "pillow", "tensorboard"]
EVAL = ["matplotlib", "scikit-learn", "torchmetrics", "transformers"]
DEV = [
    "build",
    "mkdocs-material",
    "mkdocstrings[python]",
    "packaging",
    "peft",
    "pytest",
    "pytest-randomly",
    "pytest-xdist",
    "ruff",
    "setuptools",
    "twine",
]

setup(
    name="diffusers-dualrate",
    version=re.search(r'^__version__ = "([^"]+)"$', INIT, re.MULTILINE).group(1),
    description="Dual-Rate Diffusion for Hugging Face diffusers: a heavy context encoder now and then, "
    "a light denoiser at every step",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The diffusers-dualrate contributors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["diffusion models", "diffusers", "image generation", "distillation", "deep learning", "pytorch"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"diffusers_dualrate": ["py.typed"]},
    zip_safe=False,
    python_requires=">=3.11",
    install_requires=["torch>=2.6", "diffusers>=0.40"],
    extras_require={"train": TRAIN, "eval": EVAL, "dev": [*TRAIN, *EVAL, *DEV]},
)
