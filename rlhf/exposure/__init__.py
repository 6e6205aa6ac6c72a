"""Cures of exposure bias beside PPO: a model trained on gold prefixes alone goes on from its own."""
