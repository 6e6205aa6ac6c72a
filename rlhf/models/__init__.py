"""Models: loading, adapters, forward passes over rollouts, and the roles they play in PPO."""
