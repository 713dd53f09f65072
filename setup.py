"""Package metadata; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="megatron_completedp",
    version="0.1.0",
    description="Complete(d)P hyperparameter transfer for pretraining on Megatron-Core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_completedp", "megatron_completedp.*"]),
    package_data={"megatron_completedp.study": ["page.css"]},
    python_requires=">=3.11",
    # psutil is needed by megatron-core's checkpoint writer but not declared by it.
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "numpy",
        "scipy",
        "sentencepiece",
        "psutil",
        "pyyaml",
        "tyro>=0.9",
        "matplotlib",
        "tqdm",
        "orjson",
        "zstandard",
        "fsspec",
    ],
    extras_require={
        # gigatoken: the fast engine; tokenizers: a tokenizer.json; pyarrow: Parquet.
        "preprocess": ["gigatoken>=0.10", "tokenizers", "pyarrow"],
        # tools/evaluate.py: scores on local files.
        "evaluate": ["lm_eval", "accelerate", "transformers"],
        # psycopg: a study in PostgreSQL; cmaes: the sampler of this name. Optuna 4 gives workers
        # that ask before a trial has ended one and the same point of qmc.
        "search": ["optuna>=5,<6", "cmaes", "psycopg[binary]"],
        # The sampler turbo.
        "turbo": ["botorch"],
        # tools/convert_checkpoint.py: protobuf reads SentencePiece models.
        "hf": ["transformers>=5", "safetensors", "tokenizers", "protobuf"],
        # megatron_completedp.torch_engine on DeepSpeed; on torch and FSDP2 it needs torch alone.
        "deepspeed": ["deepspeed>=0.19"],
        "tensorboard": ["tensorboard"],
        "test": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML"),
            "optuna-dashboard",
        ],
    },
)
