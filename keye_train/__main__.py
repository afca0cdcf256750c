"""``python -m keye_train`` is ``keye-train``: what torchrun and the deepspeed launcher start on each rank."""

from keye_train.cli import train_main

if __name__ == "__main__":
    train_main()
