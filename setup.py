"""Package metadata; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="nomic_jax",
    version="0.1.0",
    description="Train, convert and use long-context text embedders in JAX: Nomic Embed, rebuilt",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["nomic_jax", "nomic_jax.*"]),
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.5",
        "datasets>=3.0",
        "faiss-cpu>=1.9",
        "flax>=0.12,<0.14",
        "fsspec",
        "grain>=0.2.12,<0.3",
        "huggingface_hub>=0.30",
        "jax>=0.10.2,<0.12",
        "matplotlib>=3.8",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12,<0.13",
        "pyarrow>=18.0",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "scikit-learn>=1.4",
        "scipy>=1.12",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.8",
        "importlib_resources",  # tensorflow-datasets imports it without requiring it
        "tokenizers>=0.21",
        "tqdm>=4.66",
        "transformers>=4.57",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10.2,<0.12"],
        "cuda13": ["jax[cuda13]>=0.10.2,<0.12"],
        # The GPU build replaces faiss-cpu: uninstall that one first.
        "faiss-gpu": ["faiss-gpu-cu12>=1.9"],
        "eval": ["bm25s>=0.2", "mteb>=2.14.5", "pytrec_eval-terrier>=0.5"],  # mteb brings torch
        "integrations": ["langchain-core>=0.3", "llama-index-core>=0.12", "mteb>=2.14.5"],
        "clean": ["rensa>=0.5"],
        # File systems behind s3:// and gs://.
        "s3": ["s3fs>=2024.6"],
        "gcs": ["gcsfs>=2024.6"],
        "ray": ["ray[data]>=2.40"],
        "quickstart": ["bm25s>=0.2", "simple-icd-10-cm>=1.0"],
        # torch is a reference to compare with, never a dependency; one exact version, so that pip looks no further.
        "dev": [
            "torch==2.13.0",
            "sentence-transformers>=6.0",
            "bm25s>=0.2",
            "hypothesis>=6.100",
            "langchain-core>=0.3",
            "llama-index-core>=0.12",
            "mteb>=2.26",
            "mypy>=1.13",
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "pytrec_eval-terrier>=0.5",
            "rensa>=0.5",
            "ruff>=0.9",
            "simple-icd-10-cm>=1.0",
        ],
    },
)
