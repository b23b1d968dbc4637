"""Package metadata; everything else that is configured stands in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

setup(
    name="bqnn",
    version=runpy.run_path(str(ROOT / "bqnn" / "_version.py"))["__version__"],
    description="Bayesian asymmetric M-ary quantized networks for PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["bqnn", "bqnn.*"]),
    package_data={"bqnn": ["py.typed"]},
    install_requires=[
        "torch>=2.10",
        "torchvision",  # each release asks for its own torch
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "scikit-learn>=1.4",  # the digits data set
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5"],
        "dev": ["ruff>=0.12", "mypy>=1.15"],
    },
    entry_points={"console_scripts": ["bqnn = bqnn.cli:main"]},
)
