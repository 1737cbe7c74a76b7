"""Training with Lightning and Hydra: the job behind `syncbn-train` and `launch/train.sh`."""
