"""Compile DeepSpeed's CPU communication op ahead of the first training stage: `python -m modeling.warm`.

A cold build takes 50 to 80 s; it is cached in torch's extension folder under the home folder.
"""

import os


def main() -> None:
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from modeling.engine import build_ops

    print(f"torch {torch.__version__}: {build_ops()}", flush=True)
    os._exit(0)  # the op's background thread can abort a normal exit


if __name__ == "__main__":
    main()
