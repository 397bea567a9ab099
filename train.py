"""Train a mixture density network: `python train.py model=mixture k=3`."""

from mdn.cli.train import main

if __name__ == "__main__":
    main()
