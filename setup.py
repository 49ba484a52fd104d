"""Package metadata; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("configs", "convert", "launch")

setup(
    name="nomic_jax",
    version=re.search(r'__version__ = "(.+)"', Path("nomic_jax/__init__.py").read_text(encoding="utf-8"))[1],
    description="Train, convert and use long-context text embedders in JAX: Nomic Embed, rebuilt",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The nomic_jax authors",
    keywords=["embeddings", "jax", "flax", "sentence-transformers", "retrieval", "nomic-embed", "matryoshka"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Operating System :: Microsoft :: Windows",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # These folders are at the top level of a checkout, and inside of the package once it is installed.
    packages=[*find_packages(include=["nomic_jax", "nomic_jax.*"]), *(f"nomic_jax.{folder}" for folder in FOLDERS)],
    package_dir={f"nomic_jax.{folder}": folder for folder in FOLDERS},
    package_data={
        "nomic_jax": ["py.typed"],
        "nomic_jax.configs": ["data/*.yaml"],
        "nomic_jax.launch": ["recipe.sh", "venv.sh", "k8s/*", "slurm/*"],
    },
    entry_points={"console_scripts": ["nomic-jax = nomic_jax.launch.__main__:main"]},
    # From the oldest release that has what is used to the next that may break it. No upper bound where the number is a
    # date or goes up each quarter. CI tests the versions in requirements-ci*.lock.
    install_requires=[  # what embeds texts and converts checkpoints
        "absl-py>=2.1,<3",
        "flax>=0.12,<0.14",
        "fsspec>=2026.6",  # before, reference:// runs templates
        "huggingface_hub>=0.30,<3",
        "jax>=0.10.2,<0.12",
        "numpy>=2.0,<3",
        "orbax-checkpoint>=0.12,<0.13",  # comes with flax; imported only where there is a run
        "pyyaml>=6.0,<7",
        "safetensors>=0.5,<1",
        "scipy>=1.12,<2",
        "tokenizers>=0.21,<1",
        "tqdm>=4.66,<5",
    ],
    # nomic_jax/extras.py names the extra of a package that is missing.
    extras_require={
        "data": [  # parquet and Arrow files, hf: and tfds: names
            "array-record>=0.5,<1",
            "datasets>=4.0,<6",  # from 4.0 on it runs no loading scripts
            "importlib_resources>=6.0",  # tensorflow-datasets imports it without requiring it
            "pyarrow>=18.0",
            "tensorflow-datasets>=4.9.8,<5",
        ],
        "train": [
            "nomic_jax[data]",
            "grain>=0.2.12,<0.3",
            "ml-collections>=1.0,<2",
            "optax>=0.2.5,<0.3",
            "scikit-learn>=1.4,<2",  # evaluations during training
            "tensorboardX>=2.6,<3",
        ],
        "curate": ["nomic_jax[data,clean]", "faiss-cpu>=1.9,<2"],
        "report": ["bm25s>=0.2,<1", "matplotlib>=3.8,<4", "scikit-learn>=1.4,<2"],  # evaluations and reports
        "all": ["nomic_jax[train,curate,report]", "transformers>=4.57,<6"],  # transformers: a vocab.txt alone
        "cuda12": ["jax[cuda12]>=0.10.2,<0.12"],
        "cuda13": ["jax[cuda13]>=0.10.2,<0.12"],
        # The GPU build replaces faiss-cpu: uninstall that one first.
        "faiss-gpu": ["faiss-gpu-cu12>=1.9,<2"],
        "eval": ["nomic_jax[report]", "mteb>=2.14.5,<3", "pytrec_eval-terrier>=0.5,<1"],  # mteb brings torch
        "integrations": ["langchain-core>=0.3,<2", "llama-index-core>=0.12,<1", "mteb>=2.14.5,<3"],
        "clean": ["rensa>=0.5,<1"],
        # File systems behind s3:// and gs://.
        "s3": ["s3fs>=2026.6"],
        "gcs": ["gcsfs>=2026.6"],
        "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0,<2", "ruff>=0.9,<1"],
        "ray": ["ray[data]>=2.40,<3"],
        "quickstart": ["nomic_jax[all]", "simple-icd-10-cm>=1.0,<2"],
        # For launch/test_newest.sh; tests that need a package of "dev" skip themselves.
        "test": ["nomic_jax[all]", "pytest>=8.0,<10", "pytest-xdist>=3.5,<4"],
        "dev": [
            "nomic_jax[quickstart]",
            "hypothesis>=6.100,<7",
            "langchain-core>=0.3,<2",
            "llama-index-core>=0.12,<1",
            "mypy>=1.13,<3",
            "pytest>=8.0,<10",
            "pytest-xdist>=3.5,<4",
            "ruff>=0.9,<1",
            "setuptools>=68",  # builds the package in tests
        ],
        # torch is a reference to compare with, never a dependency; one exact version, so that pip looks no further.
        "dev-torch": [
            "nomic_jax[dev]",
            "torch==2.13.0",
            "mteb>=2.26,<3",
            "pytrec_eval-terrier>=0.5,<1",
            "sentence-transformers>=6.0,<7",
        ],
    },
)
