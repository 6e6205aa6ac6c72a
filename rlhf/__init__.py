"""RLHF pipeline: supervised fine-tuning, ranked reward models, PPO with a KL penalty, evaluation."""

__version__ = "0.1.0"
